"""Documents as passages: read, freed of near-duplicates, split at ends of sentences."""

from __future__ import annotations

import hashlib
import itertools
import json
import logging
import os
import re
from collections import Counter
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path

import xxhash

from hncse_ray.config import CorpusSettings
from hncse_ray.corpus.sentences import count_words, pack_passages, split_sentences
from hncse_ray.corpus.text import document_name, name_hash, normalise
from hncse_ray.errors import DataError, counted
from hncse_ray.reading import (
    Document,
    DocumentError,
    File,
    check_file,
    content_identity,
    document_kind,
    documents_in,
    ending_of,
    expand_path,
    is_blank,
    is_remote,
    is_unicode,
    kind_of,
    names_folder,
    paragraphs_of,
    read_document,
    read_records,
    titled,
)

log = logging.getLogger(__name__)

TITLE_COLUMN, ID_COLUMNS = "title", ("_id", "id")
_RULES = 2  # raise it when what is read of a file changes: kept corpora are then made again
_NAMED_FAULTS = 3  # files that cannot be read, and kinds that are not, are named so often, and all are counted
_SHINGLE, _PERMUTATIONS = 5, 128  # words of a shingle; numbers of a signature
_BATCH = 4096  # shingles hashed at a time, each of which takes a KiB


@dataclass(frozen=True, slots=True)
class Passage:
    """A part of a document.

    Attributes:
        text: the passage as it is searched; see ``corpus.unit``.
        title: its document's.
        body: the passage without the title; empty for a document that is a title alone.
        document: what its document is known by.
    """

    text: str
    title: str | None
    body: str
    document: str


def reads_documents(settings: CorpusSettings) -> bool:
    """Return whether a source is documents: said so, or a folder is named.

    Raises:
        DataError: a setting for documents alone is given, and there are none.
    """
    if settings.of_documents:
        if settings.positive_column or settings.negative_columns:
            setting = "positive_column" if settings.positive_column else "negative_columns"
            raise DataError(f"is a folder of documents, and corpus.{setting} is for a table", settings.place,
                            "Name the table itself")  # fmt: skip
        return True
    setting = settings.first_document_setting
    if not setting and settings.repel_within_document and settings.document_column is None:
        setting = "repel_within_document"
    if setting and settings.source == "auto":
        what = f"is read row by row, and corpus.{setting} is for documents"
        raise DataError(what, settings.place, "Set corpus.source=documents, or leave it out")
    return False


def documents_identity(settings: CorpusSettings) -> str:
    """Return what the text of documents is: a hash of the files' contents in their order, and how they are read.

    Raises:
        DataError: a file or folder cannot be read.
    """
    digest = hashlib.sha256()
    for path, _ in _files(settings):
        digest.update(content_identity(path))
        digest.update(f"{document_kind(path) or kind_of(path)} {ending_of(path)[0]}".encode())
    how: list[object] = [settings.column, settings.title_column, settings.document_column]
    how += [settings.unit, settings.passage_words, settings.near_duplicates]
    return f"documents {_RULES} {json.dumps(how)} {digest.hexdigest()}"


def read_passages(settings: CorpusSettings, counts: Counter[str]) -> Iterator[Passage]:
    """Yield the passages of all documents, those of one behind each other.

    Args:
        settings: the source, and how it is split.
        counts: gains ``read`` (all documents) and a reason for each that is dropped.

    Raises:
        DataError: a file or folder cannot be read, a column is missing, or a document comes twice.
    """
    known = NearDuplicates(settings.near_duplicates) if settings.near_duplicates is not None else None
    for name, document in _documents(settings, counts):
        title, paragraphs = document.title, document.paragraphs
        if title is not None and count_words(title) > settings.passage_words:  # no title, whatever it is called
            paragraphs, title = (title, *paragraphs), None
        if title is None and not paragraphs:
            counts["empty"] += 1
            continue
        if known is not None and known.holds(" ".join([title or "", *paragraphs])):
            counts["near_duplicate"] += 1
            continue
        sentences = [sentence for paragraph in paragraphs for sentence in split_sentences(paragraph)]
        for body in pack_passages(sentences, settings.passage_words) or [""]:
            text = titled(title, body) if settings.unit == "title_and_passage" else body or title or ""
            yield Passage(text, title, body, name)


def files_of_documents(settings: CorpusSettings) -> Iterator[File]:
    """Yield the files of documents.

    Raises:
        DataError: a file or folder cannot be read.
    """
    return (path for path, _ in _files(settings))


def document_files(settings: CorpusSettings) -> list[str]:
    """Return what to call the files of documents, in their order: their paths from the folder that holds them all.

    Raises:
        DataError: a file or folder cannot be read.
    """
    paths = [os.path.abspath(str(path)) for path, _ in _files(settings)]
    folders = [os.path.abspath(folder) for folder in _folders(settings)]
    folder = os.path.commonpath(folders)
    # A name need not be UTF-8, and is shown.
    return [os.fsencode(os.path.relpath(path, folder)).decode(errors="replace") for path in paths]


def document_labels(settings: CorpusSettings, known: Collection[int]) -> dict[int, str]:
    """Return what to call documents, by what a corpus knows them by: a file's path, or the name of a table's row.

    A row without a name is called by its file and number. With several files the file stands before a row's name.

    Args:
        settings: of the corpus.
        known: of ``Corpus.documents``.

    Raises:
        DataError: a file or folder cannot be read, or is not what the corpus was made of.
    """
    wanted, labels = set(known), {}
    files = document_files(settings)
    for number, ((path, _), file) in enumerate(zip(_files(settings), files, strict=True)):
        if not _is_table(path):
            labels[name_hash(str(number))] = file
            continue
        for name, _ in _table(path, settings, Counter()):
            if (document := name_hash(f"{number}\0{name}")) in wanted:
                named = name if len(files) == 1 else f"{file} {name}"
                labels[document] = f"{file}:{name[1:]}" if name.startswith("\0") else named
    if not wanted <= labels.keys():
        raise DataError("changed while it was read", settings.place, "Begin again")
    return labels


class NearDuplicates:
    """The documents seen so far, by MinHash over their words (Broder 1997)."""

    def __init__(self, threshold: float) -> None:
        from datasketch import MinHashLSH

        self._threshold = threshold
        # Rather some candidates too many: what they share is estimated before one is dropped.
        self._index = MinHashLSH(threshold=threshold, num_perm=_PERMUTATIONS, weights=(0.1, 0.9))
        self._signatures: list[object] = []

    def holds(self, text: str) -> bool:
        """Return whether a text shares as much with an earlier one; if not, it is one of these from now on."""
        from datasketch import LeanMinHash, MinHash

        signature = MinHash(num_perm=_PERMUTATIONS, hashfunc=xxhash.xxh32_intdigest)
        shingles = _shingles(text)
        while batch := [shingle.encode() for shingle in itertools.islice(shingles, _BATCH)]:
            signature.update_batch(batch)
        near = self._index.query(signature)
        if any(signature.jaccard(self._signatures[i]) >= self._threshold for i in near):
            return True
        self._index.insert(len(self._signatures), signature)
        self._signatures.append(LeanMinHash(signature))
        return False


def _shingles(text: str) -> Iterator[str]:
    """Yield runs of words, or of characters where blanks part few."""
    text = text.lower()
    words = text.split()
    if len(words) >= count_words(text):
        yield from (" ".join(words[i : i + _SHINGLE]) for i in range(max(1, len(words) - _SHINGLE + 1)))
    else:
        text = "".join(words)
        yield from (text[i : i + _SHINGLE] for i in range(max(1, len(text) - _SHINGLE + 1)))


def _files(settings: CorpusSettings, others: Counter[str] | None = None) -> Iterator[tuple[File, bool]]:
    """Yield the files of the paths, and whether each was named itself; count other kinds in folders by ending."""
    for pattern in settings.path:
        is_folder_url = is_remote(pattern) and names_folder(pattern)
        for path in [pattern] if is_folder_url else expand_path(pattern, folders=True):
            if isinstance(path, str) or (isinstance(path, Path) and path.is_dir()):
                yield from ((file, False) for file in documents_in(path, others))
            else:
                check_file(path)
                yield path, True


def _folders(settings: CorpusSettings) -> Iterator[str]:
    """Yield the folders of the paths, and of their files."""
    for pattern in settings.path:
        if is_remote(pattern):
            yield re.split(r"[*[]", pattern)[0].rpartition("/")[0]
            continue
        for path in expand_path(pattern, folders=True):
            assert isinstance(path, Path)
            yield str(path if path.is_dir() else path.parent)


def _is_table(path: File) -> bool:
    return document_kind(path) is None and kind_of(path) != "text"


def _documents(settings: CorpusSettings, counts: Counter[str]) -> Iterator[tuple[str, Document]]:
    """Yield what each document is known by, and it."""
    faults: Counter[str] = Counter()
    others: Counter[str] = Counter()
    for number, (path, named) in enumerate(_files(settings, others)):
        if _is_table(path):
            for name, document in _table(path, settings, counts):
                yield f"{number}\0{name}", document
            continue
        counts["read"] += 1
        try:
            yield str(number), read_document(path, document_kind(path) or "text")
        except DocumentError as error:
            if named:
                raise
            counts[error.reason] += 1
            faults[error.reason] += 1
            if faults[error.reason] <= _NAMED_FAULTS:
                log.warning("left out: %s", error)
    if any(count > _NAMED_FAULTS for count in faults.values()):
        log.warning("left out files: %s", ", ".join(f"{count} {reason}" for reason, count in sorted(faults.items())))
    if others:
        kinds = ", ".join(f"{count:,} {ending}" for ending, count in others.most_common(_NAMED_FAULTS))
        more = ", ..." if len(others) > _NAMED_FAULTS else ""
        log.warning("left out %s of other kinds: %s%s", counted(others.total(), "file"), kinds, more)


def _table(path: File, settings: CorpusSettings, counts: Counter[str]) -> Iterator[tuple[str, Document]]:
    """Yield the documents of a table, a row or neighbouring rows each, after their names."""
    asked = [settings.column, *(name for name in (settings.title_column, settings.document_column) if name)]
    title_column = settings.title_column or TITLE_COLUMN
    optional = (title_column, *([settings.document_column] if settings.document_column else ID_COLUMNS))
    seen: set[str] = set()
    before, titles = "", 0
    for record in read_records(path, asked, optional=optional):
        counts["read"] += 1
        if record.fault:
            counts["empty" if record.fault == "blank" else record.fault] += 1
            continue
        text, title, *names = record.cells[0], *record.cells[len(asked) :]
        try:
            title = None if title_column == settings.column else title
            document = Document(_cell(title), paragraphs_of(_checked(text)))
            name = next((found for value in names if (found := document_name(value))), f"\0{record.number}")
        except ValueError:
            counts["undecodable"] += 1
            continue
        titles += document.title is not None
        if name != before and name in seen:
            what = f"a row of document {name!r} stands apart from its others"
            raise DataError(what, f"{path}:{record.number}", "Sort the table, or see corpus.document_column")
        seen.add(name)
        before = name
        yield name, document
    if settings.title_column and not titles:
        raise DataError(
            f"column {settings.title_column!r} has nothing in any row", str(path), "See corpus.title_column"
        )


def _checked(value: object) -> str:
    """Return a cell's text, empty where there is none; ValueError for what is no text."""
    if value is None:
        return ""
    if not isinstance(value, str) or "\0" in value or not is_unicode(value):
        raise ValueError
    return value


def _cell(value: object) -> str | None:
    line = normalise(_checked(value))
    return None if is_blank(line) else line
