"""The negative pool on three nodes: training goes on when one of them is lost."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import ray
from pool_faults import Training, nodes, nothing_is_left
from ray.cluster_utils import Cluster
from waits import seconds, soon

from hncse_ray.config import Settings

pytestmark = [pytest.mark.slow, pytest.mark.timeout(400)]
STEPS = 500
BACK_S = 90.0


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    """A head that a trainer fits on but no shard, and two nodes for one shard each but no trainer."""
    with nodes(2, 4, 4) as cluster:
        yield cluster


def nodes_of(*names: str) -> set[str]:
    """Where actors of these classes are."""
    return {
        actor["Address"]["NodeID"]
        for actor in ray._private.state.actors().values()
        if actor["ActorClassName"] in names and actor["State"] == "ALIVE"
    }


def test_training_goes_on_when_a_node_of_the_pool_is_lost(cluster: Cluster, small_run: dict[str, Any]) -> None:
    tree = {name: dict(section) for name, section in small_run.items()}
    tree["negatives"] = {
        "source": "pool",
        "num_shards": 2,
        "cpus_per_shard": 3,
        "threads_per_shard": 1,
        "candidates": 16,
        "max_score": None,
        "refresh_every_steps": 20,
        "build_timeout_s": seconds(12),
    }
    tree["cluster"] = {"cpus_per_worker": 2}
    tree["train"] |= {
        "max_steps": STEPS,
        "log_every_steps": 5,
        "evaluate_every_steps": 5000,
        "checkpoint_every_steps": 5000,
    }
    training = Training(Settings.model_validate(tree))
    with training.slowly():
        training.line(
            lambda row: row.get("negatives/shards_alive") == 2 and row["negatives/missing"] == 0,
            within_s=180,
            what="an index",
        )
        homes = nodes_of("ShardActor")
        assert len(homes) == 2 and nodes_of("RayTrainWorker") == {cluster.head_node.node_id}
        # The run's news come through an actor that may be on any node, and is not made again.
        lost = next(node for node in cluster.worker_nodes if node.node_id not in nodes_of("EventQueue"))
        cluster.remove_node(lost, allow_graceful=False)
        line = training.line(
            lambda row: row["negatives/shards_alive"] == 1 and row.get("negatives/partial") == 1,
            within_s=60,
            what="answers of one shard alone",
        )
        assert line["negatives/missing"] == 0
        line = training.line(lambda row: row["negatives/failed_builds"] > 0, within_s=60, what="a build given up")
        alone = line["step"]
        cluster.add_node(num_cpus=4)
        training.line(
            lambda row: (
                row["negatives/shards_alive"] == 2
                and row.get("negatives/partial") == 0
                and row["negatives/index_step"] > alone
            ),
            within_s=BACK_S,
            what="a newer index of both shards",
        )
    assert training.finish(within_s=150).steps == STEPS
    lines, log = training.lines(), training.log()
    assert [line["step"] for line in lines] == list(range(5, STEPS + 1, 5))
    assert lines[-1]["negatives/shards_alive"] == 2 and lines[-1]["negatives/missing"] == 0
    assert "a build of the index was given up (TimeoutError: shard" in log
    assert "resumes at step" not in log  # the trainer was not restarted for the sake of the pool
    assert nothing_is_left()
    soon(lambda: ray.available_resources().get("CPU") == 10, within_s=20, what="all CPUs")
