"""Retrieval: how far up does a query find what is right for it, among all candidates?"""

from __future__ import annotations

import csv
import io
import json
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hncse_ray.config import COLLECTION_METRICS, RETRIEVAL_METRICS
from hncse_ray.errors import DataError
from hncse_ray.evaluation.vectors import Encode, FloatArray, encode_unit

logger = logging.getLogger(__name__)

# Cosines closer than this are equal: a dot product of 32-bit unit rows is no more precise.
TIE_TOLERANCE = 1e-6
_COLUMNS = ("query", "answer")
_FORMATS = "TSV (two columns, no header), or CSV, JSONL or Parquet with columns query and answer"

Row = tuple[int, object, object]  # line or row number from 1, query, answer
Ints = NDArray[np.int_]


@dataclass(frozen=True)
class RetrievalSet:
    """Queries, the candidates they are searched among, and which of these are right; plain data that pickles.

    Attributes:
        queries: Q texts.
        candidates: A texts, the same for every query.
        grades: for each query its right candidates, by position, and how right each is: a whole number from 1.
        metrics: those of :data:`METRICS` that are scored.
    """

    queries: tuple[str, ...]
    candidates: tuple[str, ...]
    grades: tuple[Mapping[int, int], ...]
    metrics: tuple[str, ...] = COLLECTION_METRICS


def paired_set(queries: Sequence[str], answers: Sequence[str]) -> RetrievalSet:
    """Make a set of pairs: ``answers[i]`` is right for ``queries[i]``, and the candidates are all distinct answers.

    A query text that comes several times is one query with several right answers.

    Raises:
        DataError: lists of unequal length.
    """
    if len(queries) != len(answers):
        raise DataError(f"there are {len(queries)} queries for {len(answers)} answers", hint="Pair them")
    position = {text: i for i, text in enumerate(dict.fromkeys(answers))}
    grades: dict[str, dict[int, int]] = {}
    for query, answer in zip(queries, answers, strict=True):
        grades.setdefault(query, {})[position[answer]] = 1
    return RetrievalSet(tuple(grades), tuple(position), tuple(grades.values()), RETRIEVAL_METRICS)


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
    z_ND = encode_unit(encode, [*data.candidates, *data.queries])
    candidate_AD, query_QD = z_ND[:count], z_ND[count:]
    chunk = max(1, max_scores // count)
    scores_Q: dict[str, list[float]] = {name: [] for name in data.metrics}
    for start in range(0, len(query_QD), chunk):
        score_CA = query_QD[start : start + chunk] @ candidate_AD.T
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
    """Read queries and their answers, told by the file's ending.

    ``.tsv`` and ``.txt`` hold two tab-separated columns and no header; ``.csv``, ``.jsonl`` (``.ndjson``) and
    ``.parquet`` hold the columns ``query`` and ``answer`` and perhaps others. Text is UTF-8, and
    is stripped at its ends.

    Returns:
        Two lists of the same length.

    Raises:
        DataError: the file is missing, of another kind, broken or empty; it names the line or row.
    """
    path = Path(path)
    match path.suffix.lower():
        case ".tsv" | ".txt":
            rows: Iterable[Row] = _tsv_rows(path)
        case ".csv":
            rows = _csv_rows(path)
        case ".jsonl" | ".ndjson":
            rows = _jsonl_rows(path)
        case ".parquet":
            rows = _parquet_rows(path)
        case suffix:
            raise DataError(f"is of an unknown kind {suffix!r}", str(path), f"Pairs come as {_FORMATS}")
    queries: list[str] = []
    answers: list[str] = []
    for number, *values in rows:
        for column, value, texts in zip(_COLUMNS, values, (queries, answers), strict=True):
            if not isinstance(value, str) or not value.strip():
                what = "is empty" if value is None or value == "" or isinstance(value, str) else "is not text"
                raise DataError(f"the {column} {what}", f"{path}:{number}")
            texts.append(value.strip())
    if not queries:
        raise DataError("holds no pairs", str(path), f"Pairs come as {_FORMATS}")
    return queries, answers


def _text(path: Path) -> str:
    try:
        return path.read_bytes().decode("utf-8-sig")
    except OSError as error:
        raise _unreadable(path, error) from None
    except UnicodeDecodeError as error:
        line = error.object[: error.start].count(b"\n") + 1
        raise DataError("is not UTF-8", f"{path}:{line}", "Convert it, such as with iconv") from None


def _numbered_lines(path: Path) -> Iterator[tuple[int, str]]:
    for number, line in enumerate(_text(path).split("\n"), start=1):
        if line.strip():
            yield number, line.removesuffix("\r")


def _tsv_rows(path: Path) -> Iterator[Row]:
    for number, line in _numbered_lines(path):
        row = line.split("\t")
        if len(row) != 2:
            what = f"has {len(row)} tab-separated columns where 2 are needed"
            raise DataError(what, f"{path}:{number}", "Each line is a query, a tab and its answer")
        yield number, row[0], row[1]


def _csv_rows(path: Path) -> Iterator[Row]:
    reader = csv.DictReader(io.StringIO(_text(path), newline=""), strict=True)
    try:
        _check_columns(path, reader.fieldnames or ())
        for row in reader:
            yield reader.line_num, row["query"], row["answer"]
    except csv.Error as error:
        raise DataError(f"is not valid CSV ({error})", f"{path}:{reader.line_num}") from None


def _jsonl_rows(path: Path) -> Iterator[Row]:
    for number, line in _numbered_lines(path):
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise DataError(f"is not valid JSON ({error})", f"{path}:{number}", "One object a line") from None
        if not isinstance(row, dict):
            raise DataError("is not a JSON object", f"{path}:{number}", 'Write {"query": ..., "answer": ...}')
        _check_columns(path, row, number)
        yield number, row["query"], row["answer"]


def _parquet_rows(path: Path) -> Iterator[Row]:
    import pyarrow.parquet as pq  # slow to import, and used here only
    from pyarrow import ArrowException

    try:
        with pq.ParquetFile(path) as file:
            _check_columns(path, file.schema_arrow.names)
            table = file.read(columns=list(_COLUMNS))
    except OSError as error:
        raise _unreadable(path, error) from None
    except ArrowException as error:
        raise DataError(f"is not valid Parquet ({error})", str(path)) from None
    columns: list[list[Any]] = [table.column(name).to_pylist() for name in _COLUMNS]
    for number, (query, answer) in enumerate(zip(*columns, strict=True), start=1):
        yield number, query, answer


def _check_columns(path: Path, found: Iterable[object], line: int | None = None) -> None:
    names = [str(name) for name in found]
    if missing := [name for name in _COLUMNS if name not in names]:
        where = f"{path}:{line}" if line else str(path)
        known = ", ".join(names) or "none"
        raise DataError(f"has no column {' and no column '.join(missing)}", where, f"Its columns: {known}")


def _unreadable(path: Path, error: OSError) -> DataError:
    return DataError(f"cannot be read ({error.strerror or error})", str(path))
