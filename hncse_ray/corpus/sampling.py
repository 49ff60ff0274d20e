"""A random sample of rows that come one by one, of a size that is known."""

from __future__ import annotations

import heapq
import itertools
import random
from collections import Counter
from collections.abc import Iterable, Iterator

from hncse_ray.corpus.rows import Row


def sample(
    rows: Iterable[Row], size: int, seed: int, counts: Counter[str], by_document: int | None = None
) -> Iterator[Row]:
    """Yield a uniform random sample in the order of the source: of rows, or of documents by that column."""
    rng = random.Random(seed)
    if by_document is not None:
        return _sample_documents(rows, size, rng, counts, by_document)
    return _sample_rows(rows, size, rng, counts)


def _sample_rows(rows: Iterable[Row], size: int, rng: random.Random, counts: Counter[str]) -> Iterator[Row]:
    """Vitter's algorithm R."""
    kept: list[tuple[int, Row]] = []
    for i, row in enumerate(rows):
        if i < size:
            kept.append((i, row))
            continue
        counts["not_sampled"] += 1
        if (slot := rng.randrange(i + 1)) < size:
            kept[slot] = (i, row)
    yield from (row for _, row in sorted(kept, key=lambda entry: entry[0]))


def _sample_documents(
    rows: Iterable[Row], size: int, rng: random.Random, counts: Counter[str], column: int
) -> Iterator[Row]:
    """Whole documents, as many as it takes; the last one is cut, so that there are as many rows as asked for."""
    kept: list[tuple[float, int, list[Row]]] = []  # the document that is drawn last first
    held = 0
    for i, (_, group) in enumerate(itertools.groupby(rows, key=lambda row: row[column])):
        document = list(group)
        heapq.heappush(kept, (-rng.random(), i, document))
        held += len(document)
        while held - len(kept[0][2]) >= size:
            gone = len(heapq.heappop(kept)[2])
            held -= gone
            counts["not_sampled"] += gone
    if held > size:
        document = kept[0][2]
        counts["not_sampled"] += held - size
        del document[len(document) - (held - size) :]
    yield from (row for _, _, document in sorted(kept, key=lambda entry: entry[1]) for row in document)
