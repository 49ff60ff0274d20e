"""Does the request fit the cluster, and if not, does the message do the sum?"""

from __future__ import annotations

import pytest

from hncse_ray.cluster.resources import WorkerPlan, largest_share, plan_workers
from hncse_ray.config import ClusterSettings
from hncse_ray.errors import ClusterError


def plan(total: dict[str, float], **settings: object) -> WorkerPlan:
    return plan_workers(ClusterSettings.model_validate(settings), total)


def refusal(total: dict[str, float], **settings: object) -> str:
    with pytest.raises(ClusterError) as caught:
        plan(total, **settings)
    assert caught.value.hint
    return str(caught.value)


def test_cpus_are_shared_out_whole() -> None:
    assert plan({"CPU": 8}, num_workers=3) == WorkerPlan(num_workers=3, cpus=2.0, threads=2, gpus=0)
    assert plan({"CPU": 1}) == WorkerPlan(num_workers=1, cpus=1.0, threads=1, gpus=0)


def test_cpus_asked_for_are_given_and_threads_are_never_none() -> None:
    assert plan({"CPU": 8}, num_workers=2, cpus_per_worker=3.5) == WorkerPlan(2, 3.5, 3, 0)
    assert plan({"CPU": 2}, num_workers=4, cpus_per_worker=0.5) == WorkerPlan(4, 0.5, 1, 0)


def test_auto_takes_gpus_only_if_there_is_one_for_each_worker() -> None:
    assert plan({"CPU": 8, "GPU": 2}, num_workers=2).gpus
    assert not plan({"CPU": 8, "GPU": 1}, num_workers=2).gpus
    assert not plan({"CPU": 8}).gpus


def test_gpus_can_be_declined_and_demanded() -> None:
    assert not plan({"CPU": 8, "GPU": 8}, use_gpu=False).gpus
    assert plan({"CPU": 8, "GPU": 2}, num_workers=2, use_gpu=True).gpus


def test_no_gpu_at_all_is_said() -> None:
    message = refusal({"CPU": 8}, use_gpu=True)
    assert "cluster.use_gpu" in message and "has none" in message


def test_too_few_gpus_are_counted() -> None:
    assert "4 workers x 1 GPU = 4, but the cluster has 2" in refusal({"CPU": 8, "GPU": 2}, num_workers=4, use_gpu=True)


def test_too_few_cpus_are_counted() -> None:
    message = refusal({"CPU": 2}, num_workers=64)
    assert "cluster.num_workers" in message and "64 workers x 1 CPU = 64, but the cluster has 2" in message
    message = refusal({"CPU": 8}, num_workers=3, cpus_per_worker=3)
    assert "cluster.cpus_per_worker" in message and "3 workers x 3 CPUs = 9, but the cluster has 8" in message


def test_a_cluster_without_cpus_is_refused() -> None:
    assert "has 0" in refusal({})


def test_the_largest_share_is_of_one_node() -> None:
    threes = [{"CPU": 3.0}] * 3
    assert largest_share(2, 4, threes) == 3  # 9 CPUs for two are 4 each, but nowhere
    assert largest_share(4, 2, threes) == 1
    assert largest_share(2, 4, None) == 4
    assert largest_share(2, 8, [{"CPU": 16.0}, {"CPU": 4.0, "GPU": 2.0}], gpus=1) == 2
