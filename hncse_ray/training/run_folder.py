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
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any

import yaml

from hncse_ray.config import Settings, changes
from hncse_ray.corpus.cache import cache_folder
from hncse_ray.errors import StorageError
from hncse_ray.reading.kinds import is_missing
from hncse_ray.reporting.events import RunFinished
from hncse_ray.reporting.records import METRICS, SAMPLES
from hncse_ray.storage import check_outlasts_job, leave_nothing, locked, write_atomically
from hncse_ray.storage.lease import LAST_LEASE, LEASES, Lease, leased
from hncse_ray.storage.remote import Remote, is_url
from hncse_ray.storage.sending import LeaseLost, keep_trying

logger = logging.getLogger(__name__)

PATIENCE_S = 300.0  # the storage may be away for so long at the start and at the end of a run
RECORDS = (METRICS, SAMPLES, "tensorboard")
LAST_FILE = "state.json"  # of a checkpoint; without it there is none
_OF_THE_CLAIM = (".lock", LAST_LEASE)
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

    Attributes:
        model: where the best weights are exported to.
        checkpoints: where the checkpoints are.
    """

    def __init__(self, path: Path, lease: Lease | None = None) -> None:
        self.path, self.lease = path, lease
        self.model, self.checkpoints = path / "model", path / "checkpoints"
        self._sent: dict[str, tuple[int, int]] = {}

    @property
    def place(self) -> str:
        """Where the run is kept, for the user."""
        return str(self.path) if self.lease is None else self.lease.remote.url

    def finished(self) -> RunFinished | None:
        """Return the facts of the finished run; None if it is not finished.

        One that ended here while the storage was away is stored now.
        """
        path = self.path / "result.json"
        if self.lease is not None:
            if self.lease.remote.read("result.json") is not None:
                self.lease.remote.download("result.json", path)
            elif path.exists() and self.model.is_dir():
                self.send(*RECORDS, "model", "log.txt", "result.json")
            else:  # not here either, or the model was on another machine
                path.unlink(missing_ok=True)
        if not path.exists():
            return None
        try:
            return RunFinished.read(json.loads(path.read_text(encoding="utf-8")))
        except (ValueError, TypeError) as error:
            raise StorageError(f"cannot be read ({error})", f"{self.place}/result.json",
                               "Delete it to resume the run") from error  # fmt: skip

    def finished_at(self) -> float:
        """Return when the run was finished here, seconds since the epoch."""
        return (self.path / "result.json").stat().st_mtime

    def write_result(self, result: Mapping[str, Any]) -> None:
        """Mark the run as finished, here and at its URL."""
        write_atomically(self.path / "result.json", json.dumps(result, indent=2) + "\n")
        try:
            keep_trying(lambda: self.send("log.txt", "result.json"), timeout_s=PATIENCE_S)
        except StorageError as error:
            raise self.not_stored("the result", error.what) from error

    def not_stored(self, what: str, cause: str) -> StorageError:
        """Return the error of a run whose end could not be sent to its URL."""
        hint = f"Nothing is lost: all of it is in {self.path}; the same command on this machine stores it"
        return StorageError(f"{what} could not be stored ({cause})", self.place, hint)

    def send(self, *names: str) -> None:
        """Copy what has changed here to the run's URL, in the order that is given; without one, do nothing.

        Of a checkpoint ``LAST_FILE`` is copied last, over none: half of one has none.

        Args:
            names: files and folders, by their paths below this folder; there need be none.

        Raises:
            LeaseLost: another process has taken the run over.
            StorageError: it could not be done.
        """
        if self.lease is None:
            return
        self.lease.check()
        remote = self.lease.remote
        for name in names:
            path = self.path / name
            files = [file for file in (path, *path.rglob("*")) if file.is_file()]
            facts = {str(file.relative_to(self.path)): _facts(file) for file in files}
            changed = {file for file in facts if facts[file] != self._sent.get(file)}
            last = {file for file in changed if file.endswith(f"/{LAST_FILE}")}
            for old in remote.names(name) if path.is_dir() else ():
                if old in last or old not in facts:
                    remote.delete(old)
            for file in (*sorted(changed - last), *last):
                self.lease.check()  # each may take minutes, and this machine may be put to sleep meanwhile
                remote.upload(self.path / file, file)
                self._sent[file] = facts[file]

    def withdraw(self, name: str) -> None:
        """Delete a file at the run's URL, unless another process has taken the run over: then it is that one's."""
        if self.lease is None:
            return
        with suppress(LeaseLost):
            self.lease.check()
            self.lease.remote.delete(name)


def _facts(file: Path) -> tuple[int, int]:
    """Return what differs once a file has been written again."""
    stat = file.stat()
    return stat.st_size, stat.st_mtime_ns


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
    hint = f"Choose another {'corpus.cache_dir' if is_url(store.url) else 'run.storage_path'} or run.name"
    folder = RunFolder(path)
    with ExitStack() as stack:
        made = stack.enter_context(locked(path / ".lock", hint=hint, of=store.url))
        if is_url(store.url):
            folder.lease = stack.enter_context(leased(store, path, each_beat=partial(folder.send, "log.txt")))
        stored = _refuse(store, settings)  # again: another process may have been first
        try:
            _agree(folder, store, settings, stored)
            yield folder
        except BaseException:
            if stored is None and leave_nothing(path, (*_OF_THE_CLAIM, "settings.yaml"), made):
                folder.withdraw("settings.yaml")
            raise
        finally:
            try:
                folder.send("log.txt")
            except StorageError as error:
                logger.warning("what was written last is in %s only: %s", path, error)


def _agree(folder: RunFolder, store: Remote, settings: Settings, stored: str | None) -> None:
    """Have the folder, and the run's URL, say which run it is; make the folder fit what is there."""
    path, log = folder.path, folder.path / "log.txt"
    if folder.lease is not None and stored is None and (path / "settings.yaml").exists():
        aside = path.with_name(path.name + ".aside")
        logger.warning("%s holds no run any more; what was left of it here is now in %s", store.url, aside)
        shutil.rmtree(aside, ignore_errors=True)
        aside.mkdir()
        for entry in path.iterdir():
            if entry.name not in _OF_THE_CLAIM:
                os.replace(entry, aside / entry.name)
    if not (path / "settings.yaml").exists():
        write_atomically(path / "settings.yaml", stored or settings.to_yaml())
    if stored is None:
        folder.send("settings.yaml")
    there = store.read("log.txt")
    if there is not None and (not log.exists() or log.stat().st_size < len(there)):
        store.download("log.txt", log)


def _refuse(store: Remote, settings: Settings) -> str | None:
    """Find out, without changing anything, whether a place can be used for a run; return its settings if it has one."""
    content = store.read("settings.yaml")
    if content is None:
        if left := [name for name in store.names() if name not in _OF_THE_CLAIM and not name.startswith(LEASES)]:
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
    if changed := changes(tree, settings.model_dump(mode="json"), free=_FREE):
        gone = [path for path in settings.corpus.path if settings.corpus.source != "hub" and is_missing(path)]
        if gone and "corpus.path" in changed:
            changed["corpus.path"] += f" (and there is no {gone[0]})"
        raise StorageError(f"holds a run with other settings: {'; '.join(changed.values())}", store.url, _OTHER)
    return stored
