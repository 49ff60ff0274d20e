"""Scores of any ``encode(list[str]) -> ndarray [N, D]``: STS, transfer, retrieval, geometry; and their comparison."""

from hncse_ray.evaluation.compare import Difference, compare_retrieval, compare_sts, mean_and_spread
from hncse_ray.evaluation.geometry import (
    SimilarityHistogram,
    alignment,
    anisotropy,
    evaluate_geometry,
    similarity_histogram,
    uniformity,
)
from hncse_ray.evaluation.retrieval import evaluate_retrieval, read_pairs
from hncse_ray.evaluation.sts import STS_TASKS, StsPair, StsPairs, evaluate_sts, evaluate_stsb, read_sts, spearman
from hncse_ray.evaluation.transfer import TRANSFER_TASKS, evaluate_transfer
from hncse_ray.evaluation.vectors import Encode, encode_checked

__all__ = [
    "STS_TASKS",
    "TRANSFER_TASKS",
    "Difference",
    "Encode",
    "SimilarityHistogram",
    "StsPair",
    "StsPairs",
    "alignment",
    "anisotropy",
    "compare_retrieval",
    "compare_sts",
    "encode_checked",
    "evaluate_geometry",
    "evaluate_retrieval",
    "evaluate_sts",
    "evaluate_stsb",
    "evaluate_transfer",
    "mean_and_spread",
    "read_pairs",
    "read_sts",
    "similarity_histogram",
    "spearman",
    "uniformity",
]
