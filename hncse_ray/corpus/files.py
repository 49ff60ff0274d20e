"""The files of a prepared corpus: Arrow shards, what is known of every row as plain numbers, and a manifest of them.

A folder holds ``rows-00000.arrow`` and so on, each a stream of 2^20 rows (the last: what is left), and beside them for
each of ``NUMBERS`` that the corpus has one file of little-endian numbers, all rows behind each other. Whoever has
mapped a file of numbers reads any row's number without looking for its shard.
"""

from __future__ import annotations

import ctypes
import errno
import itertools
import json
import mmap
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import xxhash

from hncse_ray.errors import DataError

FORMAT_VERSION = 4  # 1: unique by text; 2: no passages; 3: one file, and no files of numbers
MANIFEST = "corpus.json"
SHARD_ROWS, BATCH_ROWS = 2**20, 2**14  # of a shard, and of a record batch in it, which is what is written at a time
NUMBERS = {"hash": "<i8", "target_hash": "<i8", "document": "<i8", "length": "<i4", "target_length": "<i4"}
DAMAGED = "Delete this folder and prepare the corpus again"

_TOKENS = pa.list_(pa.int32())
_READ_BYTES = 2**22


class Unreadable(DataError):
    """A corpus is there and cannot be read now; it may be whole."""


def damage(folder: Path, error: Exception, what: str = "") -> DataError:
    """Return the error of a corpus that cannot be opened: it is damaged, unless the system refuses to read it."""
    if isinstance(error, OSError) and error.errno not in (None, errno.ENOENT):  # Arrow's of what it reads have none
        hint = "Is it another user's, or has this process too many files open? See corpus.cache_dir"
        return Unreadable(f"cannot be read ({os.strerror(error.errno)})", str(folder), hint)
    return DataError(f"is a damaged corpus{what and ': '}{what} ({error})", str(folder), DAMAGED)


def row_schema(*, pairs: bool, negatives: bool, documents: bool, passages: bool) -> pa.Schema:
    """Return the columns of rows as they are handed to :func:`write_shard`."""
    columns: dict[str, pa.DataType] = {"text": pa.string(), "hash": pa.int64(), "input_ids": _TOKENS}
    if pairs:
        columns |= {"positive": pa.string(), "positive_ids": _TOKENS, "target_hash": pa.int64()}
    if negatives:
        columns |= {"negative_ids": pa.list_(_TOKENS), "negative_hashes": pa.list_(pa.int64())}
    if documents:
        columns["document"] = pa.int64()
    if passages:
        columns |= {"title": pa.string(), "body": pa.string()}
    return pa.schema(columns)


@dataclass(frozen=True)
class ShardFacts:
    """One line of a manifest.

    Attributes:
        rows: of the shard.
        bytes: of its Arrow file.
        digest: XXH3, 128 bits, of that file and of the shard's part of each file of numbers.
        batches: where its record batches begin in the file, so that one is opened without a look at the others.
        tokens: of all its rows.
        without_positive: rows without a positive.
    """

    rows: int
    bytes: int
    digest: str
    batches: tuple[int, ...]
    tokens: int
    without_positive: int


def shard_name(number: int) -> str:
    """Return what a shard's Arrow file is called."""
    return f"rows-{number:05d}.arrow"


def numbers_name(name: str) -> str:
    """Return what the file of one of ``NUMBERS`` is called."""
    return f"{name}.{NUMBERS[name][1:]}"


def record_batches(rows: Iterator[tuple[Any, ...]], schema: pa.Schema) -> Iterator[pa.RecordBatch]:
    """Yield rows, a value for each column of :func:`row_schema`, as batches for :func:`write_shards`."""
    while batch := list(itertools.islice(rows, BATCH_ROWS)):
        columns = [
            pa.array(values, type=field.type) for values, field in zip(zip(*batch, strict=True), schema, strict=True)
        ]
        yield pa.record_batch(columns, schema=schema)


def write_shards(folder: Path, batches: Iterator[pa.RecordBatch], schema: pa.Schema) -> Iterator[ShardFacts]:
    """Write all rows of a corpus; see :func:`write_shard`."""
    for number in itertools.count():
        own = itertools.islice(batches, SHARD_ROWS // BATCH_ROWS)
        if (first := next(own, None)) is None:
            return
        yield write_shard(folder, number, itertools.chain([first], own), schema)


def write_shard(folder: Path, number: int, batches: Iterable[pa.RecordBatch], schema: pa.Schema) -> ShardFacts:
    """Write a shard, and its part of the files of numbers; several processes may write different ones at once.

    Args:
        folder: of the corpus.
        number: of the shard.
        batches: of ``BATCH_ROWS`` rows of :func:`row_schema` each, but for the last.
        schema: theirs.
    """
    own = pa.schema([field for field in schema if field.name not in NUMBERS])
    found: dict[str, list[npt.NDArray[np.integer]]] = {}
    path = folder / shard_name(number)
    starts, without_positive = [], 0
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_stream(sink, own) as writer:
        for batch in batches:
            starts.append(sink.tell() or own.serialize().size)  # the schema is written with the first
            writer.write_batch(batch.select(own.names))
            for name, numbers in _numbers_of(batch).items():
                found.setdefault(name, []).append(numbers)
            without_positive += batch["positive"].null_count if "positive" in own.names else 0
    whole = {name: np.concatenate(parts).astype(NUMBERS[name], copy=False) for name, parts in found.items()}
    for name, numbers in whole.items():
        _write_at(folder / numbers_name(name), numbers, number * SHARD_ROWS)
    rows, tokens = len(whole["length"]), int(whole["length"].sum(dtype=np.int64))
    return ShardFacts(rows, path.stat().st_size, _digest(path, whole), tuple(starts), tokens, without_positive)


def _digest(path: Path, numbers: dict[str, npt.NDArray[np.integer]]) -> str:
    """Return the digest of a shard's Arrow file and its numbers; see :class:`ShardFacts`."""
    digest = xxhash.xxh3_128()
    with path.open("rb") as stream:
        while part := stream.read(_READ_BYTES):
            digest.update(part)
    for name in NUMBERS:
        if name in numbers:
            digest.update(numbers[name].tobytes())
    return digest.hexdigest()


def _numbers_of(batch: pa.RecordBatch) -> dict[str, npt.NDArray[np.integer]]:
    found = {name: batch[name].to_numpy() for name in NUMBERS if name in batch.schema.names}
    found["length"] = _lengths(batch["input_ids"])
    if "positive_ids" in batch.schema.names:
        positives = _lengths(batch["positive_ids"])
        found["target_length"] = np.where(positives > 0, positives, found["length"])
    return found


def _lengths(rows: pa.ListArray) -> npt.NDArray[np.integer]:
    lengths: npt.NDArray[np.integer] = pc.fill_null(pc.list_value_length(rows), 0).to_numpy()
    return lengths


def _write_at(path: Path, numbers: npt.NDArray[np.integer], first: int) -> None:
    # Opened without being cut: other shards may have their numbers there.
    with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT, 0o666), "wb") as stream:
        stream.seek(first * numbers.itemsize)
        stream.write(numbers.tobytes())


def write_manifest(folder: Path, schema: pa.Schema, shards: Iterable[ShardFacts], facts: dict[str, Any]) -> None:
    """Write the manifest, the last file of a corpus: what is in ``facts``, and how to open the others."""
    shards = list(shards)
    facts = facts | {"format": FORMAT_VERSION, "columns": schema.names}
    facts |= {"shard_rows": SHARD_ROWS, "batch_rows": BATCH_ROWS, "shards": [asdict(shard) for shard in shards]}
    (folder / MANIFEST).write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")


@dataclass(frozen=True)
class Manifest:
    """What a corpus folder says of itself.

    Attributes:
        folder: of the corpus.
        columns: of :func:`row_schema`.
        shard_rows: of every shard but the last.
        batch_rows: of every record batch but a shard's last.
        shards: theirs.
        facts: all of it.
        scattered: whether rows are asked for here and there, so that nothing is to be read around them.
    """

    folder: Path
    columns: tuple[str, ...]
    shard_rows: int
    batch_rows: int
    shards: tuple[ShardFacts, ...]
    facts: dict[str, Any]
    scattered: bool = False

    @classmethod
    def read(cls, folder: Path) -> Manifest:
        """Read it, and see that every file is there and as long as it says.

        Raises:
            DataError: the folder holds no corpus, one of another format, or a damaged one.
        """
        path = folder / MANIFEST
        try:
            if not path.is_file():
                raise DataError("holds no prepared corpus", str(folder), "Run `hncse prepare`")
            facts = json.loads(path.read_text(encoding="utf-8"))
            if facts["format"] != FORMAT_VERSION:
                raise DataError(f"has format {facts['format']}, not {FORMAT_VERSION}", str(folder), DAMAGED)
            shards = tuple(ShardFacts(**shard) for shard in facts["shards"])
            found = cls(folder, tuple(facts["columns"]), facts["shard_rows"], facts["batch_rows"], shards, facts)
            if not found.rows == facts["rows"] > 0:
                raise ValueError(f"shards of {found.rows} rows where rows = {facts['rows']}")
            found._check_sizes()
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise damage(folder, error, MANIFEST) from None
        return found

    @property
    def rows(self) -> int:
        """Rows of the corpus."""
        return sum(shard.rows for shard in self.shards)

    @property
    def numbers(self) -> tuple[str, ...]:
        """Those of ``NUMBERS`` that the corpus has."""
        lengths = {"length": "input_ids", "target_length": "positive_ids"}
        return tuple(name for name in NUMBERS if lengths.get(name, name) in self.columns)

    def map_numbers(self, name: str) -> npt.NDArray[Any]:
        """Map a file of numbers, `[N]`."""
        return np.frombuffer(self.map_file(numbers_name(name)), NUMBERS[name], self.rows)

    def map_file(self, name: str) -> pa.Buffer:
        """Map a file of the folder. It takes no descriptor: a large corpus has thousands of shards."""
        with pa.memory_map(str(self.folder / name)) as file:
            start = file.read_buffer(1)  # keeps it mapped; of what is read so, Arrow has megabytes read ahead
            content = pa.foreign_buffer(start.address, file.size(), base=start)
        if self.scattered:
            ctypes.CDLL(None).madvise(ctypes.c_void_p(start.address), ctypes.c_size_t(content.size), mmap.MADV_RANDOM)
        return content

    def check_digest(self, number: int) -> None:
        """Read a shard, and its part of the files of numbers, and see that they are what was written.

        Raises:
            DataError: they are not, or cannot be read.
        """
        start = number * self.shard_rows
        numbers = {name: self.map_numbers(name)[start : start + self.shards[number].rows] for name in self.numbers}
        try:
            whole = _digest(self.folder / shard_name(number), numbers) == self.shards[number].digest
        except OSError as error:
            raise damage(self.folder, error) from None
        if not whole:
            files = " or ".join([shard_name(number), *map(numbers_name, self.numbers)])
            what = f"is a damaged corpus: rows {start:,} to {start + self.shards[number].rows - 1:,} in {files}"
            raise DataError(f"{what} are not what was written", str(self.folder), DAMAGED)

    def _check_sizes(self) -> None:
        sizes = {shard_name(n): shard.bytes for n, shard in enumerate(self.shards)}
        sizes |= {numbers_name(name): np.dtype(NUMBERS[name]).itemsize * self.rows for name in self.numbers}
        for name, size in sizes.items():
            file = self.folder / name
            if not file.is_file():
                raise DataError(f"is a damaged corpus: {name} is missing", str(self.folder), DAMAGED)
            if (found := file.stat().st_size) != size:
                what = f"is a damaged corpus: {name} has {found:,} bytes, not {size:,}"
                raise DataError(what, str(self.folder), DAMAGED)


class Chunk:
    """A record batch of a mapped shard; columns are opened when they are first asked for."""

    def __init__(self, batch: pa.RecordBatch) -> None:
        self._batch = batch
        self._texts: dict[str, pa.StringArray] = {}
        self._rows: dict[str, Ragged] = {}

    def text(self, column: str, row: int) -> str | None:
        """Return a text."""
        if column not in self._texts:
            self._texts[column] = self._batch[column]
        found: str | None = self._texts[column][row].as_py()
        return found

    def rows(self, column: str) -> Ragged:
        """Return a column of lists."""
        if column not in self._rows:
            self._rows[column] = Ragged(self._batch[column])
        return self._rows[column]


class Ragged:
    """The rows of one chunk: views of the mapped file, no copies. A row that is null is empty."""

    def __init__(self, lists: pa.ListArray) -> None:
        self._offsets: npt.NDArray[np.int32] = lists.offsets.to_numpy()
        self._inner = Ragged(lists.values) if pa.types.is_list(lists.values.type) else None
        self._values: npt.NDArray[Any] = np.zeros(0) if self._inner else lists.values.to_numpy()

    def __getitem__(self, row: int) -> npt.NDArray[Any]:
        """Return the numbers of a row."""
        return self._values[self._offsets[row] : self._offsets[row + 1]]

    def lists(self, row: int) -> list[npt.NDArray[Any]]:
        """Return the lists of a row of lists."""
        assert self._inner is not None
        return [self._inner[i] for i in range(self._offsets[row], self._offsets[row + 1])]


class Shard:
    """A mapped shard, whose record batches are opened when a row of them is asked for.

    Raises:
        DataError: it is not what the manifest says.
    """

    def __init__(self, manifest: Manifest, number: int) -> None:
        """Map it."""
        self._manifest, self.facts = manifest, manifest.shards[number]
        self.name = shard_name(number)
        self._chunks: dict[int, Chunk] = {}
        with self._explained():
            self._bytes = manifest.map_file(self.name)
            self._schema = pa.ipc.read_schema(self._bytes)
            if self._schema.names != [name for name in manifest.columns if name not in NUMBERS]:
                raise ValueError(f"its columns are {', '.join(self._schema.names)}")

    def chunk(self, number: int) -> Chunk:
        """Return one of its record batches."""
        if (found := self._chunks.get(number)) is None:
            with self._explained():
                message = pa.ipc.read_message(self._bytes[self.facts.batches[number] :])
                batch = pa.ipc.read_record_batch(message, self._schema)
                expected = min(self._manifest.batch_rows, self.facts.rows - number * self._manifest.batch_rows)
                if batch.num_rows != expected:
                    raise ValueError(f"{batch.num_rows} rows where {MANIFEST} says {expected}")
            found = self._chunks[number] = Chunk(batch)
        return found

    @contextmanager
    def _explained(self) -> Iterator[None]:
        try:
            yield
        except (OSError, ValueError, IndexError, pa.ArrowException) as error:
            raise damage(self._manifest.folder, error, f"{self.name} cannot be read") from None
