"""Every source of a corpus as one stream of clean rows, with a count of what was dropped and why."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hncse_ray.config import CorpusSettings
from hncse_ray.corpus.documents import documents_identity, read_passages, reads_documents
from hncse_ray.corpus.hub import hub_is_reachable
from hncse_ray.corpus.python_code import code_identity, code_pairs
from hncse_ray.corpus.python_docs import docstring_sentences, package_versions
from hncse_ray.corpus.text import document_name, normalise
from hncse_ray.errors import DataError
from hncse_ray.reading import (
    MAX_RECORD,
    Kind,
    check_file,
    expand_path,
    explained,
    is_blank,
    is_unicode,
    kind_of,
    read_records,
    require_column,
    text_lines,
)

DROP_REASONS = ("undecodable", "malformed", "too_long", "empty", "too_short", "no_token", "duplicate", "near_duplicate")


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
    if settings.source == "python-code" or reads_documents(settings):
        for example in _codes(settings, counts) if settings.source == "python-code" else _passages(settings, counts):
            if _is_short(example.text, settings):
                counts["too_short"] += 1
            else:
                yield example
        return
    blank, kept = set(settings.further_columns), False
    for cells in _raw(settings, counts, sentences):
        counts["read"] += 1
        try:
            example = _example(cells, settings, blank)
        except _Unusable as error:
            counts[error.reason] += 1
            continue
        if not example.text:
            counts["empty"] += 1
        elif _is_short(example.text, settings):
            counts["too_short"] += 1
        else:
            kept = True
            yield example
    for setting, name in settings.further_columns:
        if kept and (setting, name) in blank:
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
        return f"hub {_columns_identity(settings)} {_hub_identity(_load_hub(settings))}"
    if reads_documents(settings):
        return documents_identity(settings)
    digest = hashlib.sha256()
    tables = False
    for path in find_files(settings.path):
        kind = _kind(path, settings)
        tables |= kind != "text"
        with explained(path), path.open("rb") as stream:
            digest.update(hashlib.file_digest(stream, "sha256").digest())
        digest.update(f"{kind} {path.suffix.lower() == '.gz'}".encode())
    return f"files {_columns_identity(settings) if tables else ''} {digest.hexdigest()}"


def _columns_identity(settings: CorpusSettings) -> str:
    further = settings.further_columns
    return json.dumps([settings.column, *further]) if further else settings.column


def _kind(path: Path, settings: CorpusSettings) -> Kind:
    kind = kind_of(path, settings.source)
    if kind == "text" and settings.further_columns:
        what = f"is plain text and has no columns, so corpus.{settings.further_columns[0][0]} cannot be read from it"
        raise DataError(what, str(path), "Give a table: TSV, CSV, JSONL or Parquet")
    return kind


def find_files(patterns: Iterable[str]) -> list[Path]:
    """Expand paths and globs to files, in the order given, each pattern's own sorted.

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


def _raw(settings: CorpusSettings, counts: Counter[str], sentences: Sequence[str] | None) -> Iterator[Sequence[object]]:
    """Yield the cells of each row: the sentence, and those of the further columns in their order."""
    columns = [settings.column, *(name for _, name in settings.further_columns)]
    if settings.source == "python-docs":
        yield from ((text,) for text in docstring_sentences(settings.packages, settings.num_processes))
        return
    if settings.source == "memory":
        yield from ((sentence,) for sentence in _handed(sentences))
        return
    if settings.source == "hub":
        yield from _hub_rows(settings, columns)
        return
    for path in find_files(settings.path):
        kind = _kind(path, settings)
        if kind == "text":
            for line in text_lines(path, limit=settings.max_chars):
                if line is None:
                    counts.update(read=1, too_long=1)
                else:
                    yield (line,)
            continue
        for record in read_records(path, columns, kind=kind, limit=max(MAX_RECORD, 8 * settings.max_chars)):
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


def _example(cells: Sequence[object], settings: CorpusSettings, blank: set[tuple[str, str]]) -> Example:
    """Read the cells of a row; columns in which there is something leave ``blank``."""
    text, *further = cells
    positive: str | None = None
    document: str | None = None
    negatives: list[str] = []
    for column, cell in zip(settings.further_columns, further, strict=True):
        if column[0] == "document_column":
            try:
                document = document_name(cell)
            except ValueError:
                raise _Unusable("undecodable") from None
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
            blank.discard(column)
    return Example(_clean(text, settings), positive, tuple(negatives), document)


def _clean(value: object, settings: CorpusSettings) -> str:
    """Return a cell's text, normalised; empty if there is nothing to see in it."""
    if value is None:
        return ""
    # Before normalisation, which would make a string of a gigabyte of spaces look short.
    if isinstance(value, str) and len(value) > settings.max_chars:
        raise _Unusable("too_long")
    if not isinstance(value, str) or "\0" in value or not is_unicode(value):
        raise _Unusable("undecodable")
    text = normalise(value)
    return "" if is_blank(text) else text


def _hub_rows(settings: CorpusSettings, columns: Sequence[str]) -> Iterator[Sequence[object]]:
    rows = _load_hub(settings)
    for name in columns:
        require_column(name, rows.column_names, settings.path[0])
    for batch in rows.select_columns([*dict.fromkeys(columns)]).iter(batch_size=1000):
        yield from zip(*(batch[name] for name in columns), strict=True)


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
                    "Use a local file (corpus.source=auto corpus.path=FILE), the text that is already here"
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
