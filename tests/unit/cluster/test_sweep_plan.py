"""How trials share a cluster: arithmetic, no Ray."""

from __future__ import annotations

import pytest

from hncse_ray.cluster.resources import plan_sweep
from hncse_ray.config import Settings, load_settings
from hncse_ray.errors import ClusterError


def settings(*overrides: str) -> Settings:
    return load_settings({"corpus": {"source": "python-docs"}}, overrides)


@pytest.mark.parametrize(
    ("overrides", "cpus", "gpus", "asked", "concurrent", "share"),
    [
        ([], 2, 0, None, 1, 2),  # two CPUs each, one at a time
        ([], 8, 0, None, 4, 2),
        ([], 64, 0, None, 4, 16),  # no more than four by itself
        ([], 64, 0, 16, 16, 4),
        ([], 2, 0, 2, 2, 1),
        ([], 16, 8, None, 8, 2),  # a GPU each
        (["cluster.num_workers=2"], 16, 8, None, 4, 2),
        (["cluster.cpus_per_worker=1"], 6, 0, None, 4, 1),
        (["cluster.cpus_per_worker=0.5"], 2, 0, 4, 4, 0.5),
        (["negatives.source=pool", "negatives.gpus_per_shard=1", "negatives.num_shards=2"], 16, 8, None, 2, 8),
        (["negatives.source=pool", "negatives.cpus_per_shard=1"], 6, 0, None, 2, 2),
        (["negatives.source=none", "negatives.cpus_per_shard=1"], 4, 0, None, 2, 2),  # there is no pool: it takes none
        (["cluster.use_gpu=false"], 8, 8, None, 4, 2),
        (["cluster.gpus_per_worker=0.2"], 10, 1, None, 5, 2),  # 1 // 0.2 is 4 in floating point
    ],
)
def test_trials_side_by_side(
    overrides: list, cpus: int, gpus: int, asked: int | None, concurrent: int, share: float
) -> None:
    plan = plan_sweep([settings(*overrides)], [{"CPU": cpus, "GPU": gpus}], max_concurrent=asked)
    assert (plan.concurrent, plan.cpus_per_worker) == (concurrent, share)


def test_a_worker_of_a_trial_is_on_one_node() -> None:
    nodes = [{"CPU": 5.0}, {"CPU": 5.0}, {"CPU": 5.0}]  # 15 CPUs for two trials are no 7 for each
    assert plan_sweep([settings()], nodes, max_concurrent=2).cpus_per_worker == 5
    assert plan_sweep([settings("cluster.num_workers=2")], nodes, max_concurrent=2).cpus_per_worker == 2


def test_the_largest_trial_counts() -> None:
    trials = [settings("negatives.source=none"), settings("negatives.source=pool", "negatives.cpus_per_shard=2")]
    assert plan_sweep(trials, [{"CPU": 8.0}], max_concurrent=None).concurrent == 2
    assert plan_sweep(trials[:1], [{"CPU": 8.0}], max_concurrent=None).concurrent == 4


@pytest.mark.parametrize(
    ("overrides", "cpus", "gpus", "asked", "said"),
    [
        (["cluster.num_workers=4"], 2, 0, None, "1 trial x (4 workers x 1 CPU) = 4 CPUs, but the cluster has 2"),
        ([], 2, 0, 3, "3 trials x (1 worker x 1 CPU) = 3 CPUs, but the cluster has 2"),
        (["cluster.use_gpu=true", "cluster.gpus_per_worker=0.5"], 8, 2, 5,
         "5 trials x (1 worker x 0.5 GPUs) = 2.5 GPUs, but the cluster has 2"),
        (["cluster.use_gpu=true"], 8, 0, None, "1 trial x (1 worker x 1 GPU) = 1 GPU, but the cluster has 0"),
        (["cluster.use_gpu=true"], 8, 2, 4, "4 trials x (1 worker x 1 GPU) = 4 GPUs, but the cluster has 2"),
        (
            ["negatives.source=pool", "negatives.cpus_per_shard=3"], 3, 0, None,
            "1 trial x (1 worker x 1 CPU + a pool with 3) = 4 CPUs, but the cluster has 3",
        ),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_refused_with_the_sum(
    overrides: list, cpus: int, gpus: int, asked: int | None, said: str
) -> None:
    with pytest.raises(ClusterError) as caught:
        plan_sweep([settings(*overrides)], [{"CPU": cpus, "GPU": gpus}], max_concurrent=asked)
    assert said in str(caught.value), str(caught.value)
