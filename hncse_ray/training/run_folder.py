"""The folder of one run: who may use it, what it holds, and writing into it without halves.

``settings.yaml`` says which run it is, ``result.json`` that it is finished, ``.lock`` who is at work.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml

from hncse_ray.config import Settings
from hncse_ray.errors import StorageError
from hncse_ray.reporting.events import RunFinished
from hncse_ray.storage import locked, write_atomically

# Settings that may change between the start of a run and its resumption: they do not change what is computed.
_FREE = (
    "run.storage_path",
    "run.trackers",
    "cluster.",
    "corpus.cache_dir",
    "corpus.num_processes",
    "evaluation.batch_size",
    "negatives.num_shards",
    "negatives.cpus_per_shard",
    "negatives.gpus_per_shard",
    "negatives.threads_per_shard",
    "negatives.index_dir",
    "negatives.prefetch_batches",
    "negatives.timeout_s",
    "negatives.build_timeout_s",
)
KEPT_CHECKPOINTS = 2  # the newest, and the one before it in case the newest was damaged
OTHER = "Choose another run.name, or remove the folder"


class RunFolder:
    """A claimed run folder; see :func:`claim_run_folder`."""

    def __init__(self, path: Path) -> None:
        self.path = path

    @property
    def place(self) -> str:
        """Where the run is kept, for the user."""
        return str(self.path)

    @property
    def model(self) -> Path:
        """Where the best weights are exported to."""
        return self.path / "model"

    @property
    def checkpoints(self) -> Path:
        """Where the checkpoints are."""
        return self.path / "checkpoints"

    def finished(self) -> RunFinished | None:
        """Return the facts of the finished run; None if it is not finished."""
        path = self.path / "result.json"
        if not path.exists():
            return None
        try:
            return RunFinished.read(json.loads(path.read_text(encoding="utf-8")))
        except (ValueError, TypeError) as error:
            raise StorageError(f"cannot be read ({error})", str(path), "Delete it to take the run up again") from error

    def write_result(self, result: Mapping[str, Any]) -> None:
        """Mark the run as finished."""
        write_atomically(self.path / "result.json", json.dumps(result, indent=2) + "\n")


@contextmanager
def claim_run_folder(settings: Settings) -> Iterator[RunFolder]:
    """Hold a run's folder for as long as the context lasts, creating it if need be.

    A folder that was created here is removed again if the context ends in an error before anything was put into it.

    Raises:
        StorageError: the folder cannot be written, holds another run or something else, or is in use.
    """
    path = Path(settings.run_dir)
    made = [place for place in (path, *path.absolute().parents) if not place.exists()]
    _refuse(path, settings)
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise StorageError(
            f"cannot be written ({error.strerror})", str(path), "Choose another run.storage_path"
        ) from error
    with locked(path / ".lock", hint="Choose another run.name, or another run.storage_path"):
        _refuse(path, settings)  # again: another process may have been first
        try:
            if not (path / "settings.yaml").exists():
                write_atomically(path / "settings.yaml", settings.to_yaml())
            yield RunFolder(path)
        except BaseException:
            if made and {entry.name for entry in path.iterdir()} <= {".lock", "settings.yaml"}:
                shutil.rmtree(path)
                for parent in made[1:]:
                    if not any(parent.iterdir()):
                        parent.rmdir()
            raise


def _refuse(path: Path, settings: Settings) -> None:
    """Find out, without changing anything, whether the folder can be used for a run."""
    existing = next(place for place in (path, *path.absolute().parents) if place.exists())
    if not existing.is_dir():
        raise StorageError(f"cannot be written: {existing} is a file", str(path), "Choose another run.storage_path")
    if not os.access(existing, os.W_OK | os.X_OK):
        raise StorageError(f"cannot be written in {existing}", str(path), "Choose another run.storage_path")
    stored = path / "settings.yaml"
    if stored.exists():
        try:
            text = stored.read_text(encoding="utf-8")
        except (OSError, ValueError) as error:
            raise StorageError(f"cannot be read ({' '.join(str(error).split())})", str(stored), OTHER) from error
        refuse_other_settings(text, settings, str(path))
    elif path.exists() and any(entry.name != ".lock" for entry in path.iterdir()):
        raise StorageError("is not empty and holds no run", str(path), OTHER)


def refuse_other_settings(stored: str, settings: Settings, where: str) -> None:
    """Compare settings with those that a run was begun with, as YAML.

    Raises:
        StorageError: they differ in what changes the results, or cannot be read.
    """
    try:
        tree = yaml.safe_load(stored)
    except (ValueError, yaml.YAMLError) as error:
        text = " ".join(str(error).split())
        raise StorageError(f"cannot be read ({text})", f"{where}/settings.yaml", OTHER) from error
    if not isinstance(tree, dict):
        raise StorageError("holds no settings", f"{where}/settings.yaml", OTHER)
    old = dict(_leaves(tree))
    new = dict(leaves(settings))
    keys = [key for key in sorted(old.keys() | new.keys()) if not key.startswith(_FREE)]
    if changed := [f"{key} was {old.get(key)!r}, now {new.get(key)!r}" for key in keys if old.get(key) != new.get(key)]:
        raise StorageError(f"holds a run with other settings: {'; '.join(changed)}", where, OTHER)


def leaves(settings: Settings) -> Iterator[tuple[str, Any]]:
    """Return the settings by path, without their sections."""
    yield from _leaves(settings.model_dump(mode="json"))


def _leaves(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in tree.items():
        if isinstance(value, Mapping):
            yield from _leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value
