"""Retrieval: how far up does a query find what is right for it, among all candidates?"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from hncse_ray.config import COLLECTION_METRICS, RETRIEVAL_METRICS
from hncse_ray.errors import DataError
from hncse_ray.evaluation.vectors import Encode, FloatArray, encode_unit, on_side
from hncse_ray.reading import read_table

# Cosines closer than this are equal: a dot product of 32-bit unit rows is no more precise.
TIE_TOLERANCE = 1e-6
_COLUMNS = ("query", "answer")
_FORMATS = "TSV (two columns), or CSV, JSONL or Parquet with columns query and answer"

Ints = NDArray[np.int_]


@dataclass(frozen=True)
class RetrievalSet:
    """Queries, the candidates they are searched among, and which of these are right; plain data that pickles.

    Attributes:
        queries: Q texts.
        candidates: A texts, the same for every query.
        grades: for each query its right candidates, by position, and how right each is: a whole number from 1.
        metrics: those of :data:`METRICS` that are scored.
        sides: whether queries and candidates are of two kinds, so that they get the prompts of queries and documents.
        own: for each query a candidate that is not ranked for it, as its text is of it; or nothing.
    """

    queries: tuple[str, ...]
    candidates: tuple[str, ...]
    grades: tuple[Mapping[int, int], ...]
    metrics: tuple[str, ...] = COLLECTION_METRICS
    sides: bool = True
    own: tuple[int, ...] = ()


def paired_set(queries: Sequence[str], answers: Sequence[str], *, sides: bool = True) -> RetrievalSet:
    """Make a set of pairs: ``answers[i]`` is right for ``queries[i]``, and the candidates are all distinct answers.

    A query text that comes several times is one query with several right answers. Without ``sides`` queries and answers
    are texts of one kind.

    Raises:
        DataError: lists of unequal length.
    """
    if len(queries) != len(answers):
        raise DataError(f"there are {len(queries)} queries for {len(answers)} answers", hint="Pair them")
    position = {text: i for i, text in enumerate(dict.fromkeys(answers))}
    grades: dict[str, dict[int, int]] = {}
    for query, answer in zip(queries, answers, strict=True):
        grades.setdefault(query, {})[position[answer]] = 1
    return RetrievalSet(tuple(grades), tuple(position), tuple(grades.values()), RETRIEVAL_METRICS, sides)


Metric = Callable[[Ints, Ints], float]  # of one query's right candidates: ranks from 1 [R], grades [R]


def _recall(k: int, *, capped: bool) -> Metric:
    def metric(rank_R: Ints, grade_R: Ints) -> float:
        return np.count_nonzero(rank_R <= k) / (min(k, len(rank_R)) if capped else len(rank_R))

    return metric


def _reciprocal_rank(k: int | None = None) -> Metric:
    def metric(rank_R: Ints, grade_R: Ints) -> float:
        first = int(rank_R.min())
        return 1 / first if k is None or first <= k else 0.0

    return metric


def _ndcg(k: int) -> Metric:
    def metric(rank_R: Ints, grade_R: Ints) -> float:
        ideal_k = np.sort(grade_R)[::-1][:k]
        gained = np.sum((grade_R / np.log2(rank_R + 1))[rank_R <= k])
        return float(gained / np.sum(ideal_k / np.log2(np.arange(len(ideal_k)) + 2)))

    return metric


METRICS: dict[str, Metric] = {
    "recall@1": _recall(1, capped=True),
    "recall@10": _recall(10, capped=True),
    "recall@100": _recall(100, capped=False),
    "mrr": _reciprocal_rank(),
    "mrr@10": _reciprocal_rank(10),
    "ndcg@10": _ndcg(10),
}
"""What a query earns, 0 to 1; a score is the mean over the queries.

Of R right candidates recall@1 and recall@10 count those found, out of at most k (a perfect encoder has 1), recall@100
out of R, as trec_eval does. mrr is 1 / the first right rank. ndcg@10 gains the grade itself, as trec_eval and BEIR do.
"""


def evaluate_retrieval(encode: Encode, data: RetrievalSet, *, max_scores: int = 2**24) -> dict[str, float]:
    """Rank all candidates by cosine for every query, and score the ranks of the right ones.

    Ties count against the encoder: of equal cosines the right ones come last, so that a constant encoder ranks every
    right candidate last.

    Args:
        encode: the encoder to score, for queries and candidates alike.
        data: what is searched.
        max_scores: scores held at a time; the work is cut into chunks of queries accordingly.

    Returns:
        Each of ``data.metrics``, 0 to 1; see :data:`METRICS`.

    Raises:
        DataError: nothing to rank, or vectors that cannot be scored.
    """
    return {name: float(np.mean(of_Q)) for name, of_Q in query_scores(encode, data, max_scores=max_scores).items()}


def query_scores(encode: Encode, data: RetrievalSet, *, max_scores: int = 2**24) -> dict[str, FloatArray]:
    """Return what every query earns ``[Q]`` by each of ``data.metrics``; see :func:`evaluate_retrieval`."""
    count = len(data.candidates)
    if len(set(data.candidates)) < 2:
        raise DataError(f"retrieval needs two distinct candidates at least, and there are {len(set(data.candidates))}")
    candidate_AD = encode_unit(on_side(encode, "document") if data.sides else encode, data.candidates)
    query_QD = encode_unit(on_side(encode, "query") if data.sides else encode, data.queries)
    chunk = max(1, max_scores // count)
    scores_Q: dict[str, list[float]] = {name: [] for name in data.metrics}
    for start in range(0, len(query_QD), chunk):
        score_CA = query_QD[start : start + chunk] @ candidate_AD.T
        if data.own:
            score_CA[np.arange(len(score_CA)), list(data.own[start : start + chunk])] = -np.inf
        for score_A, grades in zip(score_CA, data.grades[start:], strict=False):
            position_R, grade_R = (np.fromiter(part, np.int_) for part in (grades.keys(), grades.values()))
            rank_R = _ranks(score_A, position_R, grade_R)
            for name in data.metrics:
                scores_Q[name].append(METRICS[name](rank_R, grade_R))
    return {name: np.array(of_Q) for name, of_Q in scores_Q.items()}


def _ranks(score_A: FloatArray, position_R: Ints, grade_R: Ints) -> Ints:
    """Ranks, from 1, of a query's right candidates; of equal scores those of a lower grade come first."""
    own_R = score_A[position_R]
    other = np.arange(len(own_R))
    at_least_R = len(score_A) - np.searchsorted(np.sort(score_A), own_R - TIE_TOLERANCE)  # itself too
    equal_or_above_RR = own_R >= own_R[:, None] - TIE_TOLERANCE
    clearly_above_RR = own_R > own_R[:, None] + TIE_TOLERANCE
    in_order_RR = (own_R > own_R[:, None]) | ((own_R == own_R[:, None]) & (other < other[:, None]))
    before_RR = np.select(
        [grade_R < grade_R[:, None], grade_R > grade_R[:, None]], [equal_or_above_RR, clearly_above_RR], in_order_RR
    )
    rank_R: Ints = 1 + (at_least_R - equal_or_above_RR.sum(axis=1)) + before_RR.sum(axis=1)
    return rank_R


def read_pairs(path: str | Path) -> tuple[list[str], list[str]]:
    """Read queries and their answers from a table of the columns ``query`` and ``answer`` and perhaps others.

    Its kind is told by its ending (see :mod:`hncse_ray.reading`). TSV, also as ``.txt``, may come without a header:
    then it has these two columns alone. Text is UTF-8, and is stripped at its ends.

    Returns:
        Two lists of the same length.

    Raises:
        DataError: the file is missing, of another kind, broken or empty; it names the line or row.
    """
    queries: list[str] = []
    answers: list[str] = []
    for _, (query, answer) in read_table(Path(path), _COLUMNS, header=False):
        queries.append(query)
        answers.append(answer)
    if not queries:
        raise DataError("holds no pairs", str(path), f"Pairs come as {_FORMATS}")
    return queries, answers
