"""The folder of one run: who may use it, what it holds, and writing into it without halves.

``settings.yaml`` says which run it is, ``result.json`` that it is finished, ``.lock`` who is at work.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml

from hncse_ray.config import Settings
from hncse_ray.errors import StorageError
from hncse_ray.reporting.events import RunFinished

# Settings that may change between the start of a run and its resumption: they do not change what is computed.
_FREE = ("run.storage_path", "cluster.", "corpus.cache_dir", "corpus.num_processes", "evaluation.batch_size")


class RunFolder:
    """A claimed run folder; see :func:`claim_run_folder`."""

    def __init__(self, path: Path) -> None:
        self.path = path

    @property
    def model(self) -> Path:
        """Where the best weights are exported to."""
        return self.path / "model"

    @property
    def checkpoints(self) -> Path:
        """Where Ray Train keeps the checkpoints."""
        return self.path / "checkpoints"

    def finished(self) -> RunFinished | None:
        """Return the facts of the finished run; None if it is not finished."""
        path = self.path / "result.json"
        if not path.exists():
            return None
        try:
            return RunFinished(**json.loads(path.read_text(encoding="utf-8")))
        except (ValueError, TypeError) as error:
            raise StorageError(f"cannot be read ({error})", str(path), "Delete it to take the run up again") from error

    def write_result(self, result: Mapping[str, Any]) -> None:
        """Mark the run as finished."""
        write_atomically(self.path / "result.json", json.dumps(result, indent=2) + "\n")


@contextmanager
def claim_run_folder(settings: Settings) -> Iterator[RunFolder]:
    """Hold a run's folder for as long as the context lasts, creating it if need be.

    Raises:
        StorageError: the folder cannot be written, holds another run or something else, or is in use.
    """
    path = Path(settings.run_dir)
    other = "Choose another run.name, or remove the folder"
    try:
        path.mkdir(parents=True, exist_ok=True)
        lock = (path / ".lock").open("w")
    except OSError as error:
        raise StorageError(
            f"cannot be written ({error.strerror})", str(path), "Choose another run.storage_path"
        ) from error
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise StorageError("is in use by another process", str(path), "Choose another run.name") from error
        stored = path / "settings.yaml"
        if stored.exists():
            changed = _changed_settings(stored, settings)
            if changed:
                raise StorageError(f"holds a run with other settings: {'; '.join(changed)}", str(path), other)
        elif any(entry.name != ".lock" for entry in path.iterdir()):
            raise StorageError("is not empty and holds no run", str(path), other)
        else:
            write_atomically(stored, settings.to_yaml())
        yield RunFolder(path)


def write_atomically(path: Path, text: str) -> None:
    """Write a small file so that a reader sees the old one or the whole new one.

    Raises:
        StorageError: it cannot be written.
    """
    partial = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}")
    try:
        partial.write_text(text, encoding="utf-8")
        os.replace(partial, path)
    except OSError as error:
        partial.unlink(missing_ok=True)
        raise StorageError(f"cannot be written ({error.strerror})", str(path)) from error


def write_folder(path: Path, write: Callable[[Path], None]) -> None:
    """Fill a new folder by ``write(folder)`` and put it in place of ``path`` only when it is whole.

    Raises:
        StorageError: the disk is full or the place cannot be written; nothing of the attempt remains.
    """
    partial = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}")
    replaced = path.with_name(f".{path.name}.old.{uuid.uuid4().hex[:8]}")
    try:
        for leftover in path.parent.glob(f".{path.name}.*"):  # of a process that was killed while it wrote
            shutil.rmtree(leftover, ignore_errors=True)
        partial.mkdir(parents=True)
        write(partial)
        if path.exists():
            os.replace(path, replaced)
        os.replace(partial, path)
    except Exception as error:
        shutil.rmtree(partial, ignore_errors=True)
        if replaced.exists() and not path.exists():
            os.replace(replaced, path)
        # safetensors and torch report a full disk as errors of their own, not as OSError.
        raise StorageError(f"cannot be written ({error})", str(path), "Is the disk full?") from error
    shutil.rmtree(replaced, ignore_errors=True)


def _changed_settings(stored: Path, settings: Settings) -> list[str]:
    old = dict(_leaves(yaml.safe_load(stored.read_text(encoding="utf-8")) or {}))
    new = dict(_leaves(settings.model_dump(mode="json")))
    keys = [key for key in sorted(old.keys() | new.keys()) if not key.startswith(_FREE)]
    return [f"{key} was {old.get(key)!r}, now {new.get(key)!r}" for key in keys if old.get(key) != new.get(key)]


def _leaves(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in tree.items():
        if isinstance(value, Mapping):
            yield from _leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value
