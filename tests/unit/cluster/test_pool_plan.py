"""Is an impossible pool refused before anything is started, and does the message do the sum?"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from hncse_ray.cluster.resources import PoolPlan, plan_pool, plan_workers, pool_advice
from hncse_ray.config import ClusterSettings, NegativesSettings
from hncse_ray.errors import ClusterError, DataError
from hncse_ray.negatives import IndexVersion
from hncse_ray.negatives.shard import IndexShard
from hncse_ray.training.shard import plan_for_gpu

GB = 1e9


def plan(*nodes: dict[str, float], rows: int = 1000, dimension: int = 32, **settings: Any) -> PoolPlan:
    return plan_pool(
        NegativesSettings.model_validate({"source": "pool"} | settings), nodes, rows=rows, dimension=dimension
    )


def refusal(*nodes: dict[str, float], **settings: Any) -> str:
    with pytest.raises(ClusterError) as caught:
        plan(*nodes, **settings)
    assert caught.value.hint
    return str(caught.value)


def test_rows_are_shared_out_and_the_largest_shard_is_planned() -> None:
    assert plan({"CPU": 8}, rows=301, num_shards=3).index.rows == 101
    assert plan({"CPU": 8}, rows=300, num_shards=3).index.rows == 100


def test_shards_without_cpus_of_their_own_share_the_threads_of_all() -> None:
    assert plan({"CPU": 8}, num_shards=3).threads == 2
    assert plan({"CPU": 2}, num_shards=3).threads == 1
    assert plan({"CPU": 8}, num_shards=2, cpus_per_shard=3).threads == 3
    assert plan({"CPU": 8}, num_shards=2, cpus_per_shard=0.5).threads == 1
    assert plan({"CPU": 8}, num_shards=3, threads_per_shard=5).threads == 5


def test_threads_are_those_of_a_node() -> None:
    """A shard computes on one node, however many CPUs the cluster has."""
    sixteen = {"CPU": 16.0, "memory": 64 * GB}
    assert plan(*[sixteen] * 16).threads == 16
    assert plan(*[sixteen] * 16, num_shards=16).threads == 16
    assert plan(*[sixteen] * 2, num_shards=3).threads == 8  # two of them on one node
    assert plan({"CPU": 0.0}, {"CPU": 4.0}, sixteen, num_shards=2).threads == 4
    eight = {"CPU": 32.0, "GPU": 8.0}
    assert plan(eight, eight, num_shards=4, gpus_per_shard=1).threads == 8  # Ray packs them on one node
    assert plan(eight, eight, num_shards=16, gpus_per_shard=1).threads == 4


def test_memory_is_that_of_a_node_and_reserved() -> None:
    """3 million rows x 768 x 4 bytes are 9.2 GB, 18.4 GB for two versions."""
    asked: dict[str, Any] = {"rows": 6_000_000, "dimension": 768, "num_shards": 2, "index": "flat"}
    node = {"CPU": 8.0, "memory": 20 * GB}
    pool = plan(node, node, **asked)
    assert pool.memory == pool.index.bytes_building > 18.4 * GB
    assert pool.each() == {"memory": pool.memory} and pool.strategy == "SPREAD"
    quarters = [{"CPU": 8.0, "memory": 10 * GB}] * 4
    assert "but 10.00 GB are free" in refusal(*quarters, **asked)  # though there are 40 GB
    assert plan(*quarters, **asked | {"index": "auto"}).index.kind == "ivf_pq"
    assert plan({"CPU": 8.0, "memory": 45 * GB}, quarters[0], **asked).memory == pool.memory  # both on the first
    reserving = plan(node, node, **asked, cpus_per_shard=5)
    assert reserving.each() == {"CPU": 5, "memory": pool.memory} and reserving.strategy == "PACK"
    large = {"CPU": 5.0, "memory": 45 * GB}
    assert "but 20.00 GB are free" in refusal(large, node, cpus_per_shard=5, **asked | {"rows": 8_000_000})


def test_what_is_there_in_sum_but_not_in_one_piece_is_said() -> None:
    nodes = [{"CPU": 3.0, "GPU": 1.0}] * 4
    message = refusal(*nodes, num_shards=3, cpus_per_shard=4)
    assert "3 shards x 4 CPUs do not fit nodes of 3, 3, 3, 3 CPUs" in message and "negatives.cpus_per_shard" in message
    assert "2 shards x 2 GPUs do not fit" in refusal(*nodes, num_shards=2, gpus_per_shard=2)
    message = refusal(*nodes, num_shards=5, gpus_per_shard=0.6)  # 3 of the 4 GPUs in sum, but a GPU each
    assert "5 shards x 0.6 GPUs do not fit nodes of 1, 1, 1, 1 GPUs" in message


def test_a_shard_on_a_gpu_sees_for_itself_what_that_has_room_for() -> None:
    pool = plan({"CPU": 8.0, "GPU": 1.0}, rows=10_000_000, dimension=768, gpus_per_shard=1)
    assert pool.index.kind == "exact_torch" and pool.memory == 0  # 31 GB of GPU memory while the next is built
    asked = {"free_bytes": 80 * GB, "total_bytes": 80 * GB, "taken_bytes": 0}

    def on_gpu(**changes: Any) -> str:
        memory = {name: changes.pop(name, size) for name, size in asked.items()}
        negatives = NegativesSettings.model_validate({"source": "pool", "gpus_per_shard": 1} | changes)
        return plan_for_gpu(negatives, pool.index, **memory).kind

    assert on_gpu() == on_gpu(gpus_per_shard=0.5) == "exact_torch"
    assert on_gpu(gpus_per_shard=0.3) == on_gpu(taken_bytes=20 * GB, gpus_per_shard=0.5) == "ivf_pq"
    assert on_gpu(free_bytes=20 * GB) == "ivf_pq"
    with pytest.raises(ClusterError, match=r"exact_torch needs .* 30.73 GB; but 23.00 GB of GPU memory are free"):
        on_gpu(free_bytes=24 * GB, index="exact_torch")


def test_as_many_shards_as_rows_and_no_more() -> None:
    assert plan({"CPU": 8}, rows=4, num_shards=4).index.rows == 1
    message = refusal({"CPU": 8}, rows=4, num_shards=5)
    assert "negatives.num_shards" in message and "5 shards for a corpus of 4 rows" in message


def test_too_few_cpus_are_counted() -> None:
    assert plan({"CPU": 8}, num_shards=4, cpus_per_shard=2).cpus == 2
    message = refusal({"CPU": 8}, num_shards=3, cpus_per_shard=3)
    assert "negatives.cpus_per_shard" in message and "3 shards x 3 CPUs = 9, but the cluster has 8" in message


def test_too_few_gpus_are_counted() -> None:
    assert plan({"CPU": 8, "GPU": 1}, num_shards=4, gpus_per_shard=0.25).gpus == 0.25
    message = refusal({"CPU": 8, "GPU": 1}, num_shards=4, gpus_per_shard=0.5)
    assert "negatives.gpus_per_shard" in message and "4 shards x 0.5 GPUs = 2, but the cluster has 1" in message
    assert "has 0" in refusal({"CPU": 8}, gpus_per_shard=1)


def test_too_little_memory_is_counted() -> None:
    """2 million rows x 768 x 4 bytes are 6.14 GB a version, and there are two while the next is built."""
    asked = {"rows": 4_000_000, "dimension": 768, "num_shards": 2, "index": "flat"}
    assert plan({"CPU": 8, "memory": 25 * GB}, **asked).index.bytes_at_rest == 2_000_000 * 768 * 4
    message = refusal({"CPU": 8, "memory": 20 * GB}, **asked)
    assert "2,000,000 rows x 768 x 4 bytes" in message and "12.29 GB" in message and "10.00 GB" in message


def test_where_nothing_fits_every_kind_is_counted() -> None:
    message = refusal({"CPU": 8, "memory": 1e6}, rows=1_000_000, dimension=768, index="auto")
    assert "flat needs" in message and "ivf_pq needs" in message


def test_too_few_rows_to_train_an_index_are_said() -> None:
    with pytest.raises(DataError, match="needs 256 rows a shard to train, and this shard has 250"):
        plan({"CPU": 8}, rows=500, num_shards=2, index="ivf_pq")


def test_workers_and_shards_together_are_counted() -> None:
    pool = plan({"CPU": 8}, num_shards=3, cpus_per_shard=2)
    assert plan_workers(ClusterSettings(num_workers=2), {"CPU": 8}, pool).cpus == 1
    with pytest.raises(ClusterError) as caught:
        plan_workers(ClusterSettings(num_workers=3), {"CPU": 8}, pool)
    assert "3 workers x 1 CPU + 3 shards x 2 CPUs = 9, but the cluster has 8" in str(caught.value)
    with pytest.raises(ClusterError) as caught:
        plan_workers(ClusterSettings(num_workers=2, cpus_per_worker=1.5), {"CPU": 8}, pool)
    assert "2 workers x 1.5 CPUs + 3 shards x 2 CPUs = 9, but the cluster has 8" in str(caught.value)


def test_workers_do_not_get_the_gpus_of_the_shards() -> None:
    total = {"CPU": 8, "GPU": 2}
    pool = plan(total, num_shards=2, gpus_per_shard=0.5)
    assert plan_workers(ClusterSettings(num_workers=1), total, pool).gpus
    assert not plan_workers(ClusterSettings(num_workers=2), total, pool).gpus
    with pytest.raises(ClusterError) as caught:
        plan_workers(ClusterSettings(num_workers=2, use_gpu=True), total, pool)
    assert "2 workers x 1 GPU + 2 shards x 0.5 GPUs = 3, but the cluster has 2" in str(caught.value)


def test_a_worker_and_a_shard_can_share_one_gpu() -> None:
    total = {"CPU": 8, "GPU": 1}
    pool = plan(total, gpus_per_shard=0.4)
    workers = plan_workers(ClusterSettings(gpus_per_worker=0.6), total, pool)
    assert workers.gpus == 0.6 and pool_advice(workers, pool) is None
    advice = pool_advice(workers, plan(total))
    assert advice is not None and "cluster.gpus_per_worker=0.6 negatives.gpus_per_shard=0.4" in advice
    assert pool_advice(plan_workers(ClusterSettings(use_gpu=False), total), plan(total)) is None
    with pytest.raises(ClusterError) as caught:
        plan_workers(ClusterSettings(use_gpu=True), total, pool)
    assert "1 worker x 1 GPU + 1 shard x 0.4 GPUs = 1.4, but the cluster has 1" in str(caught.value)
    three = plan(total, num_shards=3, gpus_per_shard=0.2)  # 1 - 3 x 0.2 is less than 0.4 in floating point
    assert plan_workers(ClusterSettings(gpus_per_worker=0.4, use_gpu=True), total, three).gpus == 0.4
    assert "cluster.gpus_per_worker=0.6 negatives.gpus_per_shard=0.4" in caught.value.hint


@pytest.mark.parametrize("kind", ["flat", "exact_torch", "ivf_flat", "ivf_pq"])
@pytest.mark.parametrize("rows", [900, 901, 902])
def test_every_shard_of_a_plan_can_be_built(rows: int, kind: str) -> None:
    """Also where the rows cannot be shared out evenly."""
    generator = np.random.default_rng(0)
    vectors_ND = generator.normal(size=(rows, 32)).astype(np.float32)
    vectors_ND /= np.linalg.norm(vectors_ND, axis=1, keepdims=True)
    pool = plan({"CPU": 8}, rows=rows, num_shards=3, index=kind)
    version = IndexVersion(0, "weights", "corpus", rows)
    for number in range(3):
        shard = IndexShard(
            number=number,
            count=3,
            lengths=np.full(rows, 8),
            encode=lambda ids: vectors_ND[ids],
            load_weights=lambda weights: None,
            plan=pool.index,
            device=torch.device("cpu"),
            batch_size=64,
            threads=1,
        )
        shard.build(version, {})
        own = np.arange(number, rows, 3)
        scores_Qk, ids_Qk = shard.search(version, vectors_ND[own[:5]], k=1)
        np.testing.assert_array_equal(ids_Qk[:, 0], own[:5])
