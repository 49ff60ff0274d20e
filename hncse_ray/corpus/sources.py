"""Every source of a corpus as one stream of clean rows, with a count of what was dropped and why."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from hncse_ray.config import CorpusSettings
from hncse_ray.corpus.documents import documents_identity, files_of_documents, read_passages, reads_documents
from hncse_ray.corpus.hub import hub_identity, hub_rows, hub_trouble
from hncse_ray.corpus.python_code import code_identity, code_pairs
from hncse_ray.corpus.python_docs import docstring_sentences, package_versions
from hncse_ray.corpus.text import document_name, normalise
from hncse_ray.errors import DataError
from hncse_ray.reading import (
    MAX_RECORD,
    File,
    Kind,
    Span,
    check_file,
    content_identity,
    ending_of,
    expand_path,
    is_blank,
    is_unicode,
    kind_of,
    read_records,
    require_column,
    text_lines,
)

DROP_REASONS = (
    "undecodable", "malformed", "not_text", "too_long", "empty", "too_short", "no_token", "duplicate", "near_duplicate",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Example:
    """One row of a source, normalised.

    Attributes:
        text: the sentence.
        positive: what belongs to it, if anything does.
        negatives: what does not.
        document: which document it is of, if of any.
        title: that document's, where it is a passage of one.
        body: the passage without the title.
    """

    text: str
    positive: str | None = None
    negatives: tuple[str, ...] = ()
    document: str | None = None
    title: str | None = None
    body: str = ""


@dataclass(frozen=True, slots=True)
class Shape:
    """What the rows of a source have.

    Attributes:
        pairs: positives.
        negatives: negatives of their own.
        documents: a document each.
        passages: they are passages, which have titles and bodies; those of a document stand together.
    """

    pairs: bool
    negatives: bool
    documents: bool
    passages: bool


@dataclass(frozen=True, slots=True)
class Part:
    """A part of a source that is read by itself; see :func:`~hncse_ray.corpus.parts.parts_of`.

    Attributes:
        path: one of its files; None = all of the source, but for the span.
        span: what of it: bytes of a text, row groups of a Parquet file, of a hub's data set its number among so many
            files; None = all.
    """

    path: File | None = None
    span: Span | None = None


WHOLE = Part()


def shape_of(settings: CorpusSettings) -> Shape:
    """Return what the rows of a source have.

    Raises:
        DataError: settings for documents are given, and there are none.
    """
    passages = reads_documents(settings)
    documents = passages or settings.document_column is not None or settings.source == "python-code"
    return Shape(settings.has_pairs, bool(settings.negative_columns), documents, passages)


def read_examples(
    settings: CorpusSettings, counts: Counter[str], sentences: Sequence[str] | None = None
) -> Iterator[Example]:
    """Yield the normalised rows of a source that pass the settings' filters, duplicates included.

    A row with a cell that cannot be used is dropped whole. Positives and negatives may be of any number of words.

    Args:
        settings: the source and its filters.
        counts: gains ``read`` (all lines or documents seen) and one of ``DROP_REASONS`` for each that is dropped.
        sentences: what is read where the source is ``memory``.

    Raises:
        DataError: a file, column, package or data set cannot be read, or a column has nothing in any row.
    """
    filled: set[tuple[str, str]] = set()
    yield from read_part(settings, WHOLE, counts, filled, sentences)
    check_filled(settings, filled)


def read_part(
    settings: CorpusSettings,
    part: Part,
    counts: Counter[str],
    filled: set[tuple[str, str]],
    sentences: Sequence[str] | None = None,
) -> Iterator[Example]:
    """Yield the rows of a part of a source as :func:`read_examples` does.

    Args:
        settings: the source and its filters.
        part: what is read of it.
        counts: as there.
        filled: gains the columns in which there was something; see :func:`check_filled`.
        sentences: as there.

    Raises:
        DataError: a file, column, package or data set cannot be read.
    """
    if settings.source == "python-code" or reads_documents(settings):
        for example in _codes(settings, counts) if settings.source == "python-code" else _passages(settings, counts):
            if _is_short(example.text, settings):
                counts["too_short"] += 1
            else:
                yield example
        return
    for cells in _raw(settings, part, counts, sentences):
        counts["read"] += 1
        try:
            example = _example(cells, settings, filled)
        except _Unusable as error:
            counts[error.reason] += 1
            continue
        if not example.text:
            counts["empty"] += 1
        elif _is_short(example.text, settings):
            counts["too_short"] += 1
        else:
            filled.add(("column", settings.column))
            yield example


def check_filled(settings: CorpusSettings, filled: set[tuple[str, str]]) -> None:
    """See that each column that was asked for has something in some row, where any row was kept.

    Raises:
        DataError: one has not.
    """
    for setting, name in settings.further_columns:
        if ("column", settings.column) in filled and (setting, name) not in filled:
            raise DataError(f"column {name!r} has nothing in any row", settings.place, f"See corpus.{setting}")


def _passages(settings: CorpusSettings, counts: Counter[str]) -> Iterator[Example]:
    for passage in read_passages(settings, counts):
        yield Example(passage.text, document=passage.document, title=passage.title, body=passage.body)


def _codes(settings: CorpusSettings, counts: Counter[str]) -> Iterator[Example]:
    """Functions of one name never repel each other: they do much the same, in one class or package or another."""
    for summary, code, name in code_pairs(settings):
        counts["read"] += 1
        if is_unicode(summary):
            yield Example(normalise(summary), positive=code, document=name)
        else:
            counts["undecodable"] += 1


def _is_short(text: str, settings: CorpusSettings) -> bool:
    return text.count(" ") + 1 < settings.min_words


def source_identity(settings: CorpusSettings, sentences: Sequence[str] | None = None) -> str:
    """Return what the text of a source is, whatever it is called: a hash of contents or versions.

    Raises:
        DataError: a file, package or data set cannot be found.
    """
    if settings.source == "memory":
        digest = hashlib.sha256()
        for sentence in _handed(sentences):
            digest.update(f"{len(sentence)} {sentence}".encode("utf-8", errors="surrogatepass"))
        return f"memory {digest.hexdigest()}"
    if settings.source == "python-docs":
        return "python-docs " + " ".join(package_versions(settings.packages))
    if settings.source == "python-code":
        return code_identity(settings)
    if settings.source == "hub":
        return f"hub {_columns_identity(settings)} {hub_identity(settings)}"
    if reads_documents(settings):
        return documents_identity(settings)
    digest = hashlib.sha256()
    tables = False
    for path in find_files(settings.path):
        kind = file_kind(path, settings)
        tables |= kind != "text"
        digest.update(content_identity(path))
        digest.update(f"{kind} {ending_of(path)[0]}".encode())
    return f"files {_columns_identity(settings) if tables else ''} {digest.hexdigest()}"


def changed_file(settings: CorpusSettings, since: float) -> Path | None:
    """Return a file of a source on this machine that was changed or added after a time; None = none, or no such source.

    Args:
        settings: the source.
        since: seconds since the epoch.
    """
    if settings.source in ("memory", "python-docs", "python-code", "hub"):
        return None
    try:
        files = files_of_documents(settings) if reads_documents(settings) else find_files(settings.path)
        return next((path for path in files if isinstance(path, Path) and path.stat().st_ctime > since), None)
    except (DataError, OSError):  # it is gone, which is for those to say who read it
        return None


def _columns_identity(settings: CorpusSettings) -> str:
    further = settings.further_columns
    return json.dumps([settings.column, *further]) if further else settings.column


def file_kind(path: File, settings: CorpusSettings) -> Kind:
    """Return how a file of a source is read.

    Raises:
        DataError: it cannot be, or has no columns where some are asked for.
    """
    kind = kind_of(path, settings.source)
    if kind == "text" and settings.further_columns:
        what = f"is plain text and has no columns, so corpus.{settings.further_columns[0][0]} cannot be read from it"
        raise DataError(what, str(path), "Give a table: TSV, CSV, JSONL or Parquet")
    return kind


def find_files(patterns: Iterable[str]) -> list[File]:
    """Expand paths, URLs and globs to files, in the order given, each pattern's own sorted.

    Raises:
        DataError: one does not exist, is a directory, is empty or cannot be read.
    """
    files = [path for pattern in patterns for path in expand_path(pattern)]
    for path in files:
        check_file(path)
    return files


def _handed(sentences: Sequence[str] | None) -> Sequence[str]:
    if sentences is None:
        what = "is of sentences that were handed over, and this process has none"
        raise DataError(what, "corpus.source=memory", "Name files by corpus.path")
    return sentences


def _raw(
    settings: CorpusSettings, part: Part, counts: Counter[str], sentences: Sequence[str] | None
) -> Iterator[Sequence[object]]:
    """Yield the cells of each row: the sentence, and those of the further columns in their order."""
    columns = [settings.column, *(name for _, name in settings.further_columns)]
    if settings.source == "python-docs":
        yield from ((text,) for text in docstring_sentences(settings.packages, settings.num_processes))
        return
    if settings.source == "memory":
        yield from ((sentence,) for sentence in _handed(sentences))
        return
    if settings.source == "hub":
        yield from _hub_rows(settings, columns, part)
        return
    for path in find_files(settings.path) if part.path is None else [part.path]:
        kind = file_kind(path, settings)
        if kind == "text":
            for line in text_lines(path, limit=settings.max_chars, span=part.span):
                if line is None:
                    counts.update(read=1, too_long=1)
                else:
                    yield (line,)
            continue
        limit = max(MAX_RECORD, 8 * settings.max_chars)
        for record in read_records(path, columns, kind=kind, limit=limit, groups=part.span):
            if record.fault == "blank":
                yield [None] * len(columns)
            elif record.fault:
                counts.update({"read": 1, record.fault: 1})
            else:
                yield record.cells


class _Unusable(Exception):
    """A cell cannot be used; says which of ``DROP_REASONS`` it is."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


def _example(cells: Sequence[object], settings: CorpusSettings, filled: set[tuple[str, str]]) -> Example:
    """Read the cells of a row; ``filled`` gains the columns in which there is something."""
    text, *further = cells
    positive: str | None = None
    document: str | None = None
    negatives: list[str] = []
    for column, cell in zip(settings.further_columns, further, strict=True):
        if column[0] == "document_column":
            try:
                document = document_name(cell)
            except ValueError:
                raise _Unusable("malformed") from None
            is_blank = document is None
        else:
            values = cell if isinstance(cell, list) and column[0] == "negative_columns" else [cell]
            texts = [found for value in values if (found := _clean(value, settings))]
            is_blank = not texts
            if column[0] == "negative_columns":
                negatives += texts
            elif texts:
                (positive,) = texts
        if not is_blank:
            filled.add(column)
    return Example(_clean(text, settings), positive, tuple(negatives), document)


def _clean(value: object, settings: CorpusSettings) -> str:
    """Return a cell's text, normalised; empty if there is nothing to see in it."""
    if value is None:
        return ""
    if not isinstance(value, str):
        raise _Unusable("not_text")
    # Before normalisation, which would make a string of a gigabyte of spaces look short.
    if len(value) > settings.max_chars:
        raise _Unusable("too_long")
    if "\0" in value or not is_unicode(value):
        raise _Unusable("undecodable")
    text = normalise(value)
    return "" if is_blank(text) else text


def _hub_rows(settings: CorpusSettings, columns: Sequence[str], part: Part) -> Iterator[Sequence[object]]:
    rows = hub_rows(settings)
    if part.span is not None:
        number, shards = part.span
        rows = rows.shard(num_shards=shards, index=number)
    with hub_trouble(settings):
        for number, batch in enumerate(rows.iter(batch_size=1000)):
            for name in columns if not number else ():
                require_column(name, batch, settings.path[0])
            missing = [None] * len(next(iter(batch.values())))
            yield from zip(*(batch.get(name, missing) for name in columns), strict=True)
