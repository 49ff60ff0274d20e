"""``hncse doctor``: what this machine has, what is missing, and the command that mends it."""

from __future__ import annotations

import importlib
import os
import platform
import re
import shutil
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path
from typing import Any, Literal

import typer
from rich.console import Console
from rich.markup import escape

from hncse_ray import __version__
from hncse_ray.cli.app import JsonOption, app, command
from hncse_ray.errors import HncseError

_LEAST_DISK, _LEAST_MEMORY, _LEAST_SHM = 5 * 10**9, 4 * 2**30, 2 * 2**30
_STYLES = {"ok": "green", "warning": "yellow", "missing": "red"}
_INSTALL = "pip install 'hncse-ray[{}]'"
_NOT_ALWAYS = ("Ray", "faiss")  # one process trains without: cluster.engine=local, negatives.source=none
_FAISS, _OWN_EXTRAS = ("cpu", "gpu"), ("dev",)  # the first have a line of their own, the second are for contributors


@dataclass(frozen=True)
class Check:
    """One line.

    Attributes:
        name: what was looked at.
        status: ``missing`` is what some command needs and does not find.
        found: what there is.
        mend: the command, or the step, that mends it; empty if nothing is to mend.
        essential: whether nothing can be trained without it.
    """

    name: str
    status: Literal["ok", "warning", "missing"]
    found: str
    mend: str = ""
    essential: bool = False


@app.command()
def doctor(as_json: JsonOption = False) -> None:
    """Say what this machine has, and what mends what is missing; exit status 1 if nothing can be trained so."""
    lacking: list[Check] = []

    def run(console: Console) -> dict[str, Any]:
        found = list(examine())
        lacking.extend(check for check in found if check.essential and check.status == "missing")
        width = max(len(check.name) for check in found)
        # Lines, no table: paths and commands stay whole, to be copied.
        for check in (Check("hncse_ray", "ok", __version__), *found):
            status = f"[{_STYLES[check.status]}]{check.status:7}[/]"
            console.print(f"{check.name:{width}}  {status}  {escape(check.found)}", soft_wrap=True, highlight=False)
            if check.mend:
                console.print(f"{'':{width + 9}}  mend: {escape(check.mend)}", soft_wrap=True, highlight=False)
        return {"ok": not lacking, "version": __version__, "checks": [asdict(check) for check in found]}

    command(run, as_json)
    if lacking:
        raise typer.Exit(1)


def examine() -> Iterator[Check]:
    """Look at everything, in the order in which it is shown."""
    parts: tuple[tuple[str, Callable[[], Iterator[Check]], str], ...] = (
        ("Python", _python, ""),
        ("torch", _torch, "pip install torch"),
        ("faiss", _faiss, _INSTALL.format("cpu")),
        ("Ray", _ray, "pip install 'ray[default,train,tune]', or train with cluster.engine=local"),
        ("machine", _machine, ""),
        ("folders", _folders, "pip install hncse-ray"),
        ("hub", _hub, "pip install hncse-ray"),
        ("packages", _packages, "pip install packaging"),
    )
    for name, part, mend in parts:
        try:
            yield from part()
        except (ImportError, OSError) as error:  # OSError: a library that a package brings does not load
            yield Check(name, "missing", str(error) or type(error).__name__, mend, essential=name not in _NOT_ALWAYS)


def _python() -> Iterator[Check]:
    yield Check("Python", "ok", f"{platform.python_version()}, {sys.executable}", essential=True)


def _torch() -> Iterator[Check]:
    import torch

    from hncse_ray.encoder import autocast_dtype, choose_device

    built, gpus = torch.version.cuda, torch.cuda.device_count()
    yield Check("torch", "ok", f"{torch.__version__}, {f'for CUDA {built}' if built else 'for CPUs'}", essential=True)
    if gpus:
        for number in range(gpus):
            facts = torch.cuda.get_device_properties(number)
            yield Check("GPU", "ok", f"cuda:{number} {facts.name}, {_size(facts.total_memory)}")
    elif Path("/dev/nvidia0").exists():
        mend = "see nvidia-smi, and the driver" if built else "install torch with CUDA: https://pytorch.org/get-started"
        yield Check("GPU", "warning", "there is one that torch cannot use", mend)
    else:
        yield Check("GPU", "ok", "none: all runs on CPUs")
    _, why = autocast_dtype("auto", choose_device("auto"))
    yield Check("precision", "ok", why)


def _faiss() -> Iterator[Check]:
    faiss: Any = importlib.import_module("faiss")
    kind = "with GPUs" if hasattr(faiss, "StandardGpuResources") else "for CPUs"
    built = faiss.get_compile_options().strip()
    yield Check("faiss", "ok", f"{faiss.__version__}, {kind}, built with {built}")


def _ray() -> Iterator[Check]:
    import ray

    from hncse_ray.cluster.session import named_cluster

    yield Check("Ray", "ok", ray.__version__)
    address, mode = os.environ.get("RAY_ADDRESS"), os.environ.get("RAY_AUTH_MODE", "")
    if not address or address == "local":
        yield Check("Ray cluster", "ok", "none (one is started when needed, with a token, and ended)")
        return
    try:
        named_cluster()
    except HncseError as error:
        yield Check("Ray cluster", "missing", error.what, f"{error.hint} Or unset RAY_ADDRESS".strip(), essential=True)
        return
    if mode.lower() == "token":
        yield Check("Ray cluster", "ok", f"{address} answers, with a token", essential=True)
    else:
        yield Check("Ray cluster", "warning", f"{address} answers without a token",
                    "start it with RAY_AUTH_MODE=token, and set that here too")  # fmt: skip


def _machine() -> Iterator[Check]:
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    yield Check("cores", "ok", f"{usable} of {os.cpu_count()}")
    memory = _memory()
    if memory is not None:
        few = memory < _LEAST_MEMORY
        yield Check("memory", "warning" if few else "ok", _size(memory),
                    "lower negatives.num_shards, train.batch_size and corpus.max_sentences" if few else "")  # fmt: skip
    if os.path.isdir("/dev/shm"):
        size = shutil.disk_usage("/dev/shm").total
        small = size < min(_LEAST_SHM, (memory or 0) * 0.3)
        yield Check("shared memory", "warning" if small else "ok", f"/dev/shm has {_size(size)}",
                    "docker run --shm-size=8g (Ray uses slower disk instead)" if small else "")  # fmt: skip


def _memory() -> int | None:
    """Bytes of main memory that this process may use: the machine's, or what its container is allowed."""
    if "SC_PHYS_PAGES" not in os.sysconf_names:
        return None
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    limit = Path("/sys/fs/cgroup/memory.max")
    text = limit.read_text(encoding="ascii").strip() if limit.is_file() else "max"
    return min(memory, int(text)) if text.isdecimal() else memory


def _folders() -> Iterator[Check]:
    from hncse_ray.config import Settings
    from hncse_ray.corpus.cache import cache_folder

    runs = Settings.model_fields["run"].default.storage_path
    try:
        cache = cache_folder(None)
    except HncseError as error:
        yield Check("cache", "missing", str(error), error.hint, essential=True)
        cache = None
    for name, folder, mend in (("runs", Path(runs).absolute(), "run.storage_path=FOLDER"),
                               ("cache", cache, "export HNCSE_CACHE=FOLDER")):  # fmt: skip
        if folder is None:
            continue
        there = next(parent for parent in (folder, *folder.parents) if parent.exists())
        free = shutil.disk_usage(there).free
        if not there.is_dir() or not os.access(there, os.W_OK | os.X_OK):
            yield Check(name, "missing", f"{folder} cannot be written", mend, essential=True)
        elif free < _LEAST_DISK:
            yield Check(name, "warning", f"{folder}: {_size(free)} free", f"{mend}, where there is more space")
        else:
            yield Check(name, "ok", f"{folder}: {_size(free)} free", essential=True)


def _hub() -> Iterator[Check]:
    from hncse_ray.corpus.hub import hub_endpoint, hub_is_reachable

    if hub_is_reachable():
        yield Check("hub", "ok", f"{hub_endpoint()} answers")
    elif os.environ.get("HF_HUB_OFFLINE"):
        yield Check("hub", "warning", "not asked: HF_HUB_OFFLINE is set", "unset HF_HUB_OFFLINE")
    else:
        yield Check("hub", "warning", f"{hub_endpoint()} does not answer",
                    "use models from folders or packages (package:NAME), or set HF_ENDPOINT to a mirror")  # fmt: skip


def _packages() -> Iterator[Check]:
    """The packages that are always needed, and those of each extra, which some commands need."""
    from packaging.requirements import Requirement

    try:
        wanted = [Requirement(text) for text in requires("hncse-ray") or ()]
    except PackageNotFoundError:
        yield Check("packages", "warning", "hncse-ray is not installed: it runs from a folder", "pip install -e .")
        return
    extras = sorted({name for need in wanted for name in re.findall(r"extra == ['\"]([^'\"]+)", str(need.marker))})
    for extra in ("", *(name for name in extras if name not in (*_FAISS, *_OWN_EXTRAS))):
        needs = [need for need in wanted if (need.marker.evaluate({"extra": extra}) if need.marker else not extra)]
        have = {need.name: _version(need.name) for need in needs}
        lacking = [name for name, found in have.items() if found is None]
        other = [f"{need.name} {found}, not {need.specifier}" for need in needs
                 if (found := have[need.name]) and not need.specifier.contains(found, prereleases=True)]  # fmt: skip
        name = f"extra {extra}" if extra else "packages"
        mend = _INSTALL.format(extra) if extra else "pip install hncse-ray"
        if lacking:
            yield Check(name, "missing", f"without {', '.join(lacking)}", mend, essential=not extra)
        elif other:
            yield Check(name, "warning", "; ".join(other), mend)
        else:
            found = ", ".join(f"{name} {number}" for name, number in have.items())
            yield Check(name, "ok", found if extra else f"{len(have)} as asked for", essential=not extra)


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _size(count: float) -> str:
    return f"{count / 2**30:,.1f} GiB"
