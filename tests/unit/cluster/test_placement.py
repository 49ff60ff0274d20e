"""Labels: which nodes they allow, and whether the request fits these."""

from __future__ import annotations

from typing import Any

import pytest

from hncse_ray.cluster.placement import Node, Nodes, matches, place_pool, place_workers, total
from hncse_ray.config import Settings, load_settings
from hncse_ray.errors import ClusterError, SettingsError

TRAINER, POOL = {"hncse-role": "trainer"}, {"hncse-role": "pool"}


def settings(**sections: Any) -> Settings:
    return load_settings({"corpus": {"source": "python-docs"}, **sections})


def node(cpus: float, gpus: float = 0, **labels: str) -> Node:
    return Node(
        {"ray.io/node-id": "x", **{k.replace("_", "-"): v for k, v in labels.items()}}, {"CPU": cpus, "GPU": gpus}
    )


HEAD = node(0)
FLEET = Nodes((HEAD, node(8, 1, hncse_role="trainer"), node(8, 1, hncse_role="trainer"), node(4, 1, hncse_role="pool")))


@pytest.mark.parametrize(
    ("selector", "allowed"),
    [
        ({}, True),
        ({"zone": "a"}, True),
        ({"zone": "b"}, False),
        ({"zone": "!a"}, False),
        ({"zone": "in(b, a)"}, True),
        ({"zone": "!in(b,a)"}, False),
        ({"market": "spot"}, False),
        ({"market": "!spot"}, True),
        ({"zone": "a", "market": "spot"}, False),
    ],
)
def test_a_selector_allows_what_ray_says_it_does(selector: dict[str, str], allowed: bool) -> None:
    assert matches({"zone": "a"}, selector) == allowed


def test_labels_that_no_node_has_are_said_with_those_there_are() -> None:
    asked = settings(cluster={"trainer_labels": {"hncse-role": "trainr"}})
    with pytest.raises(ClusterError) as caught:
        place_workers(asked, FLEET, None)
    message = str(caught.value)
    assert "cluster.trainer_labels" in message and "hncse-role=trainr" in message
    assert "2 with hncse-role=trainer" in message and "1 with no label" in message and "node-id" not in message


def test_labels_that_an_autoscaler_may_bring_are_not_refused() -> None:
    growing = Nodes((HEAD,), growing=True)
    asked = settings(cluster={"num_workers": 3, "use_gpu": True, "cpus_per_worker": 4, "trainer_labels": TRAINER})
    plan = place_workers(asked, growing, None)
    assert (plan.num_workers, plan.cpus, plan.threads, plan.gpus) == (3, 4, 4, 1)
    negatives = {"source": "pool", "num_shards": 2, "gpus_per_shard": 1}
    pool = place_pool(settings(negatives=negatives, cluster={"pool_labels": POOL}), growing, rows=1000, dimension=8)
    assert pool.num_shards == 2 and pool.gpus == 1


def test_a_cluster_that_may_grow_is_not_trained_on_by_cpu_for_want_of_a_word() -> None:
    with pytest.raises(ClusterError, match="0 GPUs now and may grow.*use_gpu|use_gpu.*0 GPUs now and may grow"):
        place_workers(settings(), Nodes((HEAD,), growing=True), None)
    assert not place_workers(settings(cluster={"use_gpu": False}), Nodes((HEAD,), growing=True), None).gpus


def test_trainers_get_their_own_nodes_and_the_pool_takes_nothing_of_them() -> None:
    asked = settings(
        negatives={"source": "pool", "cpus_per_shard": 4, "gpus_per_shard": 1},
        cluster={"num_workers": 2, "trainer_labels": TRAINER, "pool_labels": POOL},
    )
    pool = place_pool(asked, FLEET, rows=1000, dimension=8)
    plan = place_workers(asked, FLEET, pool)
    assert (plan.cpus, plan.gpus) == (8, 1)


def test_a_pool_that_needs_more_than_its_nodes_have_is_refused() -> None:
    negatives = {"source": "pool", "num_shards": 2, "gpus_per_shard": 1}
    with pytest.raises(ClusterError, match="the cluster has 1"):
        place_pool(settings(negatives=negatives, cluster={"pool_labels": POOL}), FLEET, rows=1000, dimension=8)


def test_a_pool_without_labels_first_takes_what_the_trainers_may_not_have() -> None:
    negatives = {"source": "pool", "num_shards": 2, "cpus_per_shard": 4}
    asked = settings(negatives=negatives, cluster={"num_workers": 2, "use_gpu": False, "trainer_labels": TRAINER})
    pool = place_pool(asked, FLEET, rows=1000, dimension=8)
    assert place_workers(asked, FLEET, pool).cpus == 6  # 16 + 4 of the pool's node, less 8


def test_shards_that_share_the_trainers_cpus_are_beside_them_where_there_is_room() -> None:
    def shards(cluster: dict[str, Any], memory: float) -> Any:
        trainers = {True: memory, False: 1e9}
        nodes = [Node(n.labels, {**n.resources, "memory": trainers[matches(n.labels, TRAINER)]}) for n in FLEET.alive]
        asked = settings(negatives={"source": "pool", "num_shards": 2, "cpus_per_shard": 0}, cluster=cluster)
        return place_pool(asked, Nodes(tuple(nodes)), rows=100_000, dimension=64).labels

    assert shards({"trainer_labels": TRAINER}, 1e9) == TRAINER
    assert shards({"trainer_labels": TRAINER, "pool_labels": POOL}, 1e9) == POOL
    assert shards({}, 1e9) == {}
    assert shards({"trainer_labels": TRAINER}, 1e6) == {}


def test_workers_are_kept_to_an_accelerator() -> None:
    nodes = Nodes(tuple(Node({"ray.io/accelerator-type": kind}, {"CPU": 8, "GPU": 1}) for kind in ("L4", "H100")))
    asked = settings(cluster={"accelerator_type": "H100", "use_gpu": True})
    assert asked.cluster.worker_labels == {"ray.io/accelerator-type": "H100"}
    assert place_workers(asked, nodes, None).cpus == 8
    with pytest.raises(ClusterError, match="2 workers x 1 GPU = 2, but the cluster has 1"):
        place_workers(settings(cluster={"accelerator_type": "H100", "use_gpu": True, "num_workers": 2}), nodes, None)
    with pytest.raises(ClusterError, match=r"cluster.accelerator_type.*accelerator-type=A100.*1 with .*type=H100"):
        place_workers(settings(cluster={"accelerator_type": "A100", "use_gpu": True}), nodes, None)
    with pytest.raises(SettingsError, match="asks for GPUs, and use_gpu is false"):
        settings(cluster={"accelerator_type": "H100", "use_gpu": False})


def test_a_worker_is_on_one_node() -> None:
    nodes = Nodes((node(3), node(3)))
    assert place_workers(settings(), nodes, None).cpus == 3
    assert place_workers(settings(cluster={"num_workers": 3}), nodes, None).cpus == 1  # of 2 only 2 would fit
    with pytest.raises(ClusterError, match="2 workers x 2.5 CPUs do not fit nodes of 3, 3 CPUs|2 workers"):
        place_workers(settings(cluster={"num_workers": 2, "cpus_per_worker": 3.5}), nodes, None)
    with pytest.raises(ClusterError, match="3 workers x 2 CPUs do not fit nodes of 3, 3 CPUs"):
        place_workers(settings(cluster={"num_workers": 3, "cpus_per_worker": 2}), nodes, None)


def test_a_worker_is_on_one_gpu() -> None:
    nodes = Nodes((node(8, 2), node(8, 2)))
    part = {"num_workers": 5, "use_gpu": True, "gpus_per_worker": 0.6}  # 3 of the 4 GPUs in sum
    with pytest.raises(ClusterError, match="5 workers x 0.6 GPUs do not fit nodes of 2, 2 GPUs"):
        place_workers(settings(cluster=part), nodes, None)
    assert place_workers(settings(cluster=part | {"use_gpu": "auto"}), nodes, None).gpus == 0
    assert place_workers(settings(cluster=part | {"num_workers": 4}), nodes, None).cpus == 4


def test_totals_add_up() -> None:
    assert total(FLEET.alive) == {"CPU": 20, "GPU": 3}
    assert total(()) == {}


def test_an_elastic_run_is_planned_with_as_many_workers_as_fit_and_may_come_to_more() -> None:
    nodes = Nodes((node(4), node(4)))
    elastic = {"num_workers": 4, "min_workers": 2, "cpus_per_worker": 4, "use_gpu": False}
    plan = place_workers(settings(cluster=elastic), nodes, None)
    assert (plan.num_workers, plan.cpus) == (4, 4)
    with pytest.raises(ClusterError, match="3 workers x 4 CPUs = 12"):
        place_workers(settings(cluster=elastic | {"min_workers": 3}), nodes, None)
    shared_out = place_workers(settings(cluster=elastic | {"cpus_per_worker": None}), nodes, None)
    assert shared_out.cpus == 2  # all four fit
