"""A score without labels: does a sentence find the document that it was taken out of?

The documents of the corpus are both the questions and what is searched, as in the inverse cloze task (Lee et al. 2019,
arXiv 1906.00300), so no pair has to be judged by anyone. What is asked about must not be trained on.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import zip_longest

import numpy as np
from numpy.typing import NDArray

from hncse_ray.config import RETRIEVAL_METRICS
from hncse_ray.errors import DataError, counted
from hncse_ray.evaluation.retrieval import RetrievalSet

Int64 = NDArray[np.int64]
TextsOf = Callable[[Int64], list[str]]

HELD_OUT_SHARE = 0.2  # of all rows, at the most
_FEWEST = 10  # queries: fewer say nothing
_LOOKED_AT = 4096  # rows at a time
_SHORTEST = 20  # characters of a sentence that asks, and of what it leaves behind
_DRAW, _OTHERS = 1, 2  # streams of random numbers beside those of the run


@dataclass(frozen=True)
class Gaps:
    """Which documents are held out, and the sentences that are taken out of some of their rows.

    Attributes:
        rows: all rows of the documents, in rising order.
        sentences: what is taken out, by row.
    """

    rows: Int64
    sentences: dict[int, str]


def draw_gaps(
    documents_N: Int64,
    bodies: TextsOf,
    split: Callable[[str], list[str]],
    *,
    order: Callable[[Int64], Int64],
    count: int,
    seed: int,
    where: str,
) -> Gaps:
    """Hold documents out at random, whole ones, until ``count`` sentences ask or a fifth of the rows is used up.

    Every document has one sentence that asks; where so few can be held out that this is not ``count``, they have more,
    of different rows.

    Args:
        documents_N: the document of each row; the rows of one stand together.
        bodies: texts of rows, without titles.
        split: a text into sentences.
        order: which rows are at these positions of a random order of all.
        count: sentences.
        seed: of the draw; the same on every machine.
        where: names the corpus in errors.

    Raises:
        DataError: too few documents have a sentence and something beside it.
    """
    rng = np.random.default_rng([seed, _DRAW])
    most_rows = int(HELD_OUT_SHARE * len(documents_N))
    held: list[Int64] = []
    found: list[list[tuple[int, str]]] = []
    for rows in _documents(documents_N, order):
        if sum(map(len, held)) + len(rows) > most_rows:
            continue
        own = rng.permutation(rows)[:count]
        drawn = [(int(row), _draw_sentence(body, split, rng)) for row, body in zip(own, bodies(own), strict=True)]
        if asking := [(row, sentence) for row, sentence in drawn if sentence]:
            held.append(rows)
            found.append(asking)
        if len(held) == count:
            break
    turns = (gap for turn in zip_longest(*found) for gap in turn if gap is not None)
    sentences = dict(gap for gap, _ in zip(turns, range(count), strict=False))
    if len(sentences) < _FEWEST:
        raise DataError(
            f"only {counted(len(sentences), 'sentence')} can ask for the document that they are of, and a score"
            f" without labels needs {_FEWEST}: from documents of two sentences and more, and of a fifth of the corpus",
            where,
            "Give more documents, or set evaluation.suites",
        )
    return Gaps(np.sort(np.concatenate(held)), sentences)


def cloze_set(texts: TextsOf, gaps: Gaps, *, rows: int, most_candidates: int, seed: int) -> RetrievalSet:
    """Return the set in which every sentence searches the corpus for the row that it was taken out of.

    The candidates are all rows; of a larger corpus the rows that are asked for and others at random. A sentence that
    stands in another candidate too, or is not in the text that is searched, asks nothing.

    Args:
        texts: of rows, as they are searched.
        gaps: of :func:`draw_gaps`.
        rows: of the corpus.
        most_candidates: how many rows are searched.
        seed: of the choice of them.
    """
    candidates = draw_candidates(gaps, rows=rows, most=most_candidates, seed=seed)
    found, place = texts(candidates), {int(row): i for i, row in enumerate(candidates)}
    asking: list[tuple[int, str]] = []
    for row, sentence in gaps.sentences.items():
        before, taken, after = found[place[row]].rpartition(sentence)  # the last: a title may begin with the same words
        if taken:
            found[place[row]] = f"{before.rstrip()} {after.lstrip()}".strip()
            asking.append((row, sentence))
    everything = "\n".join(found)
    asking = [(row, sentence) for row, sentence in asking if sentence not in everything]
    return RetrievalSet(
        queries=tuple(sentence for _, sentence in asking),
        candidates=tuple(found),
        grades=tuple({place[row]: 1} for row, _ in asking),
        metrics=RETRIEVAL_METRICS,
    )


def draw_candidates(gaps: Gaps, *, rows: int, most: int, seed: int) -> Int64:
    """Return the rows that are searched: all, or those that are asked about and others, ``most`` together."""
    asked = np.sort(np.fromiter(gaps.sentences, np.int64))
    drawn = np.random.default_rng([seed, _OTHERS]).choice(rows, min(rows, most), replace=False)
    others = drawn[~np.isin(drawn, asked)][: max(0, most - len(asked))]
    return np.sort(np.concatenate([asked, others]))


def _documents(documents_N: Int64, order: Callable[[Int64], Int64]) -> Iterator[Int64]:
    """Yield the rows of each document, one document after the other by where their first rows are in an order."""
    for place in range(0, len(documents_N), _LOOKED_AT):
        rows = order(np.arange(place, min(place + _LOOKED_AT, len(documents_N))))
        begins = (rows == 0) | (documents_N[rows - 1] != documents_N[rows])
        for first in rows[begins].tolist():
            behind = first + 1
            while behind < len(documents_N) and documents_N[behind] == documents_N[first]:
                behind += 1
            yield np.arange(first, behind)


def _draw_sentence(body: str, split: Callable[[str], list[str]], rng: np.random.Generator) -> str:
    """Draw one of the sentences that are long enough and leave enough behind; empty if there is none."""
    fits: Sequence[str] = [s for s in split(body) if len(s) >= _SHORTEST and len(body) - len(s) >= _SHORTEST]
    return fits[int(rng.integers(len(fits)))] if fits else ""
