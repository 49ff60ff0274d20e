"""Every source of a corpus as one stream of clean sentences, with a count of what was dropped and why."""

from __future__ import annotations

import contextlib
import glob
import hashlib
import json
import os
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from hncse_ray.config import CorpusSettings
from hncse_ray.corpus.hub import hub_is_reachable
from hncse_ray.corpus.python_docs import docstring_sentences, package_versions
from hncse_ray.corpus.text import normalise
from hncse_ray.errors import DataError
from hncse_ray.reading import (
    MAX_RECORD,
    check_file,
    explained,
    is_blank,
    is_unicode,
    kind_of,
    read_records,
    require_column,
    text_lines,
)

DROP_REASONS = ("undecodable", "malformed", "too_long", "empty", "too_short", "no_token", "duplicate")


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
        elif "\0" in raw or not is_unicode(raw):
            counts["undecodable"] += 1
        elif is_blank(text := normalise(raw)):
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
    tables = False
    for path in find_files(settings.path):
        kind = kind_of(path, settings.source)
        tables |= kind != "text"
        with explained(path), path.open("rb") as stream:
            digest.update(hashlib.file_digest(stream, "sha256").digest())
        digest.update(f"{kind} {path.suffix.lower() == '.gz'}".encode())
    return f"files {settings.column if tables else ''} {digest.hexdigest()}"


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
        check_file(path)
    return files


def _raw(settings: CorpusSettings, counts: Counter[str]) -> Iterator[str]:
    if settings.source == "python-docs":
        yield from docstring_sentences(settings.packages, settings.num_processes)
        return
    if settings.source == "hub":
        yield from _hub_rows(settings, counts)
        return
    for path in find_files(settings.path):
        kind = kind_of(path, settings.source)
        if kind == "text":
            for line in text_lines(path, limit=settings.max_chars):
                if line is None:
                    counts.update(read=1, too_long=1)
                else:
                    yield line
            continue
        for record in read_records(path, [settings.column], kind=kind, limit=max(MAX_RECORD, 8 * settings.max_chars)):
            if record.fault == "blank":
                yield ""
            elif record.fault:
                counts.update({"read": 1, record.fault: 1})
            else:
                yield from _cell(record.cells[0], counts)


def _cell(value: object, counts: Counter[str]) -> Iterator[str]:
    if value is None:
        yield ""
    elif isinstance(value, str):
        yield value
    else:
        counts.update(read=1, undecodable=1)


def _hub_rows(settings: CorpusSettings, counts: Counter[str]) -> Iterator[str]:
    rows = _load_hub(settings)
    require_column(settings.column, rows.column_names, settings.path[0])
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
