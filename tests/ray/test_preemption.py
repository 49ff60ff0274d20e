"""A node that is announced to go: a checkpoint is written at once, and the run goes on from it elsewhere."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from pool_faults import Training, announce, nodes, nothing_is_left
from ray.cluster_utils import Cluster
from waits import seconds, soon

from hncse_ray.config import Settings

pytestmark = [pytest.mark.slow, pytest.mark.timeout(400)]
STEPS = 300


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    """A head that no trainer fits on, and one node for it."""
    with nodes(1, 2) as cluster:
        yield cluster


def test_a_node_that_is_announced_to_go_costs_next_to_nothing(cluster: Cluster, small_run: dict[str, Any]) -> None:
    tree = {name: dict(section) for name, section in small_run.items()}
    tree["cluster"] = {"cpus_per_worker": 2, "max_failures": 0}  # nodes taken back are not failures
    tree["train"] |= {"max_steps": STEPS, "log_every_steps": 5, "evaluate_every_steps": 5000}
    tree["train"]["checkpoint_every_steps"] = 5000
    training = Training(Settings.model_validate(tree))
    checkpoints = training.folder / "checkpoints"
    with training.slowly():
        training.line(lambda row: row["step"] >= 10, within_s=180, what="steps")
        assert not list(checkpoints.glob("step_*"))
        (leaving,) = cluster.worker_nodes
        announce(cluster, leaving.node_id, left_s=seconds(60))
        soon(lambda: list(checkpoints.glob("step_*")), within_s=30, what="a checkpoint out of turn")
        (saved,) = (int(path.name[5:]) for path in checkpoints.glob("step_*"))
        assert saved % 5 == 0 and 10 < saved < STEPS
        training.line(lambda row: row["step"] > saved, within_s=20, what="further steps meanwhile")
        cluster.add_node(num_cpus=2)
        cluster.remove_node(leaving, allow_graceful=False)
        soon(lambda: "resumes at step" in training.log(), within_s=120, what="the run on the other node")
    assert training.finish(within_s=150).steps == STEPS
    log = training.log()
    assert log.count(f"resumes at step {saved}") == 1 and log.count("resumes at step") == 1
    assert log.count("1 node of the workers will be taken away: a checkpoint is written now") == 1
    assert [line["step"] for line in training.lines()] == list(range(5, STEPS + 1, 5))
    assert nothing_is_left()
