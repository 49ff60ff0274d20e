"""Workers that come and go: a run goes on with fewer of them while nodes are away, and takes more in as they fit.

Bundles for the missing ones are asked for by placement groups, one each: so Ray keeps them free once they are, and an
autoscaler starts nodes for them. Ray Train's own elastic policy (2.60) adds up what the nodes have, the negative pool's
share included, and would start more workers than fit.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import ray
from ray.experimental.internal_kv import _internal_kv_del, _internal_kv_get, _internal_kv_put
from ray.util.placement_group import PlacementGroup, placement_group, placement_group_table, remove_placement_group

from hncse_ray.cluster.resources import WorkerPlan
from hncse_ray.config import ClusterSettings
from hncse_ray.errors import ClusterError, counted
from hncse_ray.reporting import RunFinished

START_TIMEOUT_S = 30.0  # Ray Train may need so long to place workers that fit
_GRACE_S = 10.0  # to wait for the last ones when enough fit already
_POLL_S = 0.2
_MOST_IN_VAIN = 3


@dataclass(frozen=True)
class Bundles:
    """Bundles of workers, each a placement group of its own.

    Attributes:
        number: how many.
        each: what a worker reserves, by Ray's names.
        labels: of the nodes that they may be on.
    """

    number: int
    each: dict[str, float]
    labels: dict[str, str]

    @contextmanager
    def requested(self) -> Iterator[list[PlacementGroup]]:
        """Request them; on leaving they are given back."""
        selector = [self.labels] if self.labels else None
        groups = [placement_group([self.each], bundle_label_selector=selector) for _ in range(self.number)]
        try:
            yield groups
        finally:
            if ray.is_initialized():  # what a lost Ray held is gone
                for group in groups:
                    remove_placement_group(group)


class WorkersUnavailable(ClusterError):
    """The workers could not be placed and started in time."""


class Starts:
    """Knows when workers have last begun or resumed a run; Ray itself keeps it, so nothing of ours can lose it.

    Travels to the workers.
    """

    def __init__(self) -> None:
        self._key = f"hncse-start-{uuid.uuid4().hex}"

    def note(self) -> None:
        """Say that the workers begin; on the first of them."""
        _internal_kv_put(self._key, uuid.uuid4().bytes)

    def last(self) -> bytes | None:
        """Return what tells this start from those before; None if there was none."""
        return _internal_kv_get(self._key)

    def forget(self) -> None:
        """Leave nothing with Ray."""
        if ray.is_initialized():
            _internal_kv_del(self._key)


Attempt = Callable[[int, Bundles], RunFinished | None]


def fit_elastic(
    attempt: Attempt,
    plan: WorkerPlan,
    cluster: ClusterSettings,
    *,
    starts: Starts,
    notify: Callable[[str], None],
) -> RunFinished:
    """Train with as many of the planned workers as fit, and anew whenever that changes.

    Args:
        attempt: trains with so many workers until they have finished, or, which returns None, have paused because
            there is one of the missing bundles, or one of theirs will be taken away. Raises WorkersUnavailable when
            workers cannot be started, as a lost one whose bundle is gone. It asks for the missing ones when its own
            workers have their bundles, which Ray would else give away.
        plan: the most workers, and what each gets.
        cluster: the least, the labels of their nodes, and how long to wait for these.
        starts: where the workers note that they have begun.
        notify: told of each change.

    Raises:
        ClusterError: the least do not fit, or are said to and are refused again and again.
    """
    in_vain = 0
    while True:
        n = plan.num_workers if cluster.min_workers is None else _fitting(plan, cluster, cluster.min_workers)
        if n < plan.num_workers:
            notify(f"there is room for {n} of {plan.num_workers} workers; as soon as there is more, it is taken")
        before = starts.last()
        try:
            finished = attempt(n, Bundles(plan.num_workers - n, plan.each(), cluster.worker_labels))
        except WorkersUnavailable:
            in_vain = 0 if starts.last() != before else in_vain + 1
            if cluster.min_workers is None or in_vain == _MOST_IN_VAIN:
                raise
            notify("workers were lost: the run goes on with those that fit")
            continue
        if finished is not None:
            return finished


def placed(groups: Sequence[PlacementGroup]) -> int:
    """Return how many of these groups have their bundle now."""
    return sum(placement_group_table(group).get("state") == "CREATED" for group in groups)


def _fitting(plan: WorkerPlan, cluster: ClusterSettings, least: int) -> int:
    """Return how many workers fit; wait for the least, and a little for all.

    Raises:
        ClusterError: the least do not fit within ``start_timeout_s``.
    """
    begun = time.monotonic()
    with Bundles(plan.num_workers, plan.each(), cluster.worker_labels).requested() as groups:
        while (n := placed(groups)) < plan.num_workers:
            waited = time.monotonic() - begun
            if n >= least and waited > _GRACE_S:
                break
            if waited > cluster.start_timeout_s:
                raise ClusterError(
                    f"{counted(n, 'worker')} fitted after {waited:.0f} s, fewer than the least of {least}",
                    "cluster.min_workers", "Start the same command again when nodes are back, or lower it",
                )  # fmt: skip
            time.sleep(_POLL_S)
    return n
