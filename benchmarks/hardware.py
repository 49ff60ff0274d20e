"""Where, when and on what a benchmark ran; every result carries it."""

import datetime
import importlib.metadata
import platform
import subprocess
from pathlib import Path

import torch


def provenance(device: torch.device, *packages: str) -> dict[str, str | int | None]:
    """Hardware, threads, date and commit, and the versions of torch, transformers and of further packages.

    ``faiss`` stands for whichever package it comes from.
    """
    names = ["torch", "transformers"]
    for name in packages:
        names += [name] if name != "faiss" else [p for p in ("faiss-cpu", "faiss-gpu") if _version(p)]
    return {
        "hardware": hardware(device),
        "threads": torch.get_num_threads(),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "commit": git_commit(),
    } | {name: _version(name) for name in names}


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def synchronise(device: torch.device) -> None:
    """Wait for an accelerator's queue to empty; nothing to do on the CPU."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def hardware(device: torch.device) -> str:
    """Name of the accelerator, or of the CPU."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return f"{line.split(':', 1)[1].strip()} ({platform.machine()})"
    return f"{platform.processor() or 'unknown processor'} ({platform.machine()})"


def git_commit() -> str | None:
    """The commit of the working tree, or None outside one."""
    try:
        answer = subprocess.run(
            ["git", "rev-parse", "HEAD"],
            cwd=Path(__file__).parent,
            capture_output=True,
            text=True,
            check=True,
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return answer.stdout.strip()
