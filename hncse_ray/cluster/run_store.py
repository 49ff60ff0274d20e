"""Where the ranks of a run keep checkpoints and the model: in a folder that all see, or in local ones and at a URL."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import ray.train
from ray.train import Checkpoint, CheckpointUploadMode

from hncse_ray.errors import StorageError
from hncse_ray.storage import write_folder
from hncse_ray.training.checkpoint import RunStore
from hncse_ray.training.distributed import raise_together
from hncse_ray.training.remote_run import MirrorPlan, RunMirror
from hncse_ray.training.run_folder import RunFolder

logger = logging.getLogger(__name__)


@contextmanager
def run_store(folder: Path, mirror: MirrorPlan | None, notify: Callable[[str], None]) -> Iterator[RunStore]:
    """Open the store of a rank.

    Args:
        folder: of the run; with a mirror, that of this node.
        mirror: where copies go; None if all nodes see ``folder``.
        notify: told when copies cannot be sent, and when a node is about to be taken away.

    Raises:
        StorageError: on leaving, if the last copies could not be sent.
    """
    if mirror is None:
        yield RayRunStore(folder, notify)
        return
    store = RemoteRunStore(folder, mirror, notify)
    try:
        yield store
    except BaseException:
        store.give_up()
        raise
    store.finish()


class _Departures:
    """Nodes of the run's workers that are about to be taken away, such as spot instances; Ray Train hears of it."""

    def __init__(self, notify: Callable[[str], None]) -> None:
        self._notify, self._known = notify, set[str]()

    def is_news(self) -> bool:
        """Say whether there is one that was not there when last asked; a barrier, and the same on every rank."""
        info = ray.train.get_preemption_info()
        leaving = set(info.preempted_node_ids) - self._known if info is not None else set()
        self._known |= leaving
        if leaving and ray.train.get_context().get_world_rank() == 0:
            self._notify(f"{len(leaving)} node(s) of the workers will be taken away: a checkpoint is written now")
        return bool(leaving)


class RayRunStore:
    """Checkpoints under Ray Train's management, written straight into the run's folder; see RunStore.

    A checkpoint that was whole on disk when its run was killed, but not yet known to Ray Train, is used all the
    same, and removed once a newer one is there.
    """

    def __init__(self, folder: Path, notify: Callable[[str], None]) -> None:
        self._folder, self._departures = RunFolder(folder), _Departures(notify)
        reported = {Path(r.checkpoint.path).name for r in ray.train.get_all_reported_checkpoints()}
        self._unreported = [path for path in self.checkpoints() if path.name not in reported]

    def checkpoints(self) -> list[Path]:
        """Return the checkpoints on disk, newest first."""
        return _checkpoints(self._folder)

    def save(self, step: int, write: Callable[[Path], None]) -> None:
        """Write on rank 0, then report on all ranks.

        Raises:
            StorageError: on every rank, if it could not be written.
        """
        path = self._folder.checkpoints / f"step_{step:09d}"
        is_first = ray.train.get_context().get_world_rank() == 0
        failure: StorageError | None = None
        if is_first:
            try:
                write_folder(path, write)
            except StorageError as error:
                failure = error
        raise_together(failure)
        checkpoint = Checkpoint(str(path)) if is_first else None
        ray.train.report({"step": step}, checkpoint, checkpoint_upload_mode=CheckpointUploadMode.NO_UPLOAD)
        if is_first:
            for leftover in self._unreported:
                if leftover != path:
                    shutil.rmtree(leftover, ignore_errors=True)
            self._unreported = []

    def wants_one_now(self) -> bool:
        """Say whether a node is about to be taken away."""
        return self._departures.is_news()

    def export(self, write: Callable[[Path], None]) -> None:
        """Put the model in place."""
        write_folder(self._folder.model, write)


class RemoteRunStore:
    """Checkpoints in this node's folder of the run, sent to a URL from there; see RunStore.

    Ray Train does not manage them: its own state stays on the driver's node, where a run that is taken up on another
    machine could not read it.
    """

    def __init__(self, folder: Path, plan: MirrorPlan, notify: Callable[[str], None]) -> None:
        self._folder, self._keep, self._departures = RunFolder(folder), plan.keep, _Departures(notify)
        context = ray.train.get_context()
        self._mirror = RunMirror(plan, folder, notify) if context.get_world_rank() == 0 else None
        self._cleans = context.get_local_rank() == 0

    def checkpoints(self) -> list[Path]:
        """Return the checkpoints of this node, newest first."""
        return _checkpoints(self._folder)

    def save(self, step: int, write: Callable[[Path], None]) -> None:
        """Write on rank 0, begin to send it, and remove old ones of every node.

        Raises:
            StorageError: on every rank, if it could not be written, or another process has taken the run over.
        """
        path = self._folder.checkpoints / f"step_{step:09d}"
        failure: StorageError | None = None
        if self._mirror is not None:
            try:
                write_folder(path, write)
                self._mirror.send_checkpoint(path)
            except StorageError as error:
                failure = error
        raise_together(failure)
        if self._cleans:
            past = [found for found in self.checkpoints() if found.name <= path.name]
            sending = None if self._mirror is None else self._mirror.sending
            for old in self.checkpoints():
                if old not in past[: self._keep] and old.name != sending:
                    shutil.rmtree(old, ignore_errors=True)

    def wants_one_now(self) -> bool:
        """Say whether a node is about to be taken away."""
        return self._departures.is_news()

    def export(self, write: Callable[[Path], None]) -> None:
        """Put the model in place; it is sent at the end."""
        write_folder(self._folder.model, write)

    def finish(self) -> None:
        """Wait until all is sent.

        Raises:
            StorageError: it could not be sent.
        """
        if self._mirror is not None:
            self._mirror.finish(next(iter(self.checkpoints()), None), self._folder.model)

    def give_up(self) -> None:
        """Wait a little for what is being sent."""
        if self._mirror is not None:
            self._mirror.give_up()


def _checkpoints(folder: RunFolder) -> list[Path]:
    return sorted(folder.checkpoints.glob("step_*"), reverse=True)
