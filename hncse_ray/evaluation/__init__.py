"""Scores of any ``encode(list[str]) -> ndarray [N, D]``: STS, retrieval, and the geometry of its vectors."""

from hncse_ray.evaluation.geometry import alignment, anisotropy, uniformity
from hncse_ray.evaluation.retrieval import evaluate_retrieval, read_pairs
from hncse_ray.evaluation.sts import STS_TASKS, StsPair, StsPairs, evaluate_sts, evaluate_stsb, read_sts, spearman
from hncse_ray.evaluation.vectors import Encode, encode_checked

__all__ = [
    "STS_TASKS",
    "Encode",
    "StsPair",
    "StsPairs",
    "alignment",
    "anisotropy",
    "encode_checked",
    "evaluate_retrieval",
    "evaluate_sts",
    "evaluate_stsb",
    "read_pairs",
    "read_sts",
    "spearman",
    "uniformity",
]
