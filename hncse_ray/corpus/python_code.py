"""Pairs of what a function says of itself and its code, from installed packages and folders of Python source.

As in CodeSearchNet (Husain et al. 2019, arXiv 1909.09436): the query is the docstring's first sentence, and the code is
without docstring and comments. Sources are parsed, never imported.
"""

from __future__ import annotations

import hashlib
import os
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Literal, NamedTuple

from hncse_ray.config import CorpusSettings
from hncse_ray.corpus.python_docs import (
    DEFAULT_PACKAGES,
    UNTELLING,
    cached_pairs,
    find_packages,
    package_versions,
    read_sources,
    sources_in,
)
from hncse_ray.errors import DataError, counted
from hncse_ray.reading import UrlFile, check_file, expand_path, explained, is_unicode

# What is scored on. Like those trained on by default, dependencies of this project or of its dependencies.
CODE_PACKAGES: dict[str, tuple[str, ...]] = {
    "dev": ("click", "fsspec", "huggingface_hub", "jinja2", "mpmath", "pydantic", "transformers", "typer"),
    "test": ("aiohttp", "networkx", "rich", "sklearn", "sqlalchemy", "sympy"),
}

_CODE_VERSION = 1  # raise it when the rules change: kept pairs are then made again


class CodePair(NamedTuple):
    """A function: its summary, its code, and what functions of its name are known by."""

    summary: str
    code: str
    name: str


def code_pairs(settings: CorpusSettings) -> Iterator[CodePair]:
    """Yield the pairs of a corpus, duplicates included, without those of the modules that are held out.

    Raises:
        DataError: a package or folder is not there or has no Python source, or none of it has a usable docstring.
    """
    found = False
    for pair in _read(_training_files(settings), settings.num_processes):
        found = True
        yield pair
    if not found:
        raise DataError("holds no function whose docstring begins with a sentence", settings.place)


def code_identity(settings: CorpusSettings) -> str:
    """Return what the pairs of a corpus depend on.

    Raises:
        DataError: a package or folder is not there or has no Python source.
    """
    digest = hashlib.sha256()
    for module, file in _files_of_paths(settings):
        with explained(Path(file)), open(file, "rb") as stream:
            digest.update(module.encode() + hashlib.file_digest(stream, "sha256").digest())
    packages = package_versions(named) if (named := _packages(settings)) else []
    return f"python-code {_CODE_VERSION} {_python()} {settings.held_out} {' '.join(packages)} {digest.hexdigest()}"


def scored_code_pairs(
    split: Literal["dev", "test"], packages: Sequence[str], corpus: CorpusSettings, most: int | None = None
) -> list[CodePair]:
    """Return the pairs that a split scores: of other packages, or of the modules that the corpus holds out.

    Args:
        split: which.
        packages: top-level import names; empty = those of :data:`CODE_PACKAGES` that are installed.
        corpus: what is trained on; with ``held_out`` its own modules are scored on.
        most: a sample of so many, the same on every machine.

    Raises:
        DataError: a package is not there, is trained on as well, or nothing is left.
    """
    if corpus.source == "python-code" and corpus.held_out:
        place = f"the held out modules of {corpus.place}"
        files = [(module, file) for module, file in _files(corpus) if _fate(module, corpus.held_out) == split]
        pairs = list(_read(files, corpus.num_processes))
    else:
        place = f"evaluation.code_{split}"
        pairs = _package_pairs(packages, CODE_PACKAGES[split], corpus, setting=place)
    pairs = [pair for pair in pairs if is_unicode(pair.summary)]
    if len(pairs) < 2:
        raise DataError(f"only {counted(len(pairs), 'function')} with a docstring that begins with a sentence", place,
                        "Name more packages, or hold out more")  # fmt: skip
    chosen = sorted(range(len(pairs)), key=lambda i: _draw("\0".join(pairs[i])))[:most]
    return [pairs[i] for i in sorted(chosen)]


def _package_pairs(
    packages: Sequence[str], default: Sequence[str], corpus: CorpusSettings, *, setting: str
) -> list[CodePair]:
    found = find_packages(packages, default, setting=setting)
    trained = _packages(corpus) if corpus.source == "python-code" else ()
    if both := sorted(set(found) & set(trained)):
        raise DataError(f"package {both[0]!r} is both trained and scored on", setting,
                        "Take it out of this or of corpus.packages")  # fmt: skip
    identity = ["code", _CODE_VERSION, _python(), package_versions(list(found))]
    files = [(package, file) for package, files in sorted(found.items()) for file in files]
    return [CodePair(*p) for p in cached_pairs(identity, lambda: _read(files, corpus.num_processes), corpus.cache_dir)]


def _read(files: Sequence[tuple[str, str]], num_processes: int | None) -> Iterator[CodePair]:
    own = [file for _, file in files if os.path.basename(file) != "conftest.py"]
    for codes in read_sources(own, "codes", num_processes):
        for name, summary, code in codes:
            if not summary.lower().startswith(UNTELLING):
                yield CodePair(summary, code, name.replace("_", "").lower())


def _training_files(settings: CorpusSettings) -> list[tuple[str, str]]:
    files = _files(settings)
    kept = [(module, file) for module, file in files if _fate(module, settings.held_out) == "train"]
    if not kept:
        raise DataError(
            f"corpus.held_out = {settings.held_out} holds out all there is, {counted(len(files), 'module')}",
            settings.place,
        )
    return kept


def _files(settings: CorpusSettings) -> list[tuple[str, str]]:
    """Return the module, named from its package or folder, and file of all that is read."""
    packages = _packages(settings)
    found = []
    for package, files in sorted(find_packages(packages).items()) if packages else ():
        root = os.path.commonpath([os.path.dirname(file) for file in files])
        found += [(f"{package}/{os.path.relpath(file, root)}", file) for file in files]
    return found + list(_files_of_paths(settings))


def _packages(settings: CorpusSettings) -> tuple[str, ...]:
    if settings.packages or settings.path:
        return settings.packages
    return tuple(find_packages((), DEFAULT_PACKAGES))


def _files_of_paths(settings: CorpusSettings) -> Iterator[tuple[str, str]]:
    for pattern in settings.path:
        for path in expand_path(pattern, folders=True):
            if isinstance(path, UrlFile):
                raise DataError("is a URL, and code is read from files of this machine", str(path), "Fetch it first")
            if path.is_dir():
                files: Iterable[str] = sources_in(str(path))
                if not files:
                    raise DataError("has no Python source", str(path), "Tests and hidden folders are left out")
            else:
                check_file(path)
                if path.suffix != ".py":
                    raise DataError("is no Python source, which ends in .py", str(path))
                files = [str(path)]
            root = path if path.is_dir() else path.parent
            yield from ((os.path.relpath(file, root), file) for file in files)


def _fate(module: str, held_out: float) -> Literal["train", "dev", "test"]:
    """Return what a module is for; half of those held out are dev."""
    drawn = _draw(module)
    return "train" if drawn >= held_out else "dev" if drawn < held_out / 2 else "test"


def _draw(text: str) -> float:
    """Return a number from 0 to 1 that only depends on the text."""
    return int.from_bytes(hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest(), "big") / 2**64


def _python() -> str:
    """Return the version that writes the code."""
    return ".".join(map(str, sys.version_info[:2]))
