"""A run that is kept at a URL: it works in a local folder, and what is finished is copied to the URL and back.

At the URL are ``settings.yaml``, ``lease.json`` (who is at work), ``checkpoints/``, ``model/``, ``metrics.jsonl``,
``samples.jsonl``, ``log.txt``, ``tensorboard/`` and at last ``result.json``. The driver looks after the lease, the
settings, the log and
the result; the first rank, on whichever node it is, sends the rest; every node fetches for itself what it needs.
"""

from __future__ import annotations

import hashlib
import logging
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hncse_ray.config import Settings
from hncse_ray.corpus.cache import cache_folder
from hncse_ray.errors import StorageError
from hncse_ray.reporting.events import RunFinished
from hncse_ray.reporting.records import METRICS, SAMPLES
from hncse_ray.storage import (
    LEASES,
    Damaged,
    Lease,
    Remote,
    Uploader,
    check_outlasts_job,
    delete_folder,
    fetch_folder,
    is_url,
    keep_trying,
    leased,
    locked,
    replacing,
    send_folder,
    whole_folders,
    write_atomically,
)
from hncse_ray.training.run_folder import KEPT_CHECKPOINTS, OTHER, RunFolder, claim_run_folder, refuse_other_settings

logger = logging.getLogger(__name__)

PATIENCE_S = 300.0  # the storage may be away for so long at the end of a run
_LAST_WORDS_S = 20.0  # of a run that fails, and has a cause of its own to tell


def working_folder(settings: Settings) -> Path:
    """Return where a run that is kept at a URL works on this machine: in the cache, one folder for each URL."""
    digest = hashlib.sha256(settings.run_dir.encode()).hexdigest()[:16]
    return cache_folder(settings.corpus.cache_dir) / "runs" / f"{settings.run.name}-{digest}"


class RemoteRunFolder(RunFolder):
    """A claimed run at a URL, and its local folder; see :func:`claim_run`."""

    def __init__(self, path: Path, lease: Lease) -> None:
        super().__init__(path)
        self.lease, self.remote = lease, lease.remote
        self._sent_log = -1

    @property
    def place(self) -> str:
        """Where the run is kept, for the user."""
        return self.remote.url

    def finished(self) -> RunFinished | None:
        """Return the facts of the finished run; None if it is not finished.

        One that ended here while the storage was away is stored now.
        """
        if (self.path / "result.json").exists() and self.remote.read("result.json") is None:
            if self.model.is_dir():
                _send_records(self.remote, self.path)
                send_folder(self.remote, "model", self.model)
                self._send_result()
            else:  # the model was on another machine
                (self.path / "result.json").unlink()
        try:
            return super().finished()
        except StorageError as error:
            raise StorageError(error.what, f"{self.place}/result.json", error.hint) from error

    def write_result(self, result: Mapping[str, Any]) -> None:
        """Mark the run as finished, here and at the URL."""
        super().write_result(result)
        try:
            keep_trying(self._send_result, timeout_s=PATIENCE_S)
        except StorageError as error:
            raise StorageError(f"the result could not be stored ({error.what})", self.place,
                               f"Nothing is lost: all of it is in {self.path}; the same command on this machine"
                               " stores it") from error  # fmt: skip

    def send_log(self) -> None:
        """Copy ``log.txt`` to the URL if it has grown."""
        log = self.path / "log.txt"
        if log.exists() and (size := log.stat().st_size) != self._sent_log:
            self.remote.upload(log, "log.txt")
            self._sent_log = size

    def _send_result(self) -> None:
        self.lease.check()
        self.send_log()
        self.remote.upload(self.path / "result.json", "result.json")


@contextmanager
def claim_run(settings: Settings) -> Iterator[RunFolder]:
    """Hold a run for as long as the context lasts, in its folder or at its URL; see :func:`claim_run_folder`.

    Raises:
        StorageError: the place cannot be used, holds another run or something else, or is in use.
    """
    check_outlasts_job(settings.run.storage_path, "run.storage_path")
    if not is_url(settings.run.storage_path):
        with claim_run_folder(settings) as local:
            yield local
        return
    remote, work = Remote(settings.run_dir), working_folder(settings)
    _refuse(remote, settings)
    try:
        work.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise StorageError(f"cannot be written ({error.strerror})", str(work),
                           "Set corpus.cache_dir or HNCSE_CACHE") from error  # fmt: skip
    with ExitStack() as stack:
        try:
            stack.enter_context(locked(work / ".lock", hint="Choose another run.name, or set HNCSE_CACHE"))
        except StorageError as error:
            raise StorageError(error.what, remote.url, error.hint) from error
        folder: RemoteRunFolder | None = None
        lease = stack.enter_context(leased(remote, work, each_beat=lambda: folder.send_log() if folder else None))
        is_new = _refuse(remote, settings)  # again: another process may have been first
        folder = _resume(lease, work, settings, is_new=is_new)
        stack.callback(_leave, folder, is_new=is_new)
        yield folder


def _leave(folder: RemoteRunFolder, *, is_new: bool) -> None:
    """Send the rest of the log; of a run that was refused before anything was put into it leave nothing."""
    try:
        folder.send_log()
        if is_new and {entry.name for entry in folder.path.iterdir()} <= {".lock", "settings.yaml"}:
            folder.remote.delete("settings.yaml")
            shutil.rmtree(folder.path)
    except StorageError as error:
        logger.warning("what was written last is in %s only: %s", folder.path, error)


def _refuse(remote: Remote, settings: Settings) -> bool:
    """Find out whether the URL can be used for a run; return whether it is a new one."""
    stored = remote.read("settings.yaml")
    if stored is not None:
        refuse_other_settings(stored.decode("utf-8", errors="replace"), settings, remote.url)
        return False
    if left := [name for name in remote.names() if not name.startswith(LEASES)]:
        raise StorageError(f"is not empty and holds no run (there is {left[0]})", remote.url, OTHER)
    return True


def _resume(lease: Lease, work: Path, settings: Settings, *, is_new: bool) -> RemoteRunFolder:
    """Make the local folder fit what is at the URL, as far as the driver needs it."""
    remote = lease.remote
    if is_new:
        if (work / "settings.yaml").exists():  # of a run that was removed from the URL
            aside = work.with_name(work.name + ".aside")
            logger.warning("%s holds no run any more; what was left of it here is now in %s", remote.url, aside)
            shutil.rmtree(aside, ignore_errors=True)
            aside.mkdir()
            for entry in work.iterdir():
                if entry.name != ".lock":
                    os.replace(entry, aside / entry.name)
        remote.write("settings.yaml", settings.to_yaml().encode())
        write_atomically(work / "settings.yaml", settings.to_yaml())
        return RemoteRunFolder(work, lease)
    for name in ("settings.yaml", "result.json"):
        if (content := remote.read(name)) is not None:
            write_atomically(work / name, content.decode(errors="replace"))
    log, stored = work / "log.txt", remote.read("log.txt")
    if stored is not None and (not log.exists() or log.stat().st_size < len(stored)):
        log.write_bytes(stored)
    return RemoteRunFolder(work, lease)


def bring_run(remote: Remote, work: Path, notify: Callable[[str], None]) -> None:
    """Have on this node what going on from the URL needs: its newest whole checkpoint and the records up to there.

    What is here and newer than that stays, as it may not have been sent any more. Several workers of one node may call
    this at once.

    Raises:
        StorageError: the storage cannot be reached, or the folder not be written.
    """
    try:
        (work / "checkpoints").mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise StorageError(f"cannot be written ({error.strerror})", str(work), "Set HNCSE_CACHE") from error
    with locked(work / ".fetch.lock", hint="Set HNCSE_CACHE", wait=True):
        newest_here = max((path.name for path in (work / "checkpoints").glob("step_*")), default="")
        for name in whole_folders(remote, "checkpoints"):
            try:
                fetch_folder(remote, f"checkpoints/{name}", work / "checkpoints" / name)
            except Damaged as error:
                notify(f"passed over: {error}")
                continue
            if name > newest_here or not (work / METRICS).exists():
                _fetch_records(remote, work)
            return


def _fetch_records(remote: Remote, work: Path) -> None:
    shutil.rmtree(work / "tensorboard", ignore_errors=True)
    for name in remote.names():
        if name in (METRICS, SAMPLES) or name.startswith("tensorboard/"):
            (work / name).parent.mkdir(parents=True, exist_ok=True)
            with replacing(work / name) as partial:
                remote.download(name, partial)


def _send_records(remote: Remote, work: Path) -> None:
    files = [work / METRICS, work / SAMPLES, *sorted((work / "tensorboard").rglob("*"))]
    for file in files:
        if file.is_file():
            remote.upload(file, str(file.relative_to(work)))


@dataclass(frozen=True)
class MirrorPlan:
    """What a rank needs to know to send to the URL; travels to the workers."""

    lease: Lease
    keep: int


def mirror_plan(folder: RunFolder) -> MirrorPlan | None:
    """Return how a claimed run is sent to its URL; None if it has none."""
    if not isinstance(folder, RemoteRunFolder):
        return None
    return MirrorPlan(folder.lease, keep=KEPT_CHECKPOINTS)


class RunMirror:
    """Sends the first rank's checkpoints, records and model to the URL, from a thread.

    Args:
        plan: where to, and as who.
        work: the local folder of the run.
        notify: told once when the storage fails, and when it is back.
    """

    def __init__(self, plan: MirrorPlan, work: Path, notify: Callable[[str], None]) -> None:
        self._plan, self._work = plan, work
        self._uploader = Uploader(plan.lease.remote.url, str(work), notify)

    @property
    def sending(self) -> str | None:
        """Name of the checkpoint that is being sent, and must not be deleted."""
        return self._uploader.sending

    def send_checkpoint(self, path: Path) -> None:
        """Have a checkpoint sent, and the metrics up to it; returns at once.

        Raises:
            LeaseLost: another process has taken the run over.
        """
        self._uploader.submit(path.name, lambda: self._send(path))

    def finish(self, newest: Path | None, model: Path | None) -> None:
        """Send all that the run leaves, its model if it has one yet, and wait for it.

        Raises:
            StorageError: it could not be sent; it is whole locally.
        """
        self._uploader.submit("the end of the run", lambda: self._send(newest, model))
        self._uploader.finish(PATIENCE_S)

    def give_up(self) -> None:
        """Wait a little for what is under way; for a run that has failed."""
        try:
            self._uploader.finish(_LAST_WORDS_S)
        except StorageError as error:
            logger.warning("%s", error)

    def _send(self, checkpoint: Path | None, model: Path | None = None) -> None:
        remote = self._plan.lease.remote
        self._plan.lease.check()
        # First the records: a checkpoint that is whole has all lines up to its step.
        _send_records(remote, self._work)
        if checkpoint is not None:
            whole = whole_folders(remote, "checkpoints")
            if model is None or checkpoint.name not in whole:
                send_folder(remote, f"checkpoints/{checkpoint.name}", checkpoint)
            older = [name for name in whole if name < checkpoint.name]
            # One beyond it is of a course that was not taken: it would be resumed from in place of this one.
            for name in [name for name in whole if name > checkpoint.name] + older[self._plan.keep - 1 :]:
                delete_folder(remote, f"checkpoints/{name}")
        if model is not None:
            send_folder(remote, "model", model)
