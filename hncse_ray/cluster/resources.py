"""Preflight arithmetic: does the request fit the cluster? Pure; no Ray call is made here."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from hncse_ray.config import ClusterSettings
from hncse_ray.errors import ClusterError


@dataclass(frozen=True)
class WorkerPlan:
    """What each training worker gets.

    Attributes:
        num_workers: how many there are.
        cpus: reserved for each.
        threads: compute threads of each.
        use_gpu: whether each gets one GPU.
    """

    num_workers: int
    cpus: float
    threads: int
    use_gpu: bool


def plan_workers(settings: ClusterSettings, total: Mapping[str, float]) -> WorkerPlan:
    """Share the cluster out over the workers.

    Args:
        settings: what was asked for.
        total: the cluster's resources as Ray counts them (``CPU``, ``GPU``).

    Raises:
        ClusterError: it does not fit; the message does the sum.
    """
    n, cpus, gpus = settings.num_workers, total.get("CPU", 0.0), total.get("GPU", 0.0)
    use_gpu = settings.use_gpu is True or (settings.use_gpu == "auto" and gpus >= n)
    if settings.use_gpu is True and gpus == 0:
        raise ClusterError("a GPU was asked for and the cluster has none", "cluster.use_gpu",
                           "Set cluster.use_gpu=false, or start Ray on a machine with a GPU")  # fmt: skip
    if use_gpu and gpus < n:
        raise ClusterError(f"{n} workers x 1 GPU = {n}, but the cluster has {gpus:g}", "cluster.num_workers",
                           "Ask for fewer workers, or set cluster.use_gpu=false")  # fmt: skip
    share = settings.cpus_per_worker
    if share is None:
        if n > cpus:
            raise ClusterError(
                f"{n} workers x 1 CPU = {n}, but the cluster has {cpus:g}", "cluster.num_workers",
                "Ask for fewer workers, or set cluster.cpus_per_worker below 1 to let them share",
            )  # fmt: skip
        share = float(cpus // n)
    elif share * n > cpus:
        raise ClusterError(f"{n} workers x {share:g} CPUs = {share * n:g}, but the cluster has {cpus:g}",
                           "cluster.cpus_per_worker", "Lower it, or ask for fewer workers")  # fmt: skip
    return WorkerPlan(num_workers=n, cpus=share, threads=max(1, int(share)), use_gpu=use_gpu)
