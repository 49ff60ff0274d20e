"""Is the difference between two encoders more than the luck of the test set? Paired bootstrap over its items."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hncse_ray.errors import DataError
from hncse_ray.evaluation.retrieval import METRICS, retrieval_ranks
from hncse_ray.evaluation.sts import STS_TASKS, cosines, read_sts
from hncse_ray.evaluation.vectors import Encode

FloatArray = NDArray[np.floating[Any]]
Ints = NDArray[np.int_]


@dataclass(frozen=True)
class Difference:
    """How much better the second encoder scores than the first.

    Attributes:
        name: of the score.
        first: the first encoder's score.
        second: the second's.
        low: lower end of the 95 % interval of ``second - first``.
        high: its upper end.
        p_value: two-sided, of no difference.
    """

    name: str
    first: float
    second: float
    low: float
    high: float
    p_value: float


def compare_sts(
    first: Encode,
    second: Encode,
    data_dir: str | Path,
    tasks: Sequence[str] | None = None,
    *,
    resamples: int = 1000,
    seed: int = 0,
) -> list[Difference]:
    """Compare two encoders on STS tasks; pairs are resampled within each task.

    Args:
        first: an encoder.
        second: another.
        data_dir: SentEval's ``data/downstream`` folder.
        tasks: default all seven, which also gives ``avg``.
        resamples: bootstrap samples.
        seed: of the resampling.

    Raises:
        DataError: as :func:`~hncse_ray.evaluation.sts.evaluate_sts`.
    """
    chosen = STS_TASKS if tasks is None else tuple(dict.fromkeys(tasks))
    sets = [read_sts(task, "test", data_dir) for task in chosen]
    cosines_2T = [cosines(encode, sets) for encode in (first, second)]
    rng = np.random.default_rng(seed)
    found, whole_T, sampled_T = [], [], []
    for task, pairs, *both in zip(chosen, sets, *cosines_2T, strict=True):
        gold_N = np.array([pair.gold for pair in pairs.pairs])
        whole = _spearmans(both, gold_N, np.arange(len(gold_N)))
        draws_RN = rng.integers(0, len(gold_N), (resamples, len(gold_N)))
        sampled = np.array([_spearmans(both, gold_N, draw_N) for draw_N in draws_RN])
        found.append(_difference(task, whole, sampled))
        whole_T.append(whole)
        sampled_T.append(sampled)
    if set(chosen) == set(STS_TASKS):
        found.append(_difference("avg", np.mean(whole_T, axis=0), np.mean(sampled_T, axis=0)))
    return found


def compare_retrieval(
    first: Encode,
    second: Encode,
    queries: list[str],
    answers: list[str],
    *,
    resamples: int = 1000,
    seed: int = 0,
) -> list[Difference]:
    """Compare two encoders on retrieval of pairs; queries are resampled, the candidates stay.

    Raises:
        DataError: as :func:`~hncse_ray.evaluation.retrieval.evaluate_retrieval`.
    """
    ranks_2Q = [retrieval_ranks(encode, queries, answers) for encode in (first, second)]
    draws_RQ = np.random.default_rng(seed).integers(0, len(queries), (resamples, len(queries)))
    found = []
    for name, of_ranks in METRICS.items():
        gains_2Q = np.stack([of_ranks(rank_Q) for rank_Q in ranks_2Q])
        sampled_R2 = gains_2Q[:, draws_RQ].mean(axis=2).T
        found.append(_difference(name, gains_2Q.mean(axis=1), sampled_R2))
    return found


def mean_and_spread(runs: Sequence[dict[str, float]]) -> dict[str, tuple[float, float]]:
    """Return mean and standard deviation (n - 1; 0 for one run) of each score over runs with different seeds.

    Raises:
        DataError: the runs were not scored on the same sets.
    """
    if any(run.keys() != runs[0].keys() for run in runs):
        raise DataError("the runs of one group have different scores", hint="Score all of them on the same suites")
    values = {name: np.array([run[name] for run in runs]) for name in runs[0]}
    return {name: (float(v.mean()), float(v.std(ddof=1)) if len(v) > 1 else 0.0) for name, v in values.items()}


def _spearmans(both: Sequence[FloatArray], gold_N: FloatArray, index_N: Ints) -> FloatArray:
    from scipy.stats import spearmanr  # see sts.py

    return np.array([100 * spearmanr(cosine_N[index_N], gold_N[index_N]).statistic for cosine_N in both])


def _difference(name: str, whole_2: FloatArray, sampled_R2: FloatArray) -> Difference:
    delta_R = sampled_R2[:, 1] - sampled_R2[:, 0]
    low, high = np.percentile(delta_R, [2.5, 97.5])
    # The share of samples on the other side of no difference, both sides; at least one sample's worth.
    tail = min(np.mean(delta_R <= 0), np.mean(delta_R >= 0))
    p_value = min(1.0, max(2 * float(tail), 1 / len(delta_R)))
    return Difference(name, float(whole_2[0]), float(whole_2[1]), float(low), float(high), p_value)
