"""Is the difference between two encoders more than the luck of the test set? Paired bootstrap over its items."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hncse_ray.errors import DataError
from hncse_ray.evaluation.retrieval import RetrievalSet, query_scores
from hncse_ray.evaluation.sts import STS_TASKS, StsPairs, cosines
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
        p_value: two-sided, of no difference; see :attr:`resolution`.
        resolution: the smallest p-value that so many resamples can show: all of them lay on one side. The true one
            may be smaller still.
        items: pairs or queries that were drawn from.
    """

    name: str
    first: float
    second: float
    low: float
    high: float
    p_value: float
    resolution: float
    items: int


def compare_sts(
    first: Encode, second: Encode, sets: Mapping[str, StsPairs], *, resamples: int = 1000, seed: int = 0
) -> list[Difference]:
    """Compare two encoders on sets of scored pairs, each of which is resampled by itself.

    Args:
        first: an encoder.
        second: another.
        sets: of :func:`~hncse_ray.evaluation.sts.read_sts`, by name.
        resamples: bootstrap samples.
        seed: of the resampling.

    Returns:
        One for every set, and ``avg`` if they are the seven test sets by their tasks' names.

    Raises:
        DataError: as :func:`~hncse_ray.evaluation.sts.spearman`.
    """
    if not sets:
        return []
    cosines_2T = [cosines(encode, list(sets.values())) for encode in (first, second)]
    rng = np.random.default_rng(seed)
    found, whole_T, sampled_T = [], [], []
    for (name, pairs), *both in zip(sets.items(), *cosines_2T, strict=True):
        gold_N = np.array([pair.gold for pair in pairs.pairs])
        whole_2, sampled_R2 = _correlated(both, gold_N, rng.integers(0, len(gold_N), (resamples, len(gold_N))))
        whole_T.append(whole_2)
        sampled_T.append(sampled_R2)
        found.append(_difference(name, whole_2, sampled_R2, len(gold_N)))
    if set(sets) == set(STS_TASKS):
        found.append(
            _difference("avg", np.mean(whole_T, axis=0), np.mean(sampled_T, axis=0), sum(d.items for d in found))
        )
    return found


def compare_retrieval(
    first: Encode,
    second: Encode,
    sets: Mapping[str, RetrievalSet],
    *,
    mean: str = "mean",
    resamples: int = 1000,
    seed: int = 0,
) -> list[Difference]:
    """Compare two encoders on retrieval; the queries of each set are resampled by themselves, the candidates stay.

    Args:
        first: an encoder.
        second: another.
        sets: what is searched, by name; all with the same metrics.
        mean: the name of the mean over the sets.
        resamples: bootstrap samples.
        seed: of the resampling.

    Returns:
        ``name/metric`` for every set and metric; and ``mean/metric`` where there are several.

    Raises:
        DataError: as :func:`~hncse_ray.evaluation.retrieval.evaluate_retrieval`.
    """
    rng = np.random.default_rng(seed)
    found: list[Difference] = []
    whole: dict[str, list[FloatArray]] = {}
    sampled: dict[str, list[FloatArray]] = {}
    for name, data in sets.items():
        scores_2 = [query_scores(encode, data) for encode in (first, second)]
        draws_RQ = rng.integers(0, len(data.queries), (resamples, len(data.queries)))
        for metric in data.metrics:
            whole_2, sampled_R2 = _mean_earned(np.stack([of_encoder[metric] for of_encoder in scores_2]), draws_RQ)
            whole.setdefault(metric, []).append(whole_2)
            sampled.setdefault(metric, []).append(sampled_R2)
            found.append(_difference(f"{name}/{metric}", whole_2, sampled_R2, len(data.queries)))
    if len(sets) > 1:
        for metric in whole:
            whole_2, sampled_R2 = (np.mean(of_sets[metric], axis=0) for of_sets in (whole, sampled))
            queries = sum(len(data.queries) for data in sets.values())
            found.append(_difference(f"{mean}/{metric}", whole_2, sampled_R2, queries))
    return found


def compare_earned(
    name: str,
    earned: Mapping[str, tuple[FloatArray, FloatArray]],
    *,
    gold: Mapping[str, FloatArray] | None = None,
    resamples: int = 1000,
    seed: int = 0,
) -> Difference:
    """Compare two encoders by what they have earned already, as the functions above do: nothing is encoded again.

    Args:
        name: of the score.
        earned: by set, what each item has earned with either encoder, ``[N]``; a score is the mean over the sets.
        gold: by set, the gold scores of the items, whose earnings are cosines: the score is Spearman x 100. None: it is
            the mean of the earnings.
        resamples: bootstrap samples.
        seed: of the resampling.
    """
    rng = np.random.default_rng(seed)
    whole_S, sampled_S = [], []
    for set_name, both in earned.items():
        draws_RN = rng.integers(0, len(both[0]), (resamples, len(both[0])))
        if gold is None:
            whole_2, sampled_R2 = _mean_earned(np.stack(both), draws_RN)
        else:
            whole_2, sampled_R2 = _correlated(both, gold[set_name], draws_RN)
        whole_S.append(whole_2)
        sampled_S.append(sampled_R2)
    items = sum(len(both[0]) for both in earned.values())
    return _difference(name, np.mean(whole_S, axis=0), np.mean(sampled_S, axis=0), items)


def mean_and_spread(runs: Sequence[dict[str, float]]) -> dict[str, tuple[float, float]]:
    """Return mean and standard deviation (n - 1; 0 for one run) of each score over runs with different seeds.

    Raises:
        DataError: the runs were not scored on the same sets.
    """
    if any(run.keys() != runs[0].keys() for run in runs):
        raise DataError("the runs of one group have different scores", hint="Score all of them on the same suites")
    values = {name: np.array([run[name] for run in runs]) for name in runs[0]}
    return {name: (float(v.mean()), float(v.std(ddof=1)) if len(v) > 1 else 0.0) for name, v in values.items()}


def _mean_earned(both_2N: FloatArray, draws_RN: Ints) -> tuple[FloatArray, FloatArray]:
    """The mean of what items have earned, of all of them ``[2]`` and of each draw ``[R, 2]``."""
    return both_2N.mean(axis=1), both_2N[:, draws_RN].mean(axis=2).T


def _correlated(both: Sequence[FloatArray], gold_N: FloatArray, draws_RN: Ints) -> tuple[FloatArray, FloatArray]:
    """The correlation of cosines with the gold, of all of them ``[2]`` and of each draw ``[R, 2]``."""
    sampled_R2 = np.array([_spearmans(both, gold_N, draw_N) for draw_N in draws_RN])
    return _spearmans(both, gold_N, np.arange(len(gold_N))), sampled_R2


def _spearmans(both: Sequence[FloatArray], gold_N: FloatArray, index_N: Ints) -> FloatArray:
    from scipy.stats import spearmanr  # see sts.py

    return np.array([100 * spearmanr(cosine_N[index_N], gold_N[index_N]).statistic for cosine_N in both])


def _difference(name: str, whole_2: FloatArray, sampled_R2: FloatArray, items: int) -> Difference:
    delta_R = sampled_R2[:, 1] - sampled_R2[:, 0]
    low, high = np.percentile(delta_R, [2.5, 97.5])
    # Samples on the other side of no difference, and the observed one itself: a p-value is never 0 (Davison & Hinkley
    # 1997, section 4.2). Twice, for either side could have been the smaller.
    resolution = 2 / (len(delta_R) + 1)
    beyond = min(np.count_nonzero(delta_R <= 0), np.count_nonzero(delta_R >= 0))
    p_value = min(1.0, (beyond + 1) * resolution)
    return Difference(name, float(whole_2[0]), float(whole_2[1]), float(low), float(high), p_value, resolution, items)
