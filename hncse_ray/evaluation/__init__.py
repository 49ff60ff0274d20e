"""Scores of any ``encode(list[str]) -> ndarray [N, D]``: STS, transfer, retrieval, geometry; and their comparison."""

from hncse_ray.evaluation.cloze import Gaps, cloze_set, draw_candidates, draw_gaps
from hncse_ray.evaluation.collection import read_collection
from hncse_ray.evaluation.compare import Difference, compare_earned, compare_retrieval, compare_sts, mean_and_spread
from hncse_ray.evaluation.geometry import (
    SimilarityHistogram,
    alignment,
    anisotropy,
    evaluate_geometry,
    similarity_histogram,
    uniformity,
)
from hncse_ray.evaluation.retrieval import METRICS, RetrievalSet, evaluate_retrieval, paired_set, read_pairs
from hncse_ray.evaluation.sts import STS_TASKS, StsPair, StsPairs, evaluate_sts, read_sts, spearman
from hncse_ray.evaluation.transfer import TRANSFER_TASKS, evaluate_transfer
from hncse_ray.evaluation.vectors import Encode, encode_checked, encode_unit, on_side, unit_rows

__all__ = [
    "METRICS",
    "STS_TASKS",
    "TRANSFER_TASKS",
    "Difference",
    "Encode",
    "Gaps",
    "RetrievalSet",
    "SimilarityHistogram",
    "StsPair",
    "StsPairs",
    "alignment",
    "anisotropy",
    "cloze_set",
    "draw_candidates",
    "compare_earned",
    "compare_retrieval",
    "compare_sts",
    "draw_gaps",
    "encode_checked",
    "encode_unit",
    "evaluate_geometry",
    "evaluate_retrieval",
    "evaluate_sts",
    "evaluate_transfer",
    "mean_and_spread",
    "on_side",
    "paired_set",
    "read_collection",
    "read_pairs",
    "read_sts",
    "similarity_histogram",
    "spearman",
    "uniformity",
    "unit_rows",
]
