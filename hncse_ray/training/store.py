"""Where the ranks of a run keep checkpoints and the model: in the run's folder, and at a URL if the run has one."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from hncse_ray.storage import write_folder
from hncse_ray.training.checkpoint import Request
from hncse_ray.training.distributed import from_first, rank
from hncse_ray.training.remote_run import MirrorPlan, RunMirror
from hncse_ray.training.run_folder import KEPT_CHECKPOINTS, RunFolder


class FolderStore:
    """Checkpoints and the model in a folder; see RunStore. Made by :func:`folder_store`.

    Args:
        folder: of the run; with a mirror, that of this node.
        mirror: sends copies to the run's URL; on the first rank of a run that has one.
        cleans: whether this rank removes old checkpoints: one rank for each folder.
        requested: says what is asked of the run, to all ranks alike.
    """

    def __init__(
        self, folder: Path, mirror: RunMirror | None, *, cleans: bool, requested: Callable[[], Request]
    ) -> None:
        self._folder, self._mirror, self._cleans, self.requested = RunFolder(folder), mirror, cleans, requested

    def checkpoints(self) -> list[Path]:
        """Return the checkpoints on disk, newest first."""
        return sorted(self._folder.checkpoints.glob("step_*"), reverse=True)

    def save(self, step: int, write: Callable[[Path], None] | None) -> None:
        """Write on rank 0, begin to send it if there is a mirror, and remove old ones.

        Raises:
            StorageError: it could not be written, or another process has taken the run over.
        """
        path = self._folder.checkpoints / f"step_{step:09d}"
        if write is not None:
            write_folder(path, write)
            if self._mirror is not None:
                self._mirror.send_checkpoint(path)
        if self._cleans:
            past = [found for found in self.checkpoints() if found.name <= path.name]
            sending = None if self._mirror is None else self._mirror.sending
            for old in self.checkpoints():
                if old not in past[:KEPT_CHECKPOINTS] and old.name != sending:
                    shutil.rmtree(old, ignore_errors=True)
            for half in self._folder.checkpoints.glob(".step_*"):  # of a process that was killed while it wrote
                shutil.rmtree(half, ignore_errors=True)

    def export(self, write: Callable[[Path], None]) -> None:
        """Put the model in place; with a mirror it is sent at the end."""
        write_folder(self._folder.model, write)

    def finish(self) -> None:
        """Wait until all is sent.

        Raises:
            StorageError: it could not be sent.
        """
        if self._mirror is not None:
            model = self._folder.model
            self._mirror.finish(next(iter(self.checkpoints()), None), model if model.is_dir() else None)


def _nothing() -> Request:
    return Request.NOTHING


@contextmanager
def folder_store(
    folder: Path,
    plan: MirrorPlan | None,
    notify: Callable[[str], None],
    *,
    is_first_on_node: bool = True,
    requested: Callable[[], Request] = _nothing,
) -> Iterator[FolderStore]:
    """Open the store of a rank.

    Args:
        folder: of the run; with a mirror, that of this node.
        plan: where copies go; None if all nodes see ``folder``.
        notify: told when copies cannot be sent.
        is_first_on_node: whether this rank is the first of its node.
        requested: see :class:`FolderStore`.

    Raises:
        StorageError: on leaving, if the last copies could not be sent.
    """
    mirror = RunMirror(plan, folder, notify) if plan is not None and rank() == 0 else None
    store = FolderStore(
        folder, mirror, cleans=is_first_on_node if plan is not None else rank() == 0, requested=requested
    )
    try:
        yield store
    except BaseException:
        if mirror is not None:
            mirror.give_up()
        raise
    from_first(store.finish)  # the first rank sends what is left, and whether that went well is all ranks' outcome
