"""A source cut into parts that are read by themselves; behind each other they are the whole, row for row."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import accumulate, pairwise

from hncse_ray.config import CorpusSettings
from hncse_ray.corpus.documents import reads_documents
from hncse_ray.corpus.hub import hub_rows
from hncse_ray.corpus.sources import WHOLE, Part, file_kind, find_files
from hncse_ray.reading import Span, UrlFile, ending_of, group_rows, line_spans

PART_BYTES = 2**25  # of a text
PART_ROWS = 2**18  # of a Parquet file, as far as its row groups have it


def parts_of(settings: CorpusSettings) -> list[Part]:
    """Return the parts of a source, in its order.

    Text is cut at ends of lines, Parquet between row groups, a hub's data set between its files. JSONL, CSV and TSV
    files, those in gzip, and those that a server gives as a whole only, are a part each. Documents, Python packages and
    code are one part: their rows depend on each other.

    Raises:
        DataError: a file or data set cannot be read.
    """
    if settings.source == "hub":
        shards = hub_rows(settings).num_shards
        return [Part(None, (number, shards)) for number in range(shards)]
    if settings.source in ("python-docs", "python-code", "memory") or reads_documents(settings):
        return [WHOLE]
    found = []
    for path in find_files(settings.path):
        kind = file_kind(path, settings)
        if isinstance(path, UrlFile) and not path.ranges:
            found.append(Part(path))
        elif kind == "parquet":
            found += [Part(path, span) for span in _row_spans(group_rows(path))]
        elif kind == "text" and not ending_of(path)[0]:
            found += [Part(path, span) for span in line_spans(path, PART_BYTES)]
        else:
            found.append(Part(path))
    return found


def _row_spans(sizes: list[int]) -> Iterator[Span]:
    """Yield spans of groups of rows that have ``PART_ROWS`` rows together, or one group more."""
    ends = [0, *accumulate(sizes)]
    cuts = [0]
    for group in range(1, len(ends)):
        if ends[group] - ends[cuts[-1]] >= PART_ROWS:
            cuts.append(group)
    if cuts[-1] < len(sizes) or len(cuts) == 1:
        cuts.append(len(sizes))
    yield from pairwise(cuts)
