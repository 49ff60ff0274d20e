"""A corpus prepared in pieces, by any number of processes that see one folder: the same files as one process writes.

1. Each part of the source is read as chunks of examples, each chunk tokenised and written as a *run*: its rows, and
   what they are unique by, sorted (:func:`read_chunks`, :func:`write_run`).
2. Rows are numbered run after run. For each range of keys the rows that came before are found, which needs no more
   than that range of each run (:func:`write_dropped`).
3. By what each run lost it is known where in the corpus the rest of it goes, so shards are written side by side
   (:class:`Layout`, :func:`write_laid_out`).

Every piece can be made again: a file takes its name when it is whole. Who makes them is for :class:`Workers` to say.
"""

from __future__ import annotations

import itertools
import shutil
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from hncse_ray.corpus import files
from hncse_ray.corpus.files import ShardFacts, record_batches, write_shard
from hncse_ray.corpus.parts import parts_of
from hncse_ray.corpus.prepare import Job, Tell
from hncse_ray.corpus.rows import Row, RowMaker
from hncse_ray.corpus.sampling import sample
from hncse_ray.corpus.sources import Example, Part, check_filled, read_part
from hncse_ray.storage import replacing

Int64 = npt.NDArray[np.int64]

CHUNK_ROWS = 2**14  # examples of a chunk
RANGE_ROWS = 2**23  # rows of a range of keys, each of which takes some 50 bytes while it is looked through
_KEY = np.dtype([("key", "<i8"), ("row", "<i4")])


@dataclass(frozen=True)
class Chunk:
    """Examples that are tokenised together.

    Attributes:
        part: the number of the part that they are from.
        number: of the chunk in its part.
        examples: in the order of the source.
        counts: what was read and dropped since the chunk before.
        filled: the columns in which there was something.
    """

    part: int
    number: int
    examples: list[Example]
    counts: Counter[str]
    filled: frozenset[tuple[str, str]]


@dataclass(frozen=True, order=True)
class Run:
    """The rows of a chunk, on disk. Runs sort as the source has them.

    Attributes:
        part: as of the chunk.
        number: as of the chunk.
        rows: those that have a token of their own.
        counts: what was read and dropped, with those that have none.
        filled: as of the chunk.
    """

    part: int
    number: int
    rows: int = field(compare=False)
    counts: Counter[str] = field(compare=False)
    filled: frozenset[tuple[str, str]] = field(compare=False)

    @property
    def name(self) -> str:
        """What its files are called, but for the ending."""
        return f"run-{self.part:06d}-{self.number:06d}"


class Workers(Protocol):
    """Who makes the pieces: each call once for every piece, in any order, side by side."""

    def write_runs(self, folder: Path, job: Job, parts: Sequence[Part]) -> Iterator[Run]:
        """Call :func:`read_chunks` for every part and :func:`write_run` for every chunk; yield runs as they come."""
        ...

    def write_dropped(self, folder: Path, runs: Sequence[Run], ranges: int) -> list[int]:
        """Call :func:`write_dropped` for every range of keys; return what it returned, in their order."""
        ...

    def write_shards(self, folder: Path, layout: Layout, schema: pa.Schema) -> list[ShardFacts]:
        """Call :func:`write_laid_out` for every shard; return what it returned, in their order."""
        ...


def write_in_pieces(folder: Path, job: Job, counts: Counter[str], tell: Tell, *, workers: Workers) -> list[ShardFacts]:
    """Write the rows of a corpus as one process would; see :class:`~hncse_ray.corpus.prepare.WriteRows`.

    Beside what the corpus takes, the runs take as much again until it is written.

    Raises:
        DataError: the source cannot be read, or a column has nothing in any row.
    """
    pieces = folder / "pieces"
    pieces.mkdir()
    runs: list[Run] = []
    rows = 0
    for run in workers.write_runs(pieces, job, parts_of(job.settings)):
        runs.append(run)
        counts.update(run.counts)
        rows += run.rows
        tell(rows)
    runs.sort()
    check_filled(job.settings, set().union(*(run.filled for run in runs)))
    dropped = workers.write_dropped(pieces, runs, key_ranges(rows))
    if sum(dropped):
        counts["duplicate"] = sum(dropped)
    layout = lay_out(pieces, job, runs, dropped, counts)
    shards = workers.write_shards(folder, layout, job.schema)
    shutil.rmtree(pieces)
    return shards


def read_chunks(job: Job, number: int, part: Part) -> Iterator[Chunk]:
    """Yield the examples of a part; the last chunk may be empty, and has the counts of what was read behind it.

    Raises:
        DataError: it cannot be read.
    """
    counts: Counter[str] = Counter()
    filled: set[tuple[str, str]] = set()
    examples = read_part(job.settings, part, counts, filled)
    for chunk in itertools.count():
        batch = list(itertools.islice(examples, CHUNK_ROWS))
        yield Chunk(number, chunk, batch, counts.copy(), frozenset(filled))
        counts.clear()
        if len(batch) < CHUNK_ROWS:
            return


def write_run(folder: Path, chunk: Chunk, make: RowMaker, schema: pa.Schema) -> Run:
    """Tokenise a chunk, and write its rows and their keys.

    Raises:
        StorageError: the folder is not there, or cannot be written.
    """
    counts = chunk.counts.copy()
    keyed = list(make(chunk.examples, counts))
    run = Run(chunk.part, chunk.number, len(keyed), counts, chunk.filled)
    keys = np.array([(key, row) for row, (key, _) in enumerate(keyed)], dtype=_KEY)
    keys.sort(order=("key", "row"))
    with _replacing(folder / f"{run.name}.arrow") as path, pa.OSFile(str(path), "wb") as sink:
        with pa.ipc.new_stream(sink, schema) as writer:
            for batch in record_batches((row for _, row in keyed), schema):
                writer.write_batch(batch)
    with _replacing(folder / f"{run.name}.keys") as path:
        keys.tofile(path)
    return run


def _replacing(path: Path) -> AbstractContextManager[Path]:
    return replacing(path, "Is the disk full? See corpus.cache_dir")


def key_ranges(rows: int) -> int:
    """Return into how many ranges the keys of so many rows are parted."""
    return max(1, -(-rows // RANGE_ROWS))


def write_dropped(folder: Path, runs: Sequence[Run], number: int, ranges: int) -> int:
    """Find the rows of a range of keys whose key comes before, write their numbers, sorted, and count them.

    Args:
        folder: of the runs.
        runs: all of them, in their order.
        number: of the range.
        ranges: how many there are.
    """
    low, high = (-(2**63) + (2**64 * bound) // ranges for bound in (number, number + 1))
    keys, numbers, first = [np.zeros(0, "<i8")], [np.zeros(0, "<i8")], 0
    for run in runs:
        if run.rows:
            own = np.memmap(folder / f"{run.name}.keys", _KEY, "r", shape=(run.rows,))
            start = np.searchsorted(own["key"], low) if number else 0
            stop = np.searchsorted(own["key"], high) if number + 1 < ranges else run.rows
            keys.append(np.array(own["key"][start:stop]))
            numbers.append(first + own["row"][start:stop].astype(np.int64))
        first += run.rows
    all_keys, all_numbers = np.concatenate(keys), np.concatenate(numbers)
    # Stable: of equal keys those that came first stand first.
    order = np.argsort(all_keys, kind="stable")
    again = np.flatnonzero(np.diff(all_keys[order]) == 0) + 1
    dropped = np.sort(all_numbers[order[again]])
    with _replacing(_dropped_path(folder, number)) as path:
        dropped.tofile(path)
    return len(dropped)


def _dropped_path(folder: Path, number: int) -> Path:
    return folder / f"dropped-{number:05d}.i8"


class _Dropped:
    """The numbers of all dropped rows, on disk."""

    def __init__(self, folder: Path, sizes: Sequence[int]) -> None:
        self._files: list[Int64] = [
            np.asarray(np.memmap(_dropped_path(folder, number), "<i8", "r", shape=(size,)))
            for number, size in enumerate(sizes)
            if size
        ]

    def within(self, bounds: Int64) -> Int64:
        """Return how many are between each two neighbouring bounds."""
        found = np.zeros(len(bounds) - 1, dtype=np.int64)
        for numbers in self._files:
            found += np.diff(np.searchsorted(numbers, bounds))
        return found

    def kept(self, start: int, stop: int) -> Int64:
        """Return the rows from one number up to another that are not dropped, as positions behind the first."""
        mask = np.ones(stop - start, dtype=bool)
        for numbers in self._files:
            first, last = np.searchsorted(numbers, [start, stop])
            mask[numbers[first:last] - start] = False
        return np.flatnonzero(mask)


@dataclass(frozen=True)
class Layout:
    """Where the rows of runs go. It is small, and goes to all who write shards.

    Attributes:
        folder: of the runs.
        runs: those with rows, in their order.
        dropped: how many are dropped in each range of keys.
        firsts: the number of each run's first row, and behind the last `[R + 1]`.
        positions: the position of each run's first unique row among all unique ones, and behind the last `[R + 1]`.
        rows: of the corpus.
        sampled: whether these are a sample of the unique rows, whose positions are in a file.
    """

    folder: Path
    runs: tuple[Run, ...]
    dropped: tuple[int, ...]
    firsts: Int64
    positions: Int64
    rows: int
    sampled: bool = False

    @property
    def shards(self) -> int:
        """How many there are to write."""
        return -(-self.rows // files.SHARD_ROWS)


def lay_out(folder: Path, job: Job, runs: Sequence[Run], dropped: Sequence[int], counts: Counter[str]) -> Layout:
    """Say where the rows of all runs go, and draw the sample where one is asked for.

    Args:
        folder: of the runs.
        job: whose they are.
        runs: all of them.
        dropped: what :func:`write_dropped` returned for each range of keys.
        counts: gains what is not sampled.
    """
    runs = tuple(run for run in runs if run.rows)
    firsts = np.cumsum([0, *(run.rows for run in runs)], dtype=np.int64)
    positions = np.concatenate([[0], np.cumsum(np.diff(firsts) - _Dropped(folder, dropped).within(firsts))])
    layout = Layout(folder, runs, tuple(dropped), firsts, positions, int(positions[-1]))
    size = job.settings.max_sentences
    if size is None:
        return layout
    numbered: Iterable[Row] = ((position,) for position in range(layout.rows))
    if (column := job.document_column) is not None:
        documents = (batch.column(column).to_pylist() for batch in _unique_batches(layout, 0, layout.rows))
        numbered = zip(range(layout.rows), itertools.chain.from_iterable(documents), strict=True)
    chosen = sample(numbered, size, job.seed, counts, None if column is None else 1)
    positions_chosen = np.fromiter((row[0] for row in chosen), dtype="<i8")
    with _replacing(folder / "sample.i8") as path:
        positions_chosen.tofile(path)
    return Layout(folder, runs, tuple(dropped), firsts, positions, len(positions_chosen), sampled=True)


def write_laid_out(folder: Path, layout: Layout, schema: pa.Schema, shard: int) -> ShardFacts:
    """Write a shard of the corpus.

    Args:
        folder: of the corpus.
        layout: of its rows.
        schema: theirs.
        shard: the number of the shard.
    """
    first, last = shard * files.SHARD_ROWS, min((shard + 1) * files.SHARD_ROWS, layout.rows)
    chosen: Int64 | None = None
    if layout.sampled:
        every = np.memmap(layout.folder / "sample.i8", "<i8", "r", shape=(layout.rows,))
        chosen = np.asarray(every[first:last])
        first, last = int(chosen[0]), int(chosen[-1]) + 1
    # By way of Python's values, as one process comes to them, so that the files are the same bytes.
    rows = itertools.chain.from_iterable(map(_rows, _unique_batches(layout, first, last, chosen)))
    return write_shard(folder, shard, record_batches(rows, schema), schema)


def _unique_batches(layout: Layout, first: int, last: int, chosen: Int64 | None = None) -> Iterator[pa.RecordBatch]:
    """Yield the unique rows from one position up to another, or those chosen of them, run by run."""
    dropped = _Dropped(layout.folder, layout.dropped)
    run = int(np.searchsorted(layout.positions, first, side="right")) - 1
    while run < len(layout.runs) and layout.positions[run] < last:
        here, behind = int(layout.positions[run]), int(layout.positions[run + 1])
        if chosen is None:
            wanted = np.arange(max(first, here), min(last, behind))
        else:
            wanted = chosen[slice(*np.searchsorted(chosen, [here, behind]))]
        if len(wanted):
            kept = dropped.kept(int(layout.firsts[run]), int(layout.firsts[run + 1]))[wanted - here]
            with pa.memory_map(str(layout.folder / f"{layout.runs[run].name}.arrow")) as file:
                table = pa.ipc.open_stream(file).read_all()
            yield from table.take(pa.array(kept)).combine_chunks().to_batches()
        run += 1


def _rows(batch: pa.RecordBatch) -> Iterator[Row]:
    return zip(*(_values(column) for column in batch.columns), strict=True)


def _values(column: pa.Array) -> list[Any]:
    """Return a column as :class:`RowMaker` has its values: lists of tokens as arrays, and None where there is none."""
    if not pa.types.is_list(column.type) or pa.types.is_list(column.type.value_type):
        found: list[Any] = column.to_pylist()
        return found
    offsets, values = column.offsets.to_numpy(), column.values.to_numpy()
    lists = [values[start:stop] for start, stop in itertools.pairwise(offsets.tolist())]
    if column.null_count:
        return [own if there else None for own, there in zip(lists, column.is_valid().to_pylist(), strict=True)]
    return lists
