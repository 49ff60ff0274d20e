"""What kind a file is: told by its ending, here and nowhere else."""

from __future__ import annotations

import glob
import os
import re
from pathlib import Path, PurePath
from typing import Literal

from hncse_ray.errors import DataError
from hncse_ray.reading.urls import File, UrlFile, files_at, is_remote, local_path

Kind = Literal["text", "jsonl", "csv", "tsv", "parquet"]

ENDINGS: dict[str, Kind] = {
    ".txt": "text", ".text": "text",
    ".jsonl": "jsonl", ".ndjson": "jsonl", ".json": "jsonl",
    ".csv": "csv",
    ".tsv": "tsv", ".tab": "tsv",
    ".parquet": "parquet", ".parq": "parquet", ".pq": "parquet",
}  # fmt: skip
"""Lower case; ``.gz`` may follow each but Parquet's, which is compressed within. Any other ending is plain text."""

_READ = (
    "Text (a sentence a line), JSONL, CSV, TSV (each also as .gz) and Parquet are read, and as documents"
    " (corpus.source=documents) text, Markdown and HTML"
)
# Read as lines they would give nonsense. Who knows better says which source it is.
_FOREIGN = {
    ".7z", ".arrow", ".bz2", ".doc", ".docx", ".feather", ".htm", ".html", ".lz4", ".npy", ".npz", ".orc", ".pdf",
    ".pickle", ".pkl", ".pt", ".safetensors", ".tar", ".tgz", ".xls", ".xlsx", ".xz", ".zip", ".zst",
}  # fmt: skip


def kind_of(path: str | File, source: str = "auto") -> Kind:
    """Return how a file is read.

    Args:
        path: the file; only its name is looked at.
        source: ``auto`` goes by the ending; ``text``, ``jsonl``, ``csv`` (TSV among it) or ``parquet`` is what the
            user says that the file is, for names whose ending says nothing.

    Raises:
        DataError: the ending contradicts the source, or is that of a file which is not read.
    """
    packed, suffix = ending_of(path)
    if suffix not in ENDINGS:
        if source == "auto" and suffix in _FOREIGN:
            raise DataError(f"is of an unknown kind {suffix!r}", str(path), _READ)
        return _OF_SOURCE.get(source, "text")
    kind = ENDINGS[suffix]
    if source not in ("auto", kind) and (source, kind) != ("csv", "tsv"):
        raise DataError(
            f"ends in {suffix}, which is {_NAMES[kind]}, and corpus.source is {source!r}",
            str(path),
            "Set corpus.source=auto, or rename the file",
        )
    if kind == "parquet" and packed:
        raise DataError("is Parquet inside gzip", str(path), "Unpack it: Parquet is compressed within")
    return kind


def ending_of(path: str | File) -> tuple[bool, str]:
    """Return whether a file's name says that it is packed by gzip, and the ending before that, in lower case."""
    name = PurePath(str(path))
    packed = name.suffix.lower() == ".gz"
    return packed, (name.with_suffix("") if packed else name).suffix.lower()


_OF_SOURCE: dict[str, Kind] = {"jsonl": "jsonl", "csv": "csv", "parquet": "parquet"}
_NAMES: dict[Kind, str] = {"text": "plain text", "jsonl": "JSONL", "csv": "CSV", "tsv": "TSV", "parquet": "Parquet"}


def expand_path(pattern: str, *, folders: bool = False) -> list[File]:
    """Return the files that a path, a URL or a glob means, sorted; a path that is no glob is returned as it is.

    Args:
        pattern: the path or glob; ``~`` is the home directory. Of a URL that ends in a stroke: the folder.
        folders: whether a glob may mean folders too.

    Raises:
        DataError: the glob matches nothing, or the file at a URL cannot be found.
    """
    if is_remote(pattern):
        return [*files_at(pattern)]
    expanded = local_path(pattern)
    # A file whose name holds a bracket is taken as it is.
    if os.path.lexists(expanded) or not any(sign in expanded for sign in "*?["):
        return [Path(expanded)]
    matches = [match for match in sorted(glob.glob(expanded, recursive=True)) if folders or os.path.isfile(match)]
    if not matches:
        raise DataError("matches no file", pattern, relative_hint(expanded))
    return [Path(match) for match in matches]


def relative_hint(path: str | Path) -> str:
    """Say what a path that was not found is relative to; nothing of an absolute one."""
    return "" if os.path.isabs(path) else f"Paths are relative to {os.getcwd()}"


def is_missing(pattern: str) -> bool:
    """Whether a path names nothing. Of a glob, a URL and a package this is not known, so they are not missing."""
    return not re.search(r"[*?[]|://|^package:", pattern) and not os.path.lexists(os.path.expanduser(pattern))


def names_folder(path: str) -> bool:
    """Say whether a path is one of a folder: it is one here, or a URL that ends in a stroke."""
    return path.endswith("/") if is_remote(path) else os.path.isdir(local_path(path))


def check_file(path: File) -> None:
    """See that a file is there, readable, and not empty. A file at a URL was found.

    Raises:
        DataError: it is not.
    """
    if isinstance(path, UrlFile):
        if not path.size:
            raise DataError("is empty", str(path))
        return
    try:
        if path.is_dir():
            raise DataError(
                "is a directory, not a file",
                str(path),
                f"Name a file; of a corpus its files, such as {path}/*.txt, or set corpus.source=documents",
            )
        if not path.exists():
            raise DataError("no such file", str(path), relative_hint(path))
        with path.open("rb") as stream:
            if not stream.read(1):
                raise DataError("is empty", str(path))
    except (OSError, ValueError) as error:  # ValueError: a NUL in the name
        raise DataError(f"cannot be read ({getattr(error, 'strerror', None) or error})", str(path)) from None
