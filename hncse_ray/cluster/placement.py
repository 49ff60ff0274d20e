"""Where trainers and pool may be placed: labelled nodes, and whether the request fits what is or may be there."""

from __future__ import annotations

import logging
import threading
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace

import ray
from ray._private.state import state
from ray.core.generated.gcs_pb2 import PlacementGroupTableData
from ray.experimental.internal_kv import _internal_kv_get
from ray.util.placement_group import PlacementGroup, remove_placement_group

from hncse_ray.cluster.resources import PoolPlan, WorkerPlan, plan_pool, plan_workers
from hncse_ray.config import ClusterSettings, Settings
from hncse_ray.config.sections import ACCELERATOR_LABEL
from hncse_ray.errors import ClusterError, counted

logger = logging.getLogger(__name__)

_LOOK_FOR_ORPHANS_S = 2.0


@dataclass(frozen=True)
class Node:
    """A node that is alive."""

    labels: Mapping[str, str]
    resources: Mapping[str, float]


@dataclass(frozen=True)
class Nodes:
    """The nodes of a cluster.

    Attributes:
        alive: those there are.
        growing: whether an autoscaler may add some; what is missing may come then.
    """

    alive: tuple[Node, ...]
    growing: bool = False

    def labelled(self, selector: Mapping[str, str], setting: str) -> tuple[Node, ...]:
        """Return the nodes that a label selector allows.

        Raises:
            ClusterError: there is none, and none can come.
        """
        found = tuple(node for node in self.alive if matches(node.labels, selector))
        if not found and not self.growing:
            wanted = ", ".join(f"{key}={value}" for key, value in selector.items())
            there = Counter(
                ", ".join(
                    f"{key}={value}"
                    for key, value in sorted(node.labels.items())
                    if key == ACCELERATOR_LABEL or not key.startswith("ray.io/")
                )
                or "no label"
                for node in self.alive
            )
            raise ClusterError(
                f"no node of the cluster has the label {wanted}; there are "
                + "; ".join(f"{count} with {labels}" for labels, count in sorted(there.items())),
                setting,
                "Start nodes with `ray start --labels ...`, or change the setting",
            )
        return found


def survey() -> Nodes:
    """Return the nodes of the cluster that this process is connected to."""
    alive = tuple(Node(node["Labels"], node["Resources"]) for node in ray.nodes() if node["Alive"])
    return Nodes(alive, growing=_internal_kv_get("__autoscaler_v2_enabled", namespace="__autoscaler") == b"1")


def check_workers(workers: int) -> float:
    """See that a cluster has a CPU for each worker; return how many it has.

    Raises:
        ClusterError: it has not.
    """
    cpus = sum(node.resources.get("CPU", 0.0) for node in survey().alive)
    if workers > cpus:
        raise ClusterError(f"{counted(workers, 'worker')} x 1 CPU = {workers}, but the cluster has {cpus:g}",
                           "--workers", "Ask for fewer")  # fmt: skip
    return cpus


def matches(labels: Mapping[str, str], selector: Mapping[str, str]) -> bool:
    """Say whether Ray would place what has this label selector on a node with these labels.

    A value is ``x``, ``!x``, ``in(x,y)`` or ``!in(x,y)``.
    """
    return all(_allows(condition, labels.get(key)) for key, condition in selector.items())


def _allows(condition: str, value: str | None) -> bool:
    wanted = condition.removeprefix("!")
    if wanted.startswith("in(") and wanted.endswith(")"):
        is_one = value in [option.strip() for option in wanted[3:-1].split(",")]
    else:
        is_one = value == wanted
    return is_one != condition.startswith("!")


def total(nodes: tuple[Node, ...]) -> dict[str, float]:
    """Add the resources of nodes up."""
    return dict(sum((Counter(node.resources) for node in nodes), Counter()))


def place(settings: Settings, nodes: Nodes, *, rows: int, dimension: int) -> tuple[WorkerPlan, PoolPlan | None]:
    """Plan the workers of a run and the index of its global negatives, if it uses any.

    Raises:
        ClusterError: they do not fit, and nothing can come that they would fit.
    """
    if settings.negatives.source == "none":
        return place_workers(settings, nodes, None), None
    if settings.negatives.source == "pool":
        pool = place_pool(settings, nodes, rows=rows, dimension=dimension)
        return place_workers(settings, nodes, pool), pool
    workers = place_workers(settings, nodes, None)  # the index is in the first of them
    index = plan_pool(
        settings.negatives,
        [node.resources for node in _for_workers(settings.cluster, nodes)],
        rows=rows,
        dimension=dimension,
        growing=nodes.growing,
        on_trainers_gpu=workers.gpus > 0,
    )
    return workers, index


def place_pool(settings: Settings, nodes: Nodes, *, rows: int, dimension: int) -> PoolPlan:
    """Plan the pool for the nodes that its labels allow.

    Without labels of its own, shards that share the trainers' CPUs go to the trainers' nodes, if these hold them.

    Raises:
        ClusterError: it does not fit, and nothing can come that it would fit.
    """
    cluster, negatives = settings.cluster, settings.negatives

    def planned(allowed: tuple[Node, ...], labels: Mapping[str, str]) -> PoolPlan:
        on_each = [node.resources for node in allowed]
        plan = plan_pool(negatives, on_each, rows=rows, dimension=dimension, growing=nodes.growing)
        return replace(plan, labels=labels)

    if cluster.worker_labels and not (cluster.pool_labels or negatives.cpus_per_shard or negatives.gpus_per_shard):
        try:
            return planned(_for_workers(cluster, nodes), cluster.worker_labels)
        except ClusterError as error:
            logger.info("the shards are not kept to the trainers' nodes: %s", error)
    return planned(nodes.labelled(cluster.pool_labels, "cluster.pool_labels"), cluster.pool_labels)


def _for_workers(cluster: ClusterSettings, nodes: Nodes) -> tuple[Node, ...]:
    setting = "cluster.accelerator_type" if cluster.accelerator_type else "cluster.trainer_labels"
    return nodes.labelled(cluster.worker_labels, setting)


def place_workers(settings: Settings, nodes: Nodes, pool: PoolPlan | None) -> WorkerPlan:
    """Plan the workers for the nodes that their labels allow, beside a pool that may share some of these.

    Where there may be fewer workers, each gets what it would if there were as many as fit now.

    Raises:
        ClusterError: not even the least fit, and nothing can come that they would fit.
    """
    cluster = settings.cluster
    allowed = _for_workers(cluster, nodes)
    there = Counter(total(allowed))
    if pool is not None:
        apart = (n for n in nodes.alive if not matches(n.labels, cluster.worker_labels))
        elsewhere = total(tuple(n for n in apart if matches(n.labels, pool.labels)))
        for name, amount in (("CPU", pool.cpus), ("GPU", pool.gpus)):  # the pool takes these first
            there[name] += min(amount * pool.num_shards, elsewhere.get(name, 0.0))
    on_each = [node.resources for node in allowed]
    least = cluster.min_workers or cluster.num_workers
    for n in range(cluster.num_workers, least - 1, -1):
        try:
            fewer = cluster.model_copy(update={"num_workers": n})
            plan = plan_workers(fewer, there, pool, nodes=on_each, growing=nodes.growing)
            return replace(plan, num_workers=cluster.num_workers)
        except ClusterError:
            if n == least:
                raise
    raise AssertionError(least)


@contextmanager
def without_orphaned_groups() -> Iterator[None]:
    """Meanwhile, remove this job's placement groups whose creator, an actor, is dead.

    Ray keeps them until the job ends. Ray Train's controller (2.60) may be ended with a trial of a sweep just when it
    has asked for one, and the first worker of an elastic run be lost while it asks for more: what is in them would be
    missing for the rest of the sweep, or of the run.
    """
    job, over = ray.get_runtime_context().get_job_id(), threading.Event()

    def look() -> None:
        while not over.wait(_LOOK_FOR_ORPHANS_S):
            try:
                for group in orphaned_groups(job):
                    logger.info("resources held for a process that is gone are released")
                    remove_placement_group(group)
            except Exception as error:
                logger.warning("cannot look for resources that are held for nobody (%s)", error)

    thread = threading.Thread(target=look, name="orphaned-groups", daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


def orphaned_groups(job: str) -> list[PlacementGroup]:
    """Return the placement groups of a job whose creator, an actor, is dead.

    Ray's public table of groups does not name their creators. Its own mark, ``creator_actor_dead``, is missing where
    the actor's request arrived after its death.
    """
    found = []
    for entry in state._connect_and_get_accessor().get_placement_group_table():
        group = PlacementGroupTableData.FromString(entry)
        creator = ray.ActorID(group.creator_actor_id)
        here = group.creator_job_id.hex() == job and group.state != PlacementGroupTableData.REMOVED
        if here and not creator.is_nil() and not group.is_detached:
            if group.creator_actor_dead or state.actor_table(creator.hex()).get("State") == "DEAD":
                found.append(PlacementGroup(ray.PlacementGroupID(group.placement_group_id)))
    return found
