"""A corpus and a retrieval test from the docstrings of installed packages: real text that needs no download.

Sources are parsed, never imported, by worker processes that run :mod:`hncse_ray.corpus.docstrings`.
"""

from __future__ import annotations

import difflib
import hashlib
import importlib.machinery
import importlib.metadata
import importlib.util
import json
import logging
import os
import string
import subprocess
import sys
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

from hncse_ray.corpus import docstrings
from hncse_ray.corpus.cache import cache_folder
from hncse_ray.corpus.docstrings import What
from hncse_ray.errors import DataError
from hncse_ray.storage import replacing

log = logging.getLogger(__name__)

# What the corpus is read from: dependencies of this project or of its dependencies, so they are always there.
DEFAULT_PACKAGES = ("datasets", "numpy", "optuna", "pandas", "pyarrow", "scipy", "torch")
# What pairs are read from: those, more such dependencies, and some of the standard library.
PAIR_PACKAGES = DEFAULT_PACKAGES + (
    "aiohttp", "click", "fsspec", "huggingface_hub", "jinja2", "mpmath", "networkx", "pydantic",
    "ray", "rich", "sklearn", "sqlalchemy", "sympy", "transformers", "typer",
    "asyncio", "collections", "concurrent", "datetime", "email", "logging", "multiprocessing", "pathlib",
    "random", "shutil", "statistics", "tarfile", "threading", "xml", "zipfile",
)  # fmt: skip

# Left out wherever they occur: tests, other people's code carried along, generated files.
_SKIPPED_ANYWHERE = {
    "test", "tests", "testing", "_testing", "_vendor", "vendor", "vendored", "externals", "_external",
    "thirdparty_files", "third_party", "site-packages", "node_modules", "__pycache__",
}  # fmt: skip
# Left out of the big packages: internals and near-copies, half of the reading time for little that is new.
_SKIPPED_FOLDERS = {
    "numpy": ("f2py", "distutils"),
    "pandas": ("conftest.py",),
    "pydantic": ("_internal", "v1"),
    "ray": ("_private", "autoscaler", "cloudpickle", "core", "dashboard", "llm", "rllib", "scripts"),
    "scipy": ("_lib",),
    "sqlalchemy": ("dialects",),
    "sympy": ("parsing", "physics", "plotting", "polys", "printing", "solvers"),
    "torch": ("_C", "_decomp", "_dynamo", "_export", "_functorch", "_higher_order_ops", "_inductor",
              "_library", "_numpy", "_prims", "_refs", "_subclasses", "ao", "distributed", "export", "fx",
              "jit", "onnx", "utils"),
    "transformers": ("models", "exporters", "integrations", "quantizers", "utils", "cli", "testing_utils.py"),
}  # fmt: skip

_PAIRS_VERSION = 2  # raise it when the rules below change: kept pairs are then made again
CHUNK_BYTES = 2_000_000  # of source for one worker: it starts in 30 ms and parses so much in half a second
MIN_NAME, MAX_PACKAGES_PER_NAME, MAX_PAIRS_PER_NAME = 3, 6, 3
# Names under which packages do unlike things.
_GENERIC_NAMES = frozenset(
    "add apply args backward build call check clean clear close compile config configure context copy "
    "create data default delete do_test dump enter execute exit file filter finalize find flush format "
    "forward func function get handle info init initialize item items iter key keys kwargs list load log "
    "main make match message model name new next node open options output parse path pop prepare print "
    "process push read register remove replace reset result result_type run save score seek set setup "
    "show size start state step stop test transform type update validate value values version visit "
    "wrapper write".split()
)
UNTELLING = ("see ", "alias ", "deprecated", "same as ", "like ", "refer to ", "wrapper ", "internal ", "dispatch ")


@dataclass(frozen=True)
class DocPair:
    """What two packages say of a function or class of the same name, each in one sentence."""

    name: str
    query: str
    answer: str
    query_package: str
    answer_package: str
    split: Literal["dev", "test"]


def docstring_sentences(packages: Sequence[str], num_processes: int | None) -> Iterator[str]:
    """Yield the sentences of the packages' docstrings, package by package, file by file; not unique.

    Args:
        packages: top-level import names; empty = those of ``DEFAULT_PACKAGES`` that are installed.
        num_processes: worker processes; default one per CPU.

    Raises:
        DataError: a named package is not installed or has no Python source.
    """
    files = [file for _, found in sorted(find_packages(packages).items()) for file in found]
    for sentences in read_sources(files, "sentences", num_processes):
        yield from sentences


def documentation_pairs(
    packages: Sequence[str] | None = None, num_processes: int | None = None, cache_dir: str | None = None
) -> list[DocPair]:
    """Pair the summaries that different packages give a public function or class of the same name.

    Of each name one package's summary is the answer, up to ``MAX_PAIRS_PER_NAME`` others are queries for it,
    so no name has two answers that compete. Names are compared without case and underscores
    (``multivariate_normal``, ``MultivariateNormal``). The result depends on the packages' sources alone.

    Args:
        packages: top-level import names; empty or None = those of ``PAIR_PACKAGES`` that are installed.
        num_processes: worker processes; default one per CPU.
        cache_dir: where the pairs of these versions of the packages are kept; see :func:`cache_folder`.

    Returns:
        Pairs in the order of their names; the pairs of a name share a split.

    Raises:
        DataError: a named package is not installed or has no Python source.
    """
    found = find_packages(packages or (), PAIR_PACKAGES)
    identity = [_PAIRS_VERSION, package_versions(list(found))]
    return [
        DocPair(*pair)
        for pair in cached_pairs(identity, lambda: map(astuple, _read_pairs(found, num_processes)), cache_dir)
    ]


def cached_pairs(
    identity: object, make: Callable[[], Iterable[Sequence[Any]]], cache_dir: str | None
) -> list[list[Any]]:
    """Return what was made under an identity, or make and keep it.

    Raises:
        StorageError: it cannot be kept.
    """
    key = hashlib.sha256(json.dumps(identity).encode()).hexdigest()
    cached = cache_folder(cache_dir) / "pairs" / f"{key}.json"
    if cached.exists():
        try:
            found: list[list[Any]] = json.loads(cached.read_text(encoding="utf-8"))
            return found
        except ValueError as error:
            log.warning("%s is damaged (%s); it is made anew", cached, error)
    made = [list(pair) for pair in make()]
    with replacing(cached, "Set HNCSE_CACHE") as partial:
        cached.parent.mkdir(parents=True, exist_ok=True)
        partial.write_text(json.dumps(made), encoding="utf-8")
    return made


def _read_pairs(found: dict[str, list[str]], num_processes: int | None) -> list[DocPair]:
    located = [(package, file) for package, files in found.items() for file in files]
    # key -> package -> the summary of its most prominent definition
    best: dict[str, dict[str, _Entry]] = defaultdict(dict)
    answers = read_sources([file for _, file in located], "summaries", num_processes)
    for (package, file), summaries in zip(located, answers, strict=True):
        for name, summary, is_method in summaries:
            entry = _Entry((is_method, file.count(os.sep), file), package, name, summary)
            key = name.replace("_", "").lower()
            if package not in best[key] or entry.rank < best[key][package].rank:
                best[key][package] = entry
    return _pair_up({key: [by[package] for package in sorted(by)] for key, by in sorted(best.items())})


class _Entry(NamedTuple):
    rank: tuple[bool, int, str]
    package: str
    name: str
    summary: str


def _pair_up(described: dict[str, list[_Entry]]) -> list[DocPair]:
    """Choose the pairs from the entries of each name, one entry a package."""
    chosen: list[tuple[str, list[_Entry]]] = []
    for key, entries in described.items():
        if len(key) < MIN_NAME or key in _GENERIC_NAMES or len(entries) > MAX_PACKAGES_PER_NAME:
            continue
        distinct: dict[str, _Entry] = {}
        for entry in entries:
            if not entry.summary.lower().startswith(UNTELLING):
                distinct.setdefault(_bare(entry.summary), entry)
        if len(distinct) > 1:
            chosen.append((key, list(distinct.values())[: MAX_PAIRS_PER_NAME + 1]))
    owners: dict[str, set[str]] = defaultdict(set)
    for key, entries in chosen:
        for entry in entries:
            owners[_bare(entry.summary)].add(key)
    pairs = []
    for key, entries in chosen:
        # A sentence that describes several names asks for no one of them.
        own = [entry for entry in entries if len(owners[_bare(entry.summary)]) == 1]
        for query in own[1:]:
            split = _split_of(key)
            pairs.append(DocPair(query.name, query.summary, own[0].summary, query.package, own[0].package, split))
    return pairs


def _bare(text: str) -> str:
    return " ".join(text.lower().translate(str.maketrans("", "", string.punctuation)).split())


def _split_of(name: str) -> Literal["dev", "test"]:
    return "dev" if hashlib.blake2b(name.encode()).digest()[0] % 2 == 0 else "test"


def package_versions(packages: Sequence[str]) -> list[str]:
    """Return ``name==version`` of the packages, sorted: what the text of their docstrings depends on.

    A package whose version says nothing of its text (an editable install, a folder on the path) is named by a
    hash of its sources.
    """
    distributions = importlib.metadata.packages_distributions()
    versions = []
    for package, files in find_packages(packages).items():
        version = ""
        for owner in sorted(set(distributions.get(package, ()))):
            distribution = importlib.metadata.distribution(owner)
            # Not so for an editable install, whose sources lie elsewhere.
            if Path(files[0]).is_relative_to(str(distribution.locate_file(""))):
                version = distribution.version
        if not version and package in sys.stdlib_module_names:
            version = sys.version.split()[0]
        if not version:
            digest = hashlib.sha256()
            for file in files:
                digest.update(hashlib.sha256(Path(file).read_bytes()).digest())
            version = digest.hexdigest()
        versions.append(f"{package}=={version}")
    return sorted(versions)


def find_packages(
    packages: Sequence[str], default: Sequence[str] = DEFAULT_PACKAGES, *, setting: str = "corpus.packages"
) -> dict[str, list[str]]:
    """Return package -> its source files, sorted, without importing any.

    Args:
        packages: top-level import names that must be there; empty = those of ``default`` that are installed.
        default: what an empty selection means.
        setting: what names them, for messages.

    Raises:
        DataError: a named package is not installed or has no Python source.
    """
    found: dict[str, list[str]] = {}
    for package in dict.fromkeys(packages or default):
        files = _source_files(package)
        if files:
            found[package] = files
        elif packages:
            near = difflib.get_close_matches(package, PAIR_PACKAGES, n=1)
            did_you_mean = f" (did you mean {near[0]!r}?)" if near else ""
            raise DataError(
                "is not an installed package with Python source",
                package,
                f"Give top-level import names in {setting}{did_you_mean}, or none for the default",
            )
    if missing := sorted(set(packages or default) - set(found)):
        log.warning("%s: not installed, left out: %s", setting, ", ".join(missing))
    if not found:
        raise DataError("none of the selected packages is installed", hint=f"Name packages in {setting}")
    return found


def _source_files(package: str) -> list[str]:
    if not package.isidentifier():
        return []
    try:
        # PathFinder, not find_spec: an entry in sys.modules may lie about where it is, or lack a spec.
        spec = importlib.machinery.PathFinder.find_spec(package)
    except (ImportError, ValueError):
        return []
    if spec is None:
        return []
    if not spec.submodule_search_locations:
        return [spec.origin] if spec.origin and spec.origin.endswith(".py") else []
    skipped = _SKIPPED_FOLDERS.get(package, ())
    return sorted(file for root in spec.submodule_search_locations for file in sources_in(root, skipped))


def sources_in(root: str, skipped: Sequence[str] = ()) -> list[str]:
    """Return the source files below a folder, sorted, without tests, hidden ones and what is not its own.

    Args:
        root: the folder.
        skipped: files in it, and paths of folders below it, that are left out too.
    """
    files = []
    for folder, subfolders, names in os.walk(root):
        subfolders[:] = sorted(
            name
            for name in subfolders
            if name not in _SKIPPED_ANYWHERE
            and not name.startswith(".")
            and os.path.relpath(os.path.join(folder, name), root) not in skipped
        )
        files += [
            os.path.join(folder, name)
            for name in sorted(names)
            if name.endswith(".py") and not name.startswith("test_") and not (folder == root and name in skipped)
        ]
    return sorted(files)


def read_sources(files: list[str], what: What, num_processes: int | None) -> Iterator[list[Any]]:
    """Read files in worker processes; answers in the order of the files."""
    processes = num_processes or _cpus()
    chunks = list(_chunks(files, CHUNK_BYTES))
    if processes == 1 or len(chunks) <= 1 or not sys.executable:
        for file in files:
            yield from docstrings.read_files([file], what)
        return

    def ask(chunk: list[str]) -> list[list[Any]]:
        request = json.dumps({"files": chunk, "what": what})
        # -I -S: no environment of the user, no site-packages: a worker needs the standard library alone.
        command = [sys.executable, "-I", "-S", docstrings.__file__]
        done = subprocess.run(command, input=request, capture_output=True, text=True, encoding="utf-8", check=False)
        if done.returncode:
            raise DataError(f"reading docstrings failed ({done.stderr.strip()[-300:]})", f"{chunk[0]} and following")
        answers: list[list[Any]] = json.loads(done.stdout)
        return answers

    with ThreadPoolExecutor(min(processes, len(chunks))) as threads:
        yield from (answer for answers in threads.map(ask, chunks) for answer in answers)


def _chunks(files: Iterable[str], size: int) -> Iterator[list[str]]:
    """Cut into runs of about `size` bytes."""
    chunk: list[str] = []
    held = 0
    for file in files:
        chunk.append(file)
        held += os.path.getsize(file)
        if held >= size:
            yield chunk
            chunk, held = [], 0
    if chunk:
        yield chunk


def _cpus() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
