"""Retrieval: does the answer that belongs to a query come first among all answers?"""

from __future__ import annotations

import csv
import io
import json
import logging
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hncse_ray.errors import DataError
from hncse_ray.evaluation.vectors import Encode, FloatArray, encode_checked

logger = logging.getLogger(__name__)

# Cosines closer than this are equal: a dot product of 32-bit unit rows is no more precise.
TIE_TOLERANCE = 1e-6
_COLUMNS = ("query", "answer")
_FORMATS = "TSV (two columns, no header), or CSV, JSONL or Parquet with columns query and answer"

Row = tuple[int, object, object]  # line or row number from 1, query, answer
METRICS: dict[str, Callable[[NDArray[np.int_]], FloatArray]] = {
    "recall@1": lambda rank_Q: (rank_Q <= 1).astype(float),
    "recall@10": lambda rank_Q: (rank_Q <= 10).astype(float),
    "mrr": lambda rank_Q: 1 / rank_Q,
    "ndcg@10": lambda rank_Q: np.where(rank_Q <= 10, 1 / np.log2(rank_Q + 1), 0.0),
}
"""Each metric is the mean over the queries of what their ranks (from 1) earn."""


def evaluate_retrieval(
    encode: Encode,
    queries: list[str],
    answers: list[str],
    *,
    prefix: str = "",
    max_scores: int = 2**24,
) -> dict[str, float]:
    """Rank for every query all distinct answer texts by cosine, and score the rank of its own.

    Answer i is the right one for query i, and the only one. Candidates are texts: an answer that several
    queries share counts once. Ties count against the encoder: the rank is 1 + the candidates that score
    higher + the other candidates that score the same, so that a constant encoder ranks every answer last.

    Args:
        encode: the encoder to score, for queries and answers alike.
        queries: Q query texts.
        answers: Q answer texts.
        prefix: put before the name of each metric.
        max_scores: scores held at a time; the work is cut into chunks of queries accordingly.

    Returns:
        ``recall@1``, ``recall@10``, ``mrr`` (mean of 1 / rank, over all ranks) and ``ndcg@10``, each 0-1.

    Raises:
        DataError: nothing to rank, unequal lengths, or vectors that cannot be scored.
    """
    rank_Q = retrieval_ranks(encode, queries, answers, max_scores=max_scores)
    return {prefix + name: float(np.mean(earned(rank_Q))) for name, earned in METRICS.items()}


def retrieval_ranks(
    encode: Encode, queries: list[str], answers: list[str], *, max_scores: int = 2**24
) -> NDArray[np.int_]:
    """Return the rank ``[Q]``, from 1, of each query's own answer; see :func:`evaluate_retrieval`."""
    if len(queries) != len(answers):
        raise DataError(f"there are {len(queries)} queries for {len(answers)} answers", hint="Pair them")
    candidate = {text: i for i, text in enumerate(dict.fromkeys(answers))}
    if len(candidate) < 2:
        raise DataError(f"retrieval needs two distinct answers at least, and there are {len(candidate)}")
    z_ND = encode_checked(encode, [*candidate, *queries])
    right_Q = np.array([candidate[answer] for answer in answers])
    return _ranks(z_ND[len(candidate) :], z_ND[: len(candidate)], right_Q, max_scores=max_scores)


def _ranks(
    query_QD: FloatArray, answer_AD: FloatArray, right_Q: NDArray[np.int_], *, max_scores: int
) -> NDArray[np.int_]:
    chunk = max(1, max_scores // len(answer_AD))
    rank_Q = np.empty(len(query_QD), dtype=np.int_)
    for start in range(0, len(query_QD), chunk):
        rows = slice(start, start + chunk)
        score_CA = query_QD[rows] @ answer_AD.T
        own_C1 = np.take_along_axis(score_CA, right_Q[rows, None], axis=1)
        # The answer itself is among those counted: it is the 1 in "rank = 1 + better + equal others".
        rank_Q[rows] = np.count_nonzero(score_CA >= own_C1 - TIE_TOLERANCE, axis=1)
    return rank_Q


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
