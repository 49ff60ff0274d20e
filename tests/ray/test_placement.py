"""Three nodes with labels: everyone is where its labels say, over the interface that the nodes have."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from typing import Any

import psutil
import pytest
import ray
from pool_faults import Training, nothing_is_left
from ray.cluster_utils import Cluster
from waits import seconds, soon, within

from hncse_ray.cluster import train
from hncse_ray.cluster.network import _use_interface_of_node
from hncse_ray.cluster.placement import survey
from hncse_ray.cluster.shards import wait_until_placed
from hncse_ray.config import Settings
from hncse_ray.errors import ClusterError

pytestmark = [pytest.mark.slow, pytest.mark.timeout(500)]


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    """A head that does no work, two nodes for trainers and one for the pool."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.2")
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
        try:
            for role in ("trainer", "trainer", "pool"):
                cluster.add_node(num_cpus=2, labels={"hncse-role": role})
            ray.init(address=cluster.address, logging_level=logging.ERROR, log_to_driver=False)
            logging.getLogger("hncse_ray").setLevel(logging.INFO)
            yield cluster
        finally:
            logging.getLogger("hncse_ray").setLevel(logging.NOTSET)
            ray.shutdown()
            cluster.shutdown()


@pytest.fixture
def settings(small_run: dict[str, Any]) -> Settings:
    tree = {name: dict(section) for name, section in small_run.items()}
    tree["cluster"] = {
        "num_workers": 2,
        "cpus_per_worker": 2,
        "trainer_labels": {"hncse-role": "trainer"},
        "pool_labels": {"hncse-role": "pool"},
    }
    tree["negatives"] = {"source": "pool", "num_shards": 2, "cpus_per_shard": 1, "max_score": None, "candidates": 16}
    return Settings.model_validate(tree)


def roles_of(name: str) -> list[str]:
    """The labels of the nodes on which actors of a class are."""
    labels = {node["NodeID"]: node["Labels"].get("hncse-role", "head") for node in ray.nodes()}
    return [
        labels[actor["Address"]["NodeID"]]
        for actor in ray._private.state.actors().values()
        if actor["ActorClassName"] == name and actor["State"] == "ALIVE"
    ]


def test_trainers_and_pool_are_on_their_own_nodes(cluster: Cluster, settings: Settings) -> None:
    training = Training(settings)
    with training.slowly():
        soon(lambda: len(roles_of("RayTrainWorker")) == 2, within_s=200, what="two workers")
        assert roles_of("RayTrainWorker") == ["trainer", "trainer"]
        assert roles_of("ShardActor") == ["pool", "pool"]
    assert training.finish(within_s=200).steps == 12
    assert nothing_is_left()


def test_a_label_that_no_node_has_is_refused_at_once(cluster: Cluster, settings: Settings) -> None:
    assert not survey().growing
    wrong = settings.model_copy(
        update={"cluster": settings.cluster.model_copy(update={"trainer_labels": {"hncse-role": "trainr"}})}
    )
    refused = pytest.raises(ClusterError, match="no node .* has the label hncse-role=trainr.*2 with hncse-role=t")
    with within(30, "the refusal"), refused:
        train(wrong)
    assert not os.path.exists(settings.run_dir)


def test_room_that_comes_while_it_is_waited_for_is_used(cluster: Cluster) -> None:
    bundle = {"bundles": [{"CPU": 2}], "bundle_label_selector": [{"hncse-role": "pool"}]}
    holder = ray.util.placement_group(**bundle)
    assert holder.wait(seconds(20))
    waiting = ray.util.placement_group(**bundle)
    try:
        with pytest.raises(ClusterError, match="1 shard could not be placed on the cluster within 1 s"):
            wait_until_placed(waiting, "1 shard", 1.0)
        ray.util.remove_placement_group(holder)
        wait_until_placed(waiting, "1 shard", seconds(60.0))
    finally:
        ray.util.remove_placement_group(waiting)


def test_a_worker_finds_the_interface_of_its_node(cluster: Cluster) -> None:
    def look() -> tuple[str, str | None, str | None]:
        _use_interface_of_node()
        return (
            ray.util.get_node_ip_address(),
            os.environ.get("GLOO_SOCKET_IFNAME"),
            os.environ.get("NCCL_SOCKET_IFNAME"),
        )

    address, gloo, nccl = ray.get(ray.remote(look).options(label_selector={"hncse-role": "pool"}).remote())
    if address.startswith("127."):
        pytest.skip("this machine has no other interface than the loopback")
    assert gloo is not None and nccl == f"={gloo}"
    assert address in [a.address for a in psutil.net_if_addrs()[gloo]]
