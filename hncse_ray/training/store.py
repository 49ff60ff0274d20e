"""Where the ranks of a run keep checkpoints and the model: in the run's folder, and at a URL if the run has one."""

from __future__ import annotations

import logging
import re
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path

from hncse_ray.errors import StorageError
from hncse_ray.storage import Remote, Sender, keep_trying, locked, replacing, write_folder
from hncse_ray.training.checkpoint import LAST_FILE, Request, read_state
from hncse_ray.training.distributed import from_first, rank
from hncse_ray.training.run_folder import PATIENCE_S, RECORDS, RunFolder, make_folder

logger = logging.getLogger(__name__)

_KEPT_CHECKPOINTS = 2  # the newest, and the one before it in case the newest was damaged
_LAST_WORDS_S = 20.0  # of a run that fails, and has a cause of its own to tell


class FolderStore:
    """Checkpoints and the model in a folder; see RunStore. Made by :func:`folder_store`.

    Args:
        folder: of the run; of one at a URL, that of this node.
        notify: told when copies cannot be sent; None if this rank sends none.
        cleans: whether this rank removes old checkpoints: one rank for each folder.
        requested: says what is asked of the run, to all ranks alike.
    """

    def __init__(
        self, folder: RunFolder, notify: Callable[[str], None] | None, *, cleans: bool, requested: Callable[[], Request]
    ) -> None:
        self._folder, self._cleans, self.requested = folder, cleans, requested
        self._sender = None if notify is None else Sender(self._send, notify)
        self._sending, self._sent, self._is_last = "", "", False

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
        if self._cleans:
            for old in superseded([path.name for path in self.checkpoints()], name):
                if old != self._sending:
                    shutil.rmtree(self._folder.checkpoints / old, ignore_errors=True)
            for half in self._folder.checkpoints.glob(".step_*"):  # of a process that was killed while it wrote
                shutil.rmtree(half, ignore_errors=True)
        if write is not None and self._sender is not None:
            self._sender.wake()

    def export(self, write: Callable[[Path], None]) -> None:
        """Put the model in place; it is sent at the end."""
        write_folder(self._folder.model, write)

    def finish(self) -> None:
        """Send all that the run leaves, its model if it has one yet, and wait for it.

        Raises:
            StorageError: it could not be sent; it is whole in the folder.
        """
        if self._sender is not None:
            self._is_last = True
            self._sender.wake()
            self._wait(PATIENCE_S)

    def give_up(self) -> None:
        """Wait a little for what is under way; for a run that has failed."""
        try:
            self._wait(_LAST_WORDS_S)
        except StorageError as error:
            logger.warning("%s", error)

    def _wait(self, timeout_s: float) -> None:
        try:
            if self._sender is not None:
                self._sender.finish(timeout_s)
        except TimeoutError as error:
            raise self._folder.not_stored("the last state", f"not in {timeout_s:g} s") from error

    def _send(self) -> None:
        """Send the newest checkpoint with the records, and at the end the model; called in the thread that sends."""
        folder, is_last, newest = self._folder, self._is_last, next(iter(self.checkpoints()), None)
        assert folder.lease is not None
        self._sending = "" if newest is None else newest.name  # until it is sent, it stays here
        folder.lease.check()
        for name in RECORDS:  # first: a checkpoint that is whole has all lines up to its step
            folder.send(name)
        if newest is not None and newest.name != self._sent:
            remote = folder.lease.remote
            remote.delete(f"checkpoints/{newest.name}/{LAST_FILE}")
            folder.send(f"checkpoints/{newest.name}", last=LAST_FILE)
            for name in superseded(stored_checkpoints(remote), newest.name):
                for file in [f"checkpoints/{name}/{LAST_FILE}", *remote.names(f"checkpoints/{name}")]:
                    remote.delete(file)
        self._sending, self._sent = "", self._sending
        if is_last:
            folder.send("model")


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


class _Damaged(StorageError):
    """A checkpoint at a URL is not what was sent."""


def fetch_run(folder: RunFolder, notify: Callable[[str], None]) -> None:
    """Have on this node what resuming needs: of a run at a URL the newest whole checkpoint, and the records up to it.

    What is here and newer stays, as it may not have been sent any more. Several workers of one node may call this at
    once.

    Raises:
        StorageError: the storage cannot be reached for long, or the folder not be written.
    """
    if folder.lease is not None:
        make_folder(folder.checkpoints, "Set HNCSE_CACHE")
        remote = folder.lease.remote
        with locked(folder.path / ".fetch.lock", hint="Set HNCSE_CACHE", wait=True):
            keep_trying(lambda: _fetch(remote, folder, notify), timeout_s=PATIENCE_S)


def _fetch(remote: Remote, folder: RunFolder, notify: Callable[[str], None]) -> None:
    newest_here = max((path.name for path in folder.checkpoints.glob("step_*")), default="")
    for name in stored_checkpoints(remote):
        target, below = folder.checkpoints / name, f"checkpoints/{name}"
        try:
            if not _is_same(target, remote.read(f"{below}/{LAST_FILE}")):
                write_folder(target, partial(_fetch_checkpoint, remote, below))
        except _Damaged as error:
            notify(f"passed over: {error}")
            continue
        if name > newest_here or not (folder.path / RECORDS[0]).exists():
            _fetch_records(remote, folder.path)
        return


def _is_same(checkpoint: Path, stored: bytes | None) -> bool:
    """Say whether a checkpoint is here, whole, and the one whose ``state.json`` with its digests is at the URL."""
    try:
        read_state(checkpoint)
        return (checkpoint / LAST_FILE).read_bytes() == stored
    except StorageError:
        return False


def _fetch_checkpoint(remote: Remote, below: str, folder: Path) -> None:
    for name in remote.names(below):
        file = folder / name.removeprefix(f"{below}/")
        file.parent.mkdir(parents=True, exist_ok=True)
        remote.download(name, file)
    try:
        read_state(folder)
    except StorageError as error:
        raise _Damaged(error.what, f"{remote.url}/{below}") from error


def _fetch_records(remote: Remote, work: Path) -> None:
    shutil.rmtree(work / "tensorboard", ignore_errors=True)
    for name in remote.names():
        if name.partition("/")[0] in RECORDS:
            (work / name).parent.mkdir(parents=True, exist_ok=True)
            with replacing(work / name) as record:
                remote.download(name, record)


@contextmanager
def folder_store(
    folder: RunFolder,
    notify: Callable[[str], None],
    *,
    is_first_on_node: bool = True,
    requested: Callable[[], Request] = lambda: Request.NOTHING,
) -> Iterator[FolderStore]:
    """Open the store of a rank.

    Args:
        folder: of the run, on this node.
        notify: told when copies cannot be sent.
        is_first_on_node: whether this rank is the first of its node.
        requested: see :class:`FolderStore`.

    Raises:
        StorageError: on leaving, if the last copies could not be sent.
    """
    is_at_url, is_first = folder.lease is not None, rank() == 0
    cleans = is_first_on_node if is_at_url else is_first
    store = FolderStore(folder, notify if is_at_url and is_first else None, cleans=cleans, requested=requested)
    try:
        yield store
    except BaseException:
        store.give_up()
        raise
    from_first(store.finish)  # the first rank sends what is left, and whether that went well is all ranks' outcome
