"""What the nodes of a run ask of it: a checkpoint where one will be taken away, a pause where more workers fit."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext

import ray.train
from ray.util.placement_group import PlacementGroup

from hncse_ray.cluster.elastic import Bundles, placed
from hncse_ray.errors import counted
from hncse_ray.training.checkpoint import Request
from hncse_ray.training.distributed import from_first, rank, world_size


@contextmanager
def watch_nodes(notify: Callable[[str], None], missing: Bundles, least: int | None) -> Iterator[NodeWatch]:
    """Watch the nodes of a run's workers, and request bundles of further workers meanwhile.

    Args:
        notify: told when nodes are about to go or have come.
        missing: bundles of further workers; when one is placed, the run is asked to pause.
        least: how many workers are enough to go on with before others are taken away; None = wait until they are.
    """
    with missing.requested() if missing.number and rank() == 0 else nullcontext() as groups:
        yield NodeWatch(notify, missing.number, groups, least)


class NodeWatch:
    """Nodes of the run's workers that will be taken away, such as spot instances, and bundles for more workers."""

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

    def requested(self) -> Request:
        """Say what they ask for that they had not when last asked; a barrier, and the same on every rank."""
        info = ray.train.get_preemption_info()  # Ray Train hears of it
        news = set(info.preempted_node_ids) - self._leaving if info is not None else set()
        self._leaving |= news
        if news:
            self.notify(f"{counted(len(news), 'node')} of the workers will be taken away: a checkpoint is written now")
            if self._least is not None and world_size() - len(info.preempted_ranks) >= self._least:
                return Request.PAUSE  # Ray places nothing more there
        before, self._more = self._more, self._count()
        if self._more and self._more == before:  # not while further ones are still coming
            self.notify(f"{counted(self._more, 'more worker')} can be had now, from this checkpoint on")
            return Request.PAUSE
        return Request.CHECKPOINT if news else Request.NOTHING

    def _count(self) -> int:
        if not self._missing:
            return 0
        return from_first(lambda: placed(self._groups or ()))
