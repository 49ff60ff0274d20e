"""One reader for tables: CSV, TSV, JSONL and Parquet, by the same rules for corpora, pairs and collections.

- CSV: quotes enclose; one that is never closed is an error that names its line, for what follows cannot be told apart.
- TSV: quotes are text, and a record is a line.
- A record that is broken in itself is its own fault alone: whoever reads drops and counts it, or refuses the file.
"""

from __future__ import annotations

import csv
import difflib
import json
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from hncse_ray.errors import DataError
from hncse_ray.reading.kinds import Kind, check_file, kind_of
from hncse_ray.reading.lines import Span, explained, is_blank, is_unicode, text_lines
from hncse_ray.reading.urls import File

MAX_RECORD = 16 * 2**20
"""Characters of a line of a table: it holds other columns too. A field of CSV is bounded by it as well."""


@dataclass(frozen=True, slots=True)
class Record:
    """One record of a table.

    Attributes:
        number: the line it begins at, or the row of Parquet, from 1.
        cells: the values of the columns asked for, in their order; None where there is none.
        fault: why it cannot be used: ``undecodable``, ``malformed`` or ``too_long``; ``blank`` for an empty line;
            else empty. With a fault there are no cells.
        what: the fault in words.
    """

    number: int
    cells: tuple[object, ...] = ()
    fault: str = ""
    what: str = ""


def read_records(
    path: File,
    columns: Sequence[str],
    *,
    kind: Kind | None = None,
    optional: Sequence[str] = (),
    header: bool = True,
    limit: int = MAX_RECORD,
    groups: Span | None = None,
) -> Iterator[Record]:
    """Yield all records of a table, also those with a fault. Text may hold lone surrogates where bytes were wrong.

    Args:
        path: the file.
        columns: the columns to return. One that no record has is an error.
        kind: how to read it; None = as its ending says. Text is read as TSV.
        optional: columns to return after them; None where the table has no such column.
        header: False: the first line of a TSV need not name the columns. If it does not, it is the first record, and
            every record has as many cells as there are ``columns``.
        limit: characters of a line at most.
        groups: of a Parquet file, the row groups to read; None = all. Then records are numbered from the first of them.

    Raises:
        DataError: the file cannot be read, a column is missing, or a quote of CSV is not closed.
    """
    kind = kind or kind_of(path)
    if kind == "parquet":
        return _parquet(path, columns, optional, groups)
    if kind == "jsonl":
        return _jsonl(path, columns, optional, limit)
    rows = _csv_rows(path, limit) if kind == "csv" else _tsv_rows(path, limit)
    return _by_header(rows, path, columns, optional, required=header or kind == "csv")


def read_table(
    path: File, columns: Sequence[str], *, optional: Sequence[str] = (), header: bool = True
) -> Iterator[tuple[int, tuple[str, ...]]]:
    """Yield the line or row number and the text of each record's columns; whatever is wrong is an error.

    Args:
        path: the file, of the kind that its ending says.
        columns: the columns to return. Each cell must hold text, which is stripped at its ends.
        optional: columns to return after them; an empty text where there is none.
        header: see :func:`read_records`.

    Raises:
        DataError: the file cannot be read or a record cannot be used; it names the line or row.
    """
    needed = f"Each record needs {' and '.join(columns)}"
    for record in read_records(path, columns, optional=optional, header=header):
        if record.fault == "blank":
            continue
        where = f"{path}:{record.number}"
        if record.fault:
            raise DataError(record.what, where, needed)
        texts = []
        for name, cell in zip((*columns, *optional), record.cells, strict=True):
            text = "" if cell is None else cell
            if not isinstance(text, str):
                raise DataError(f"the {name} is not text", where, needed)
            if not is_unicode(text):
                raise DataError(f"the {name} is not UTF-8", where, "Convert the file, for example with iconv")
            if is_blank(text) and name not in optional:
                raise DataError(f"the {name} is {'missing' if cell is None else 'empty'}", where, needed)
            texts.append(text.strip())
        yield record.number, tuple(texts)


def require_column(column: str, known: Iterable[object], where: str) -> None:
    """See that a table has a column.

    Raises:
        DataError: it has not; the message lists those it has.
    """
    names = [_shown(name) for name in known]
    if _shown(column) not in names:
        near = difflib.get_close_matches(column, names, n=1, cutoff=0.4)
        hint = f"Did you mean {near[0]!r}? " if near else ""
        if len(names) == 1 and (sign := next((sign for sign in ";\t|" if column in names[0].split(sign)), None)):
            hint = f"Its columns are parted by {sign!r}: write it with commas, or with tabs as .tsv. "
        raise DataError(f"has no column {column!r}", where, f"{hint}It has: {', '.join(names[:50]) or 'none'}")


def _shown(name: object) -> str:
    """A column's name as a message can hold it: lone surrogates cannot be printed."""
    return str(name).encode("utf-8", "backslashreplace").decode()[:100]


def _by_header(
    rows: Iterator[tuple[int, list[str] | Record]],
    path: File,
    columns: Sequence[str],
    optional: Sequence[str],
    *,
    required: bool,
) -> Iterator[Record]:
    """Pick the columns by the first row's names."""
    positions: list[int | None] = []
    width = 0
    for number, row in rows:
        if isinstance(row, Record):
            if not width and row.fault != "blank" and required:
                raise DataError(row.what, f"{path}:{number}", "The first line names the columns")
            yield row
            continue
        if not width:
            named = required or set(columns) <= set(row)
            known = row if named else [*columns]
            width = len(known)
            for column in columns:
                require_column(column, known, str(path))
            positions = [known.index(name) if name in known else None for name in (*columns, *optional)]
            if named:
                continue
        if len(row) != width:
            what = f"has {len(row)} column{'' if len(row) == 1 else 's'} where {width} are needed"
            yield Record(number, fault="malformed", what=what)
        else:
            yield Record(number, tuple(None if place is None else row[place] for place in positions))
    if not width and required:
        require_column(columns[0], [], str(path))


def _tsv_rows(path: File, limit: int) -> Iterator[tuple[int, list[str] | Record]]:
    for number, line in enumerate(text_lines(path, limit=limit), start=1):
        yield number, _fault_of(number, line, limit) or (line or "").split("\t")


def _csv_rows(path: File, limit: int) -> Iterator[tuple[int, list[str] | Record]]:
    csv.field_size_limit(max(csv.field_size_limit(), MAX_RECORD))
    lines = _Lines(path, limit)
    reader = csv.reader(lines, strict=True)
    while True:
        start = lines.number + 1
        lines.too_long = False
        try:
            row = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            # Within one line it is this record's fault alone; over several, rows may have been swallowed.
            if lines.number > start or lines.ended:
                raise _unclosed(path, start, lines.number) from None
            yield start, Record(start, fault="malformed", what=f"is not valid CSV ({error})")
            continue
        if lines.too_long and lines.number > start:
            raise _unclosed(path, start, lines.number)
        fault = _fault_of(start, None if lines.too_long else "x" * bool(row), limit)
        yield start, fault or row


class _Lines:
    """The lines of a file for the csv module, and where it is."""

    def __init__(self, path: File, limit: int) -> None:
        self._lines = text_lines(path, limit=limit)
        self.number, self.ended, self.too_long = 0, False, False

    def __iter__(self) -> Iterator[str]:
        return self

    def __next__(self) -> str:
        try:
            line = next(self._lines)
        except StopIteration:
            self.ended = True
            raise
        self.number += 1
        self.too_long |= line is None
        return "" if line is None else line + "\n"


def _unclosed(path: File, start: int, end: int) -> DataError:
    what = f"a quote that is opened here is not closed as CSV has it (read on to line {end})"
    return DataError(what, f"{path}:{start}", 'Close it, and write a quote inside of quotes twice: ""')


def _fault_of(number: int, line: str | None, limit: int) -> Record | None:
    if line is None:
        return Record(number, fault="too_long", what=f"is longer than {limit:,} characters")
    return None if line.strip() else Record(number, fault="blank", what="is blank")


def _jsonl(path: File, columns: Sequence[str], optional: Sequence[str], limit: int) -> Iterator[Record]:
    known: dict[str, None] = {}
    objects = 0
    lacking = set(columns)
    for number, line in enumerate(text_lines(path, limit=limit), start=1):
        if (fault := _fault_of(number, line, limit)) is not None:
            yield fault
            continue
        try:
            row = json.loads(line or "")
        except (ValueError, RecursionError) as error:
            yield Record(number, fault="undecodable", what=f"is not valid JSON ({error})")
            continue
        if not isinstance(row, dict):
            yield Record(number, fault="undecodable", what="is not a JSON object")
            continue
        objects += 1
        if lacking:
            lacking -= row.keys()
            known |= dict.fromkeys(list(row)[:50]) if len(known) < 50 else {}
        yield Record(number, tuple(row.get(name) for name in (*columns, *optional)))
    if not objects:
        raise DataError("holds no JSON objects, one a line", str(path), "Is it JSONL?")
    for column in columns:
        if column in lacking:
            require_column(column, known, str(path))


def group_rows(path: File) -> list[int]:
    """Return how many rows each row group of a Parquet file has.

    Raises:
        DataError: the file cannot be read.
    """
    with _opened_parquet(path) as file:
        return [file.metadata.row_group(group).num_rows for group in range(file.num_row_groups)]


@contextmanager
def _opened_parquet(path: File) -> Iterator[Any]:
    import pyarrow as pa  # slow to import, and used here only
    import pyarrow.parquet as pq

    check_file(path)
    try:
        with explained(path), _anywhere(path) as source, pq.ParquetFile(source) as file:
            yield file
    except (pa.ArrowException, ValueError, OverflowError) as error:  # a damaged footer may hold any names and lengths
        reason = str(error).partition("\n")[0]
        raise DataError(f"is not a readable Parquet file ({reason})", str(path)) from None


@contextmanager
def _anywhere(path: File) -> Iterator[Path | BinaryIO]:
    """Give what is read from its end and from there back; of a server that has no such thing, fetch it first."""
    if isinstance(path, Path):
        yield path
        return
    with path.open("rb") as stream:
        if path.ranges:
            yield stream
            return
        with tempfile.TemporaryFile() as fetched:
            shutil.copyfileobj(stream, fetched)
            yield fetched


def _parquet(
    path: File, columns: Sequence[str], optional: Sequence[str], groups: Span | None = None
) -> Iterator[Record]:
    number = 0
    with _opened_parquet(path) as file:
        known = file.schema_arrow.names
        for column in columns:
            require_column(column, known, str(path))
        wanted = [*range(*groups)] if groups is not None else None
        present = [name for name in dict.fromkeys((*columns, *optional)) if name in known]
        # Threads of pyarrow that read from an object of Python may hang when the process ends (arrow#50482).
        threads = isinstance(path, Path)
        for batch in file.iter_batches(batch_size=4096, columns=present, row_groups=wanted, use_threads=threads):
            positions = {name: batch.column(batch.schema.names.index(name)) for name in present}
            for i in range(batch.num_rows):
                number += 1
                try:
                    cells = [positions[n][i].as_py() if n in positions else None for n in (*columns, *optional)]
                except (ValueError, OverflowError):  # bytes that are no UTF-8, a time out of range
                    yield Record(number, fault="undecodable", what="cannot be decoded")
                    continue
                yield Record(number, tuple(cells))
