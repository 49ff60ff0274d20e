"""Every source of a corpus as one stream of clean sentences, with a count of what was dropped and why."""

from __future__ import annotations

import contextlib
import csv
import difflib
import glob
import gzip
import hashlib
import json
import os
import sys
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from io import BufferedReader
from pathlib import Path
from typing import Any

from hncse_ray.config import CorpusSettings
from hncse_ray.corpus.hub import hub_is_reachable
from hncse_ray.corpus.python_docs import docstring_sentences, package_versions
from hncse_ray.corpus.text import normalise
from hncse_ray.errors import DataError

DROP_REASONS = ("undecodable", "too_long", "empty", "too_short", "duplicate")
_MAX_RECORD_BYTES = 16 * 2**20  # a line of jsonl or csv holds other columns too
_CHUNK = 2**16


def read_sentences(settings: CorpusSettings, counts: Counter[str]) -> Iterator[str]:
    """Yield the normalised sentences of a source that pass the settings' filters, duplicates included.

    Args:
        settings: the source and its filters.
        counts: gains ``read`` (all lines seen) and one of ``DROP_REASONS`` for each line dropped.

    Raises:
        DataError: a file, column, package or data set cannot be read.
    """
    for raw in _raw(settings, counts):
        counts["read"] += 1
        # Before normalisation, which would make a string of a gigabyte of spaces look short.
        if len(raw) > settings.max_chars:
            counts["too_long"] += 1
        elif "\0" in raw or not _encodable(raw):
            counts["undecodable"] += 1
        elif not (text := normalise(raw)):
            counts["empty"] += 1
        elif text.count(" ") + 1 < settings.min_words:
            counts["too_short"] += 1
        else:
            yield text


def source_identity(settings: CorpusSettings) -> str:
    """Return what the text of a source is, whatever it is called: a hash of contents or versions.

    Raises:
        DataError: a file, package or data set cannot be found.
    """
    if settings.source == "python-docs":
        return "python-docs " + " ".join(package_versions(settings.packages))
    if settings.source == "hub":
        return f"hub {settings.column} {_hub_identity(_load_hub(settings))}"
    digest = hashlib.sha256()
    for path in find_files(settings.path):
        with _explained(path), path.open("rb") as stream:
            digest.update(hashlib.file_digest(stream, "sha256").digest())
        digest.update(_kind(path).encode())
    column = "" if settings.source == "text" else settings.column
    return f"{settings.source} {column} {digest.hexdigest()}"


def read_lines(path: str | None) -> list[str]:
    """Return every line of a UTF-8 text, none dropped or changed, so that rows keep their place.

    Args:
        path: a text file, plain or .gz; None = standard input.

    Raises:
        DataError: the file cannot be read, or a line is not UTF-8.
    """
    where = path or "standard input"
    file = Path(path).expanduser() if path else None
    if file is not None:
        _check_file(file)
    lines = []
    with _explained(Path(where)), _open(file) if file else contextlib.nullcontext(sys.stdin.buffer) as stream:
        for number, line in enumerate(stream, start=1):
            try:
                lines.append(line.decode("utf-8-sig" if number == 1 else "utf-8").rstrip("\r\n"))
            except UnicodeDecodeError:
                raise DataError(f"line {number} is not UTF-8", where, "Convert it, for example with iconv") from None
    return lines


def find_files(patterns: Iterable[str]) -> list[Path]:
    """Expand paths and globs to files, in the order given, each pattern's own sorted.

    Raises:
        DataError: one does not exist, is a directory, is empty or cannot be read.
    """
    files: list[Path] = []
    for pattern in patterns:
        expanded = os.path.expanduser(pattern)
        # A file whose name holds a bracket is taken as it is.
        matches = [expanded] if os.path.lexists(expanded) else sorted(glob.glob(expanded, recursive=True))
        if any(sign in expanded for sign in "*?[") and not os.path.lexists(expanded):
            matches = [match for match in matches if os.path.isfile(match)]
            if not matches:
                raise DataError("matches no file", pattern, f"Paths are relative to {os.getcwd()}")
        files += [Path(match) for match in matches or [expanded]]
    for path in files:
        _check_file(path)
    return files


def _check_file(path: Path) -> None:
    if path.is_dir():
        raise DataError("is a directory, not a file", str(path), f"Name its files, such as {path}/*.txt")
    if not path.exists():
        raise DataError("no such file", str(path), f"Paths are relative to {os.getcwd()}")
    with _explained(path), path.open("rb") as stream:
        if not stream.read(1):
            raise DataError("is empty", str(path))


def _kind(path: Path) -> str:
    """What of a file's name changes how it is read."""
    suffixes = [suffix.lower() for suffix in path.suffixes[-2:]]
    return "".join(suffix for suffix in suffixes if suffix in {".gz", ".tsv"})


def _encodable(text: str) -> bool:
    """False for a lone surrogate: from JSON escapes, or a byte that was no UTF-8."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _raw(settings: CorpusSettings, counts: Counter[str]) -> Iterator[str]:
    if settings.source == "python-docs":
        yield from docstring_sentences(settings.packages, settings.num_processes)
        return
    if settings.source == "hub":
        yield from _hub_rows(settings, counts)
        return
    readers: dict[str, Callable[[Path, CorpusSettings, Counter[str]], Iterator[str]]] = {
        "text": _text_rows, "jsonl": _jsonl_rows, "csv": _csv_rows, "parquet": _parquet_rows,
    }  # fmt: skip
    for path in find_files(settings.path):
        with _explained(path):
            yield from readers[settings.source](path, settings, counts)


@contextlib.contextmanager
def _explained(path: Path) -> Iterator[None]:
    """Turn what goes wrong while a file is read into a DataError that names it."""
    try:
        yield
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise DataError(f"is not a whole gzip file ({error})", str(path), "Copy or download it again") from None
    except OSError as error:
        raise DataError(f"cannot be read ({error.strerror or error})", str(path)) from None


def _open(path: Path) -> gzip.GzipFile | BufferedReader:
    return gzip.open(path, "rb") if path.suffix.lower() == ".gz" else path.open("rb")


def _lines(path: Path, limit: int, counts: Counter[str]) -> Iterator[str]:
    """Yield decoded lines; drop and count those of more than `limit` bytes (never held whole) or no UTF-8."""
    with _open(path) as stream:
        first = True
        while line := stream.readline(limit + 2):
            if first and line.startswith(b"\xef\xbb\xbf"):
                line = line[3:]
            first = False
            if len(line) > limit and not line.endswith(b"\n"):
                rest = line
                while rest and not rest.endswith(b"\n"):
                    rest = stream.readline(_CHUNK)
                counts.update(read=1, too_long=1)
                continue
            try:
                yield line.decode("utf-8")
            except UnicodeDecodeError:
                counts.update(read=1, undecodable=1)


def _text_rows(path: Path, settings: CorpusSettings, counts: Counter[str]) -> Iterator[str]:
    for line in _lines(path, 4 * settings.max_chars, counts):
        yield line.rstrip("\r\n")


def _jsonl_rows(path: Path, settings: CorpusSettings, counts: Counter[str]) -> Iterator[str]:
    checked = False
    for line in _lines(path, _MAX_RECORD_BYTES + 8 * settings.max_chars, counts):
        if not line.strip():
            yield ""
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            row = None
        if not isinstance(row, dict):
            counts.update(read=1, undecodable=1)
            continue
        if not checked:
            _check_column(settings.column, list(row), str(path))
            checked = True
        yield from _cell(row.get(settings.column), counts)
    if not checked:
        raise DataError("holds no JSON objects, one a line", str(path), "Is corpus.source right?")


def _csv_rows(path: Path, settings: CorpusSettings, counts: Counter[str]) -> Iterator[str]:
    tabs = ".tsv" in _kind(path)
    csv.field_size_limit(max(csv.field_size_limit(), settings.max_chars))
    lines = _lines(path, _MAX_RECORD_BYTES + 8 * settings.max_chars, counts)
    reader = csv.reader(lines, delimiter="\t" if tabs else ",")
    column = -1
    while True:
        try:
            row = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            counts.update({"read": 1, "too_long" if "field limit" in str(error) else "undecodable": 1})
            continue
        if column < 0:
            _check_column(settings.column, row, str(path))
            column = row.index(settings.column)
        else:
            yield row[column] if column < len(row) else ""


def _parquet_rows(path: Path, settings: CorpusSettings, counts: Counter[str]) -> Iterator[str]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(path) as file:
            _check_column(settings.column, file.schema_arrow.names, str(path))
            for batch in file.iter_batches(batch_size=4096, columns=[settings.column]):
                for value in batch.column(0):
                    try:
                        cell = value.as_py()
                    except UnicodeDecodeError:
                        cell = b""
                    yield from _cell(cell, counts)
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError) as error:
        raise DataError(f"is not a readable Parquet file ({error})", str(path)) from None


def _cell(value: object, counts: Counter[str]) -> Iterator[str]:
    if value is None:
        yield ""
    elif isinstance(value, str):
        yield value
    else:
        counts.update(read=1, undecodable=1)


def _check_column(column: str, known: list[str], where: str) -> None:
    if column not in known:
        near = difflib.get_close_matches(column, known, n=1, cutoff=0.4)
        hint = f"Did you mean {near[0]!r}? " if near else ""
        raise DataError(f"has no column {column!r}", where, f"{hint}It has: {', '.join(map(str, known))}")


def _hub_rows(settings: CorpusSettings, counts: Counter[str]) -> Iterator[str]:
    rows = _load_hub(settings)
    _check_column(settings.column, list(rows.column_names), settings.path[0])
    for batch in rows.select_columns([settings.column]).iter(batch_size=1000):
        for value in batch[settings.column]:
            yield from _cell(value, counts)


def _load_hub(settings: CorpusSettings) -> Any:
    """Load a data set of the Hugging Face hub, from its cache where the hub is out of reach.

    Raises:
        DataError: it is neither in the cache nor to be fetched, or has no such subset or split.
    """
    import datasets
    import huggingface_hub.constants

    name = settings.path[0]
    online = os.path.exists(name) or hub_is_reachable()
    with contextlib.ExitStack() as stack:
        if not online:
            # Without this the clients retry for minutes before they look into the cache.
            stack.enter_context(_constant(huggingface_hub.constants, "HF_HUB_OFFLINE", True))
            stack.enter_context(_constant(datasets.config, "HF_HUB_OFFLINE", True))
        try:
            return datasets.load_dataset(name, settings.subset, split=settings.split)
        except Exception as error:  # the library raises a dozen kinds; all are about this data set
            reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
            if online:
                what, hint = (
                    f"cannot be loaded ({reason})",
                    "Check corpus.path, corpus.subset and corpus.split",
                )
            else:
                what = "is not in the local cache, and the Hugging Face hub cannot be reached"
                hint = (
                    "Use a local file (corpus.source=text corpus.path=FILE), the text that is already here"
                    " (corpus.source=python-docs), or set HF_HOME to a cache that holds the data set"
                )
            raise DataError(what, name, hint) from error


@contextlib.contextmanager
def _constant(module: Any, name: str, value: object) -> Iterator[None]:
    before = getattr(module, name)
    setattr(module, name, value)
    try:
        yield
    finally:
        setattr(module, name, before)


def _hub_identity(rows: Any) -> str:
    """Name the revision where the data set knows it (its download URLs hold it), else its fingerprint."""
    info = rows.info
    checksums = json.dumps(info.download_checksums, sort_keys=True, default=str) if info.download_checksums else ""
    what = [info.dataset_name, info.config_name, str(info.version), str(rows.split), str(len(rows))]
    return " ".join(map(str, what)) + " " + hashlib.sha256((checksums or rows._fingerprint).encode()).hexdigest()
