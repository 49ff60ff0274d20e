"""Where a run lives: who may use its folder, what it holds, and how it travels to its URL and back.

``settings.yaml`` says which run it is, ``result.json`` that it is finished, ``.lock`` that somebody is at work. A run
that is kept at a URL works in a local folder too, one in the cache of each node. What is finished there is copied to
the URL, which has a lease in place of ``.lock``. The driver looks after lease, settings, log and result; the first
rank, on whichever node it is, sends the rest; every node fetches for itself what it needs to resume.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import yaml

from hncse_ray.config import Settings
from hncse_ray.corpus.cache import cache_folder
from hncse_ray.errors import StorageError
from hncse_ray.reading.kinds import is_missing
from hncse_ray.reporting.events import RunFinished
from hncse_ray.reporting.records import METRICS, SAMPLES
from hncse_ray.storage import (
    LEASES,
    Lease,
    Remote,
    check_outlasts_job,
    is_url,
    keep_trying,
    leased,
    locked,
    write_atomically,
)

logger = logging.getLogger(__name__)

PATIENCE_S = 300.0  # the storage may be away for so long at the start and at the end of a run
RECORDS = (METRICS, SAMPLES, "tensorboard")
_OTHER = "Choose another run.name, or remove the folder with all that is in it"
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


def working_folder(settings: Settings) -> Path:
    """Return where a run works on this machine: its folder, or for one at a URL a folder in the cache."""
    if not is_url(settings.run.storage_path):
        return Path(settings.run_dir)
    digest = hashlib.sha256(settings.run_dir.encode()).hexdigest()[:16]
    return cache_folder(settings.corpus.cache_dir) / "runs" / f"{settings.run.name}-{digest}"


class RunFolder:
    """The folder of a run that was claimed; see :func:`claim_run`.

    Args:
        path: the folder, on this node.
        lease: the right to write at the run's URL, if it is kept at one.
    """

    def __init__(self, path: Path, lease: Lease | None = None) -> None:
        self.path, self.lease = path, lease
        self._sent_log = -1

    @property
    def place(self) -> str:
        """Where the run is kept, for the user."""
        return str(self.path) if self.lease is None else self.lease.remote.url

    @property
    def model(self) -> Path:
        """Where the best weights are exported to."""
        return self.path / "model"

    @property
    def checkpoints(self) -> Path:
        """Where the checkpoints are."""
        return self.path / "checkpoints"

    def finished(self) -> RunFinished | None:
        """Return the facts of the finished run; None if it is not finished.

        One that ended here while the storage was away is stored now.
        """
        path = self.path / "result.json"
        if self.lease is not None:
            stored = self.lease.remote.read("result.json")
            if stored is not None:
                write_atomically(path, stored.decode(errors="replace"))
            elif path.exists() and self.model.is_dir():
                for name in (*RECORDS, "model"):
                    self.send(name)
                self._send_result()
            else:  # not here either, or the model was on another machine
                path.unlink(missing_ok=True)
        if not path.exists():
            return None
        try:
            return RunFinished.read(json.loads(path.read_text(encoding="utf-8")))
        except (ValueError, TypeError) as error:
            raise StorageError(f"cannot be read ({error})", f"{self.place}/result.json",
                               "Delete it to resume the run") from error  # fmt: skip

    def write_result(self, result: Mapping[str, Any]) -> None:
        """Mark the run as finished, here and at its URL."""
        write_atomically(self.path / "result.json", json.dumps(result, indent=2) + "\n")
        if self.lease is not None:
            try:
                keep_trying(self._send_result, timeout_s=PATIENCE_S)
            except StorageError as error:
                raise self.not_stored("the result", error.what) from error

    def not_stored(self, what: str, cause: str) -> StorageError:
        """Return the error of a run whose end could not be sent to its URL."""
        hint = f"Nothing is lost: all of it is in {self.path}; the same command on this machine stores it"
        return StorageError(f"{what} could not be stored ({cause})", self.place, hint)

    def send_log(self) -> None:
        """Copy ``log.txt`` to the URL if there is one, it is still this run's, and the log has grown."""
        log = self.path / "log.txt"
        if self.lease is not None and log.exists() and (size := log.stat().st_size) != self._sent_log:
            self.lease.check()
            self.lease.remote.upload(log, "log.txt")
            self._sent_log = size

    def _send_result(self) -> None:
        assert self.lease is not None
        self.lease.check()
        self.send_log()
        self.lease.remote.upload(self.path / "result.json", "result.json")

    def send(self, name: str, *, last: str = "") -> None:
        """Copy a file or a folder to the URL, in place of what is there.

        Args:
            name: its path below this folder; there need be none.
            last: name of the file that is copied last.

        Raises:
            StorageError: it could not be done.
        """
        assert self.lease is not None
        remote, path = self.lease.remote, self.path / name
        here = {str(file.relative_to(self.path)): file for file in [path, *path.rglob("*")] if file.is_file()}
        for left in set(remote.names(name)) - here.keys() if path.is_dir() else ():
            remote.delete(left)
        for file in sorted(here, key=lambda file: (here[file].name == last, file)):
            remote.upload(here[file], file)


@contextmanager
def claim_run(settings: Settings) -> Iterator[RunFolder]:
    """Hold a run for as long as the context lasts, creating its folder if need be.

    A run that was created here is removed again if the context ends in an error before anything was put into it.

    Raises:
        StorageError: the place cannot be used, holds another run or something else, or is in use.
    """
    check_outlasts_job(settings.run.storage_path, "run.storage_path")
    store, path = Remote(settings.run_dir), working_folder(settings)
    _refuse(store, settings)
    hint = "Set corpus.cache_dir or HNCSE_CACHE" if is_url(store.url) else "Choose another run.storage_path"
    folder, made = RunFolder(path), make_folder(path, hint)
    with ExitStack() as stack:
        stack.enter_context(locked(path / ".lock", hint="Choose another run.name, or end that process", of=store.url))
        if is_url(store.url):
            folder.lease = stack.enter_context(leased(store, path, each_beat=folder.send_log))
        stack.enter_context(_begun(folder, store, settings, made))
        yield folder


@contextmanager
def _begun(folder: RunFolder, store: Remote, settings: Settings, made: Sequence[Path]) -> Iterator[None]:
    """Have a claimed folder say which run it is, and at the end leave no folder of a run that was refused."""
    stored = _refuse(store, settings)  # again: another process may have been first
    if folder.lease is not None:
        _follow_url(folder, store, settings, is_new=stored is None)
    if not (folder.path / "settings.yaml").exists():
        write_atomically(folder.path / "settings.yaml", stored or settings.to_yaml())
    try:
        yield
    except BaseException:
        if stored is None and {entry.name for entry in folder.path.iterdir()} <= {".lock", "settings.yaml"}:
            store.delete("settings.yaml")
            for entry in folder.path.iterdir():
                entry.unlink()
            for place in made:
                if not any(place.iterdir()):
                    place.rmdir()
        raise
    finally:
        try:
            folder.send_log()
        except StorageError as error:
            logger.warning("what was written last is in %s only: %s", folder.path, error)


def _follow_url(folder: RunFolder, store: Remote, settings: Settings, *, is_new: bool) -> None:
    """Make the local folder of a run at a URL fit what is there, as far as the driver needs it."""
    work = folder.path
    if is_new:
        if (work / "settings.yaml").exists():  # of a run that was removed from the URL
            aside = work.with_name(work.name + ".aside")
            logger.warning("%s holds no run any more; what was left of it here is now in %s", store.url, aside)
            shutil.rmtree(aside, ignore_errors=True)
            aside.mkdir()
            for entry in work.iterdir():
                if entry.name != ".lock":
                    os.replace(entry, aside / entry.name)
        store.write("settings.yaml", settings.to_yaml().encode())
    log, stored = work / "log.txt", store.read("log.txt")
    if stored is not None and (not log.exists() or log.stat().st_size < len(stored)):
        log.write_bytes(stored)


def make_folder(path: Path, hint: str) -> list[Path]:
    """Make a folder with its parents; return those that were not there, the innermost first.

    Raises:
        StorageError: it cannot be made.
    """
    try:
        made = [place for place in (path, *path.absolute().parents) if not place.exists()]
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise StorageError(f"cannot be written ({error.strerror})", str(path), hint) from error
    return made


def _refuse(store: Remote, settings: Settings) -> str | None:
    """Find out, without changing anything, whether a place can be used for a run; return its settings if it has one."""
    content = store.read("settings.yaml")
    if content is None:
        if left := [name for name in store.names() if name != ".lock" and not name.startswith(LEASES)]:
            raise StorageError(f"is not empty and holds no run (there is {left[0]})", store.url, _OTHER)
        return None
    stored = content.decode("utf-8", errors="replace")
    try:
        tree = yaml.safe_load(stored)
    except (ValueError, yaml.YAMLError) as error:
        text = " ".join(str(error).split())
        raise StorageError(f"cannot be read ({text})", f"{store.url}/settings.yaml", _OTHER) from error
    if not isinstance(tree, dict):
        raise StorageError("holds no settings", f"{store.url}/settings.yaml", _OTHER)
    old, new = dict(_leaves(tree)), dict(leaves(settings))
    keys = [key for key in sorted(old.keys() | new.keys()) if not key.startswith(_FREE)]
    if changed := {
        key: f"{key} was {old.get(key)!r}, now {new.get(key)!r}" for key in keys if old.get(key) != new.get(key)
    }:
        gone = [path for path in settings.corpus.path if settings.corpus.source != "hub" and is_missing(path)]
        if gone and "corpus.path" in changed:
            changed["corpus.path"] += f" (and there is no {gone[0]})"
        raise StorageError(f"holds a run with other settings: {'; '.join(changed.values())}", store.url, _OTHER)
    return stored


def leaves(settings: Settings) -> Iterator[tuple[str, Any]]:
    """Return the settings by path, without their sections."""
    yield from _leaves(settings.model_dump(mode="json"))


def _leaves(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in tree.items():
        if isinstance(value, Mapping):
            yield from _leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value
