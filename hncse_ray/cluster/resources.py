"""Preflight arithmetic: does the request fit the cluster? Pure; no Ray call is made here."""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

from hncse_ray.config import ClusterSettings, NegativesSettings, Settings
from hncse_ray.errors import ClusterError, counted
from hncse_ray.negatives import IndexPlan, plan_index

Resources = Mapping[str, float]

_ANY = 1 << 30  # more than anyone asks for


@dataclass(frozen=True)
class WorkerPlan:
    """What each training worker gets.

    Attributes:
        num_workers: how many there are.
        cpus: reserved for each.
        threads: compute threads of each.
        gpus: reserved for each; 0 = it trains on CPUs.
    """

    num_workers: int
    cpus: float
    threads: int
    gpus: float

    def each(self) -> dict[str, float]:
        """Return what one worker reserves, by Ray's names."""
        return _bundle(CPU=self.cpus, GPU=self.gpus)


@dataclass(frozen=True)
class PoolPlan:
    """What the shards of the negative pool get.

    Attributes:
        num_shards: how many there are.
        cpus: reserved for each; 0 = they share the trainers'.
        gpus: reserved for each.
        memory: bytes of main memory reserved for each, for its index.
        threads: compute threads of each.
        index: the index of the largest; on a GPU each shard sees for itself what fits on that.
        labels: of the nodes that they may be on.
    """

    num_shards: int
    cpus: float
    gpus: float
    memory: int
    threads: int
    index: IndexPlan
    labels: Mapping[str, str] = field(default_factory=dict)

    def describe(self) -> str:
        """Return the pool in one line: shards, and the memory of each."""
        return f"index of {counted(self.num_shards, 'shard')}, each {self.index.describe()}"

    def each(self) -> dict[str, float]:
        """Return what one shard reserves, by Ray's names."""
        return _bundle(CPU=self.cpus, GPU=self.gpus, memory=self.memory)

    @property
    def strategy(self) -> Literal["PACK", "SPREAD"]:
        """How Ray is to place the shards: those that share the trainers' CPUs take as few of a node's as they can."""
        return "PACK" if self.cpus or self.gpus else "SPREAD"


def plan_pool(
    settings: NegativesSettings,
    nodes: Sequence[Resources],
    *,
    rows: int,
    dimension: int,
    growing: bool = False,
    on_trainers_gpu: bool = False,
) -> PoolPlan:
    """Share the corpus out over the shards, and see whether nodes and memory hold them.

    Args:
        settings: what was asked for.
        nodes: the resources of each node as Ray counts them (``CPU``, ``GPU``, ``memory`` in bytes).
        rows: of the corpus.
        dimension: width of the embeddings.
        growing: an autoscaler may add nodes, so what is missing is no mistake.
        on_trainers_gpu: the only shard is in a trainer's process, and that has a GPU.

    Raises:
        ClusterError: it does not fit; the message does the sum.
    """
    n, cpus, gpus = settings.num_shards, settings.cpus_per_shard, settings.gpus_per_shard
    shards = counted(n, "shard")
    if n > rows:
        raise ClusterError(f"{shards} for a corpus of {counted(rows, 'row')}", "negatives.num_shards", "Ask for fewer")
    for name, asked in (("CPU", cpus), ("GPU", gpus)):
        there, setting = sum(node.get(name, 0.0) for node in nodes), f"negatives.{name.lower()}s_per_shard"
        if _counted(asked * n) > there and not growing:
            raise ClusterError(f"{shards} x {counted(asked, name)} = {asked * n:g}, but the cluster has {there:g}",
                               setting, "Lower it, or ask for fewer shards")  # fmt: skip
        if count_bundles(nodes, {name: asked}) < n and not growing:
            raise _split(shards, asked, name, nodes, setting)
    if settings.index == "ivf_pq":
        plan_index("ivf_pq", rows=rows // n, dimension=dimension, memory_bytes=None)  # the smallest can be trained too
    computing = _bundle(CPU=cpus, GPU=gpus)
    on_gpu = gpus > 0 or on_trainers_gpu
    bounded = not (on_gpu or growing) and any("memory" in node for node in nodes)
    index = plan_index(
        settings.index,
        rows=-(-rows // n),
        dimension=dimension,
        memory_bytes=_largest_memory(nodes, n, computing) if bounded else None,
        nprobe=settings.nprobe,
        on_gpu=on_gpu,
    )
    plan = PoolPlan(n, cpus, gpus, 0 if on_gpu else index.bytes_building, max(1, int(cpus)), index)
    threads = settings.threads_per_shard or (plan.threads if cpus else _threads(nodes, plan))
    return replace(plan, threads=threads)


def _threads(nodes: Sequence[Resources], plan: PoolPlan) -> int:
    """Return the CPUs of a node over the shards that may be on it, of the node where that is least."""
    with_cpus = [node for node in nodes if node.get("CPU", 0.0) >= 1]
    spread = -(-plan.num_shards // max(1, len(with_cpus)))
    shares = []
    for node in with_cpus:
        fitting = min(plan.num_shards, count_bundles([node], _bundle(GPU=plan.gpus))) if plan.gpus else spread
        shares += [int(node["CPU"] // fitting)] if fitting else []
    return max(1, min(shares, default=1))


def _largest_memory(nodes: Sequence[Resources], n: int, computing: Resources) -> int:
    """Return the most bytes that n shards can have each, every one of them on one node."""
    most = max(int(node.get("memory", 0.0)) for node in nodes)
    return bisect_left(range(1, most + 1), 1, key=lambda size: count_bundles(nodes, {**computing, "memory": size}) < n)


def count_bundles(nodes: Sequence[Resources], bundle: Resources) -> int:
    """Return how many bundles fit, each on one node, and a part of a GPU on one GPU."""

    def fitting(node: Resources, name: str, amount: float) -> int:
        there = node.get(name, 0.0)
        if name == "memory":  # whole bytes
            return int(there // amount)
        if name == "GPU" and amount < 1:
            return int(there) * int(_counted(1 / amount))
        return int(_counted(there / amount))

    asked = {name: amount for name, amount in bundle.items() if amount}
    return sum(min((fitting(node, *each) for each in asked.items()), default=_ANY) for node in nodes)


def _bundle(**amounts: float) -> dict[str, float]:
    return {name: amount for name, amount in amounts.items() if amount}


def _split(many: str, each: float, name: str, nodes: Sequence[Resources], setting: str) -> ClusterError:
    """Return the refusal of what is there in sum, but not in one piece."""
    there = ", ".join(f"{amount:g}" for amount in sorted(node.get(name, 0.0) for node in nodes))
    return ClusterError(f"{many} x {counted(each, name)} do not fit nodes of {there} {name}s", setting,
                        "Lower it, or ask for fewer")  # fmt: skip


def plan_workers(
    settings: ClusterSettings,
    total: Resources,
    pool: PoolPlan | None = None,
    *,
    nodes: Sequence[Resources] | None = None,
    growing: bool = False,
) -> WorkerPlan:
    """Share what the pool leaves of the cluster out over the workers.

    Args:
        settings: what was asked for.
        total: the cluster's resources as Ray counts them (``CPU``, ``GPU``).
        pool: what is reserved before the workers.
        nodes: the resources of each node, where there are several: a worker is on one of them.
        growing: an autoscaler may add nodes, so what is missing is no mistake.

    Raises:
        ClusterError: it does not fit; the message does the sum.
    """
    n, cpus, gpus = settings.num_workers, total.get("CPU", 0.0), total.get("GPU", 0.0)
    pool_cpus, pool_gpus = (0.0, 0.0) if pool is None else (pool.cpus * pool.num_shards, pool.gpus * pool.num_shards)
    free_cpus, free_gpus = _counted(cpus - pool_cpus), _counted(gpus - pool_gpus)
    gpus_asked = _counted(n * settings.gpus_per_worker)
    gpus_fit = free_gpus >= gpus_asked and (not nodes or count_bundles(nodes, {"GPU": settings.gpus_per_worker}) >= n)
    use_gpu = settings.use_gpu is True or (settings.use_gpu == "auto" and gpus_fit)
    gpus_each = settings.gpus_per_worker if use_gpu else 0.0
    if growing and not (use_gpu or settings.use_gpu is False):
        what = f"the cluster has {counted(gpus, 'GPU')} now and may grow, so 'auto' cannot tell what is wanted"
        raise ClusterError(what, "cluster.use_gpu", "Set it to true or false")
    if growing:
        share = settings.cpus_per_worker or 1.0
        return WorkerPlan(num_workers=n, cpus=share, threads=max(1, int(share)), gpus=gpus_each)
    if settings.use_gpu is True and gpus == 0:
        raise ClusterError("a GPU was asked for and the cluster has none", "cluster.use_gpu",
                           "Set cluster.use_gpu=false, or start Ray on a machine with a GPU")  # fmt: skip
    if use_gpu and free_gpus < gpus_asked:
        hint = "Ask for fewer workers, or set cluster.use_gpu=false"
        if free_gpus > 0 and pool is not None and pool.gpus:
            hint += "; cluster.gpus_per_worker=0.6 negatives.gpus_per_shard=0.4 lets both share a GPU"
        workers = f"{counted(n, 'worker')} x {counted(settings.gpus_per_worker, 'GPU')}"
        raise ClusterError(_sum(workers, gpus_asked, pool, "gpus", gpus), "cluster.num_workers", hint)
    if use_gpu and not gpus_fit:
        raise _split(counted(n, "worker"), gpus_each, "GPU", nodes or (), "cluster.num_workers")
    share = settings.cpus_per_worker
    if share is None:
        if n > free_cpus:
            raise ClusterError(
                _sum(f"{counted(n, 'worker')} x 1 CPU", n, pool, "cpus", cpus), "cluster.num_workers",
                "Ask for fewer workers, or set cluster.cpus_per_worker below 1 to let them share",
            )  # fmt: skip
        share = largest_share(n, int(free_cpus // n), nodes, gpus=gpus_each)
    elif _counted(share * n) > free_cpus:
        raise ClusterError(_sum(f"{counted(n, 'worker')} x {counted(share, 'CPU')}", share * n, pool, "cpus", cpus),
                           "cluster.cpus_per_worker", "Lower it, or ask for fewer workers")  # fmt: skip
    if nodes and count_bundles(nodes, {"CPU": share, "GPU": gpus_each}) < n:
        raise _split(counted(n, "worker"), share, "CPU", nodes, "cluster.cpus_per_worker")
    return WorkerPlan(num_workers=n, cpus=share, threads=max(1, int(share)), gpus=gpus_each)


def _counted(amount: float) -> float:
    """Round as Ray counts, in ten-thousandths: 1 - 3 x 0.2 is 0.4 and not a little less."""
    return round(amount, 4)


def pool_advice(workers: WorkerPlan, pool: PoolPlan) -> str | None:
    """Return what should be said about where the pool's shards compute, if anything."""
    if not workers.gpus or pool.gpus:
        return None
    return (
        "the negative pool encodes on CPUs though training has GPUs; negatives.gpus_per_shard=1 gives it its own,"
        " cluster.gpus_per_worker=0.6 negatives.gpus_per_shard=0.4 a part of one"
    )


def largest_share(n: int, most: int, nodes: Sequence[Resources] | None, *, gpus: float = 0.0) -> float:
    """Return the most CPUs, whole if possible, that n workers can have each, none of them across nodes.

    Args:
        n: how many workers.
        most: no more than this.
        nodes: the resources of each node; None = all are on one.
        gpus: what each worker also has.
    """
    if not nodes:
        return float(most)
    return float(
        next((share for share in range(most, 1, -1) if count_bundles(nodes, {"CPU": share, "GPU": gpus}) >= n), 1)
    )


def _sum(workers: str, asked: float, pool: PoolPlan | None, what: Literal["cpus", "gpus"], there: float) -> str:
    """Write the sum out: workers, and the pool where it takes some, against the cluster."""
    shards = 0.0 if pool is None else getattr(pool, what)
    if pool is None or not shards:
        return f"{workers} = {asked:g}, but the cluster has {there:g}"
    total = asked + shards * pool.num_shards
    return (
        f"{workers} + {counted(pool.num_shards, 'shard')} x {counted(shards, what[:-1].upper())} = {total:g},"
        f" but the cluster has {there:g}"
    )


@dataclass(frozen=True)
class SweepPlan:
    """How trials of a sweep share the cluster.

    Attributes:
        concurrent: trials side by side.
        cpus_per_worker: reserved for each of a trial's workers.
        gpus_per_worker: likewise; 0 = they train on CPUs.
        in_one_process: whether a trial trains in its own process, which then runs the next one; else Ray Train
            starts workers for each.
    """

    concurrent: int
    cpus_per_worker: float
    gpus_per_worker: float
    in_one_process: bool


def plan_sweep(trials: Sequence[Settings], nodes: Sequence[Resources], *, max_concurrent: int | None) -> SweepPlan:
    """Find how many trials the cluster holds side by side, each with its workers and its negative pool.

    Left to itself it runs as many as there are GPUs for; on CPUs up to four, with two CPUs or more for each worker.

    Args:
        trials: settings that trials may have; the largest of them counts.
        nodes: the resources of each node as Ray counts them (``CPU``, ``GPU``).
        max_concurrent: trials side by side as asked for, if they were.

    Raises:
        ClusterError: not even one, or not as many as asked for, fit; the message does the sum.
    """
    cpus, gpus = (sum(node.get(name, 0.0) for node in nodes) for name in ("CPU", "GPU"))
    workers = max(s.cluster.num_workers for s in trials)
    given = trials[0].cluster.cpus_per_worker
    pools = [s.negatives for s in trials if s.negatives.source == "pool"]
    pool_cpus = max((n.num_shards * n.cpus_per_shard for n in pools), default=0.0)
    pool_gpus = max((n.num_shards * n.gpus_per_shard for n in pools), default=0.0)
    asked, gpus_each = trials[0].cluster.use_gpu, trials[0].cluster.gpus_per_worker
    use_gpu = asked is True or (asked == "auto" and gpus >= _counted(workers * gpus_each + pool_gpus))
    gpus_each *= use_gpu
    least_cpus = _counted(workers * (given or 1.0) + pool_cpus)
    need_gpus = _counted(workers * gpus_each + pool_gpus)
    fits = int(_counted(min(cpus / least_cpus, gpus / need_gpus if need_gpus else math.inf)))
    concurrent = max_concurrent or fits
    if max_concurrent is None and not use_gpu:
        concurrent = min(fits, max(1, min(4, int(cpus // (workers * (given or 2.0) + pool_cpus)))))
    for name, need, there in (("CPU", least_cpus, cpus), ("GPU", need_gpus, gpus)):
        if _counted(need * max(1, concurrent)) > there:
            each = (given or 1.0) if name == "CPU" else gpus_each
            pool = pool_cpus if name == "CPU" else pool_gpus
            raise ClusterError(
                f"{counted(max(1, concurrent), 'trial')} x ({counted(workers, 'worker')} x {counted(each, name)}"
                + (f" + a pool with {pool:g}" if pool else "")
                + f") = {counted(need * max(1, concurrent), name)}, but the cluster has {there:g}",
                "--max-concurrent" if max_concurrent else "cluster",
                "Ask for fewer trials side by side, fewer workers or fewer shards",
            )
    most = max(1, int((cpus / concurrent - pool_cpus) // workers))
    share = given or largest_share(concurrent * workers, most, nodes, gpus=gpus_each)
    in_one_process = len(nodes) == 1 and all(trial.fits_one_process for trial in trials)
    return SweepPlan(concurrent, cpus_per_worker=share, gpus_per_worker=gpus_each, in_one_process=in_one_process)
