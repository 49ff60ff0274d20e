"""Where the ranks of a run keep checkpoints and the model: in the run's folder, and at a URL if the run has one."""

from __future__ import annotations

import logging
import re
import shutil
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Self

from hncse_ray.errors import StorageError
from hncse_ray.storage import locked, write_folder
from hncse_ray.storage.remote import Remote
from hncse_ray.storage.sending import Sender, keep_trying
from hncse_ray.training.checkpoint import Damaged, Request, read_state
from hncse_ray.training.distributed import from_first, rank
from hncse_ray.training.run_folder import LAST_FILE, PATIENCE_S, RECORDS, RunFolder

logger = logging.getLogger(__name__)

_KEPT_CHECKPOINTS = 2  # the newest, and the one before it in case the newest was damaged
_OF_CHECKPOINT = re.compile(r"checkpoints/(step_[0-9]+)/.+")
_LAST_WORDS_S = 20.0  # of a run that fails, and has a cause of its own to tell


class FolderStore:
    """Checkpoints and the model of a run, for one rank; see RunStore. A context: what is left is sent on leaving.

    Args:
        folder: of the run, on this node.
        notify: told when copies cannot be sent.
        is_first_on_node: whether this rank is the first of its node.
        requested: says what is asked of the run, to all ranks alike.
    """

    def __init__(
        self,
        folder: RunFolder,
        notify: Callable[[str], None],
        *,
        is_first_on_node: bool = True,
        requested: Callable[[], Request] = lambda: Request.NOTHING,
    ) -> None:
        self._folder, self.requested = folder, requested
        self._cleans = rank() == 0 if folder.lease is None else is_first_on_node  # one rank for each folder
        self._sender = Sender(self._send, notify) if folder.lease is not None and rank() == 0 else None
        self._sending = ""

    def checkpoints(self) -> list[Path]:
        """Return the checkpoints on disk, newest first."""
        return sorted(self._folder.checkpoints.glob("step_*"), reverse=True)

    def save(self, step: int, write: Callable[[Path], None] | None) -> None:
        """Write on rank 0, begin to send it if the run has a URL, and remove old ones.

        Raises:
            StorageError: it could not be written, or another process has taken the run over.
        """
        name = f"step_{step:09d}"
        if write is not None:
            write_folder(self._folder.checkpoints / name, write)
            _remove_halves(self._folder)
        if self._cleans:
            for old in superseded([path.name for path in self.checkpoints()], name):
                if old != self._sending:
                    shutil.rmtree(self._folder.checkpoints / old, ignore_errors=True)
        if self._sender is not None:
            self._sender.wake()

    def export(self, write: Callable[[Path], None]) -> None:
        """Put the model in place; it is sent at the end."""
        write_folder(self._folder.model, write)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        """Have sent what is left; of a run that fails as far as it goes quickly: it has a cause of its own to tell.

        Raises:
            StorageError: it could not be sent, which is all ranks' outcome; it is whole in the folder.
        """
        if error is None:
            from_first(lambda: self._finish(PATIENCE_S))
            return
        try:
            self._finish(_LAST_WORDS_S)
        except StorageError as unsent:
            logger.warning("%s", unsent)

    def _finish(self, timeout_s: float) -> None:
        try:
            if self._sender is not None:
                self._sender.finish(timeout_s)
        except TimeoutError as error:
            raise self._folder.not_stored("the last state", f"not in {timeout_s:g} s") from error

    def _send(self) -> None:
        """Send the records, the newest checkpoint and the model if there is one; called in the thread that sends."""
        folder, newest = self._folder, next(iter(self.checkpoints()), None)
        assert folder.lease is not None
        remote = folder.lease.remote
        self._sending = "" if newest is None else newest.name  # until it is sent, it stays here
        folder.send(*RECORDS)  # first: a checkpoint that is whole has all lines up to its step
        if newest is not None:
            if remote.read(f"checkpoints/{newest.name}/{LAST_FILE}") != (newest / LAST_FILE).read_bytes():
                folder.send(f"checkpoints/{newest.name}")
            whole = stored_checkpoints(remote)
            old = superseded(whole, newest.name)
            for name in old:
                remote.delete(f"checkpoints/{name}/{LAST_FILE}")
            kept = set(whole) - set(old)
            for file in remote.names("checkpoints"):  # of those, and of such as were not sent to the end
                if (match := _OF_CHECKPOINT.fullmatch(file)) and match[1] not in kept:
                    remote.delete(file)
        self._sending = ""
        folder.send("model")


def _remove_halves(folder: RunFolder) -> None:
    """Remove checkpoints of processes that were killed while they wrote; only while nobody writes one.

    The first rank does when it has written its own. Nodes may share a cache, so the others must not meanwhile.
    """
    for half in folder.checkpoints.glob(".step_*"):
        shutil.rmtree(half, ignore_errors=True)


def superseded(checkpoints: Sequence[str], newest: str) -> list[str]:
    """Return the names of checkpoints that are not needed once there is a newest one.

    One beyond it is of a course that was not taken: it would be resumed from in place of this one.
    """
    kept = sorted((name for name in checkpoints if name <= newest), reverse=True)[:_KEPT_CHECKPOINTS]
    return [name for name in checkpoints if name not in kept]


def stored_checkpoints(remote: Remote) -> list[str]:
    """Return the names of the checkpoints at a URL that were sent to the end, newest first.

    ``step_`` and digits: the names become local paths, and whoever writes to a bucket could have made up any.
    """
    pattern = re.compile(rf"checkpoints/(step_[0-9]+)/{re.escape(LAST_FILE)}")
    return sorted(
        (match[1] for name in remote.names("checkpoints") if (match := pattern.fullmatch(name))), reverse=True
    )


def fetch_run(folder: RunFolder, notify: Callable[[str], None]) -> None:
    """Have on this node what resuming needs: of a run at a URL the newest whole checkpoint, and the records up to it.

    What is here and newer stays, as it may not have been sent any more. Several workers of one node may call this at
    once.

    Raises:
        StorageError: the storage cannot be reached for long, or the folder not be written.
    """
    if folder.lease is not None:
        with locked(folder.path / ".fetch.lock", hint="Set HNCSE_CACHE", wait=True):
            keep_trying(partial(_fetch, folder, folder.lease.remote, notify), timeout_s=PATIENCE_S)


def _fetch(folder: RunFolder, remote: Remote, notify: Callable[[str], None]) -> None:
    _remove_halves(folder)
    newest_here = max((path.name for path in folder.checkpoints.glob("step_*")), default="")
    for name in stored_checkpoints(remote):
        below = f"checkpoints/{name}"
        try:
            if not _is_same(folder.checkpoints / name, remote.read(f"{below}/{LAST_FILE}")):
                records_to = folder.path if name > newest_here else None
                write_folder(folder.checkpoints / name, partial(_fetch_checkpoint, remote, below, records_to))
            return
        except Damaged as error:
            notify(f"passed over: {remote.url}/{below}: {error.what}")


def _fetch_checkpoint(remote: Remote, below: str, records_to: Path | None, new: Path) -> None:
    """Fill a new folder, and fetch the records first: where the checkpoint is, they are."""
    for file in remote.names(below):
        remote.download(file, new / file.removeprefix(f"{below}/"))
    read_state(new)
    if records_to is not None:
        shutil.rmtree(records_to / "tensorboard", ignore_errors=True)
        for file in remote.names():
            if file.partition("/")[0] in RECORDS:
                remote.download(file, records_to / file)


def _is_same(checkpoint: Path, stored: bytes | None) -> bool:
    """Say whether a checkpoint is here, whole, and the one whose ``state.json`` with its digests is at the URL."""
    try:
        read_state(checkpoint)
        return (checkpoint / LAST_FILE).read_bytes() == stored
    except Damaged:
        return False
