"""Where the ranks of a run keep checkpoints and the model: in a folder that all see, or in local ones and at a URL."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path

import ray.train
from ray.train import Checkpoint, CheckpointUploadMode
from ray.util.placement_group import PlacementGroup

from hncse_ray.cluster.elastic import Places, placed
from hncse_ray.errors import StorageError
from hncse_ray.storage import write_folder
from hncse_ray.training.checkpoint import RunStore, Wish
from hncse_ray.training.distributed import from_first, raise_together, rank, world_size
from hncse_ray.training.remote_run import MirrorPlan, RunMirror
from hncse_ray.training.run_folder import RunFolder

logger = logging.getLogger(__name__)


@contextmanager
def run_store(
    folder: Path, mirror: MirrorPlan | None, notify: Callable[[str], None], missing: Places, least: int | None
) -> Iterator[RunStore]:
    """Open the store of a rank.

    Args:
        folder: of the run; with a mirror, that of this node.
        mirror: where copies go; None if all nodes see ``folder``.
        notify: told when copies cannot be sent, and when nodes are about to go or have come.
        missing: places of further workers, asked for meanwhile; when there is one, the run is asked to pause.
        least: how many workers are enough to go on with before others are taken away; None = wait until they are.

    Raises:
        StorageError: on leaving, if the last copies could not be sent.
    """
    with missing.asked_for() if missing.number and rank() == 0 else nullcontext() as groups:
        surroundings = _Surroundings(notify, missing.number, groups, least)
        if mirror is None:
            yield RayRunStore(folder, surroundings)
            return
        store = RemoteRunStore(folder, mirror, surroundings)
        try:
            yield store
        except BaseException:
            store.give_up()
            raise
        from_first(store.finish)  # the first rank sends what is left, and whether that went well is all ranks' outcome


class _Surroundings:
    """Nodes of the run's workers that will be taken away, such as spot instances, and new places for more workers."""

    def __init__(
        self,
        notify: Callable[[str], None],
        missing: int,
        groups: Sequence[PlacementGroup] | None,
        least: int | None,
    ) -> None:
        self.notify: Callable[[str], None] = notify if rank() == 0 else lambda text: None
        self._missing, self._groups, self._more, self._least = missing, groups, 0, least
        self._leaving = set[str]()

    def wish(self) -> Wish:
        """Say what they ask for that they had not when last asked; a barrier, and the same on every rank."""
        info = ray.train.get_preemption_info()  # Ray Train hears of it
        news = set(info.preempted_node_ids) - self._leaving if info is not None else set()
        self._leaving |= news
        if news:
            self.notify(f"{len(news)} node(s) of the workers will be taken away: a checkpoint is written now")
            if self._least is not None and world_size() - len(info.preempted_ranks) >= self._least:
                return Wish.PAUSE  # Ray places nothing more there
        before, self._more = self._more, self._count()
        if self._more and self._more == before:  # not while further ones are still coming
            self.notify(f"there is room for {self._more} more worker(s): they take part from the checkpoint of now")
            return Wish.PAUSE
        return Wish.CHECKPOINT if news else Wish.NOTHING

    def _count(self) -> int:
        if not self._missing:
            return 0
        return from_first(lambda: placed(self._groups or ()))


class RayRunStore:
    """Checkpoints under Ray Train's management, written straight into the run's folder; see RunStore.

    A checkpoint that was whole on disk when its run was killed, but not yet known to Ray Train, is used all the
    same, and removed once a newer one is there.
    """

    def __init__(self, folder: Path, surroundings: _Surroundings) -> None:
        self._folder, self._surroundings = RunFolder(folder), surroundings
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

    def wish(self) -> Wish:
        """Say what the nodes around ask for; a barrier."""
        return self._surroundings.wish()

    def export(self, write: Callable[[Path], None]) -> None:
        """Put the model in place."""
        write_folder(self._folder.model, write)


class RemoteRunStore:
    """Checkpoints in this node's folder of the run, sent to a URL from there; see RunStore.

    Ray Train does not manage them: its own state stays on the driver's node, where a run that is taken up on another
    machine could not read it.
    """

    def __init__(self, folder: Path, plan: MirrorPlan, surroundings: _Surroundings) -> None:
        self._folder, self._keep, self._surroundings = RunFolder(folder), plan.keep, surroundings
        context = ray.train.get_context()
        self._mirror = RunMirror(plan, folder, surroundings.notify) if context.get_world_rank() == 0 else None
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

    def wish(self) -> Wish:
        """Say what the nodes around ask for; a barrier."""
        return self._surroundings.wish()

    def export(self, write: Callable[[Path], None]) -> None:
        """Put the model in place; it is sent at the end."""
        write_folder(self._folder.model, write)

    def finish(self) -> None:
        """Wait until all is sent.

        Raises:
            StorageError: it could not be sent.
        """
        if self._mirror is not None:
            model = self._folder.model
            self._mirror.finish(next(iter(self.checkpoints()), None), model if model.is_dir() else None)

    def give_up(self) -> None:
        """Wait a little for what is being sent."""
        if self._mirror is not None:
            self._mirror.give_up()


def _checkpoints(folder: RunFolder) -> list[Path]:
    return sorted(folder.checkpoints.glob("step_*"), reverse=True)
