"""A run whose nodes come and go: it goes on with fewer workers, and takes more in as they fit."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import ray
from pool_faults import Training, announce, nodes, nothing_is_left
from ray.cluster_utils import Cluster
from waits import seconds, soon

from hncse_ray.config import Settings
from hncse_ray.errors import ClusterError
from hncse_ray.storage.remote import Remote
from hncse_ray.training.store import stored_checkpoints

pytestmark = [pytest.mark.slow, pytest.mark.timeout(500)]
STEPS, EVERY = 400, 10


@pytest.fixture
def cluster() -> Iterator[Cluster]:
    """A head that no trainer fits on, and two nodes for one each."""
    with nodes(0, 1, 1) as cluster:
        yield cluster


def settings(small_run: dict[str, Any], **asked: Any) -> Settings:
    tree = {name: dict(section) for name, section in small_run.items()}
    tree["cluster"] = {"num_workers": 2, "min_workers": 1, "cpus_per_worker": 1, "use_gpu": False, **asked}
    tree["train"] |= {"max_steps": STEPS, "log_every_steps": 5, "evaluate_every_steps": 5000}
    tree["train"]["checkpoint_every_steps"] = EVERY
    return Settings.model_validate(tree)


def starts(training: Training) -> list[tuple[int, int]]:
    """The step and the number of workers of each start so far."""
    found = re.findall(r"(?:starts|resumes at step (\d+)).*?(\d+) workers?\b", training.log())
    return [(int(step or 0), int(workers)) for step, workers in found]


def test_a_run_goes_on_with_the_workers_it_has_and_takes_more_in(cluster: Cluster, small_run: dict[str, Any]) -> None:
    training = Training(settings(small_run))
    with training.slowly():
        lost_at = training.line(lambda row: row["step"] >= 20, within_s=180, what="steps")["step"]
        cluster.remove_node(next(iter(cluster.worker_nodes)), allow_graceful=False)
        soon(lambda: len(starts(training)) == 2, within_s=150, what="the run with one worker")
        training.line(lambda row: row["step"] > lost_at + EVERY, within_s=60, what="its steps")
        cluster.add_node(num_cpus=1)
        soon(lambda: len(starts(training)) == 3, within_s=90, what="the run with two workers")
    assert training.finish(within_s=200).steps == STEPS
    (first, workers), (fewer_at, fewer), (more_at, more) = starts(training)
    assert (first, workers, fewer, more) == (0, 2, 1, 2)
    assert lost_at - EVERY <= fewer_at <= lost_at + 2 * EVERY
    log = training.log()
    assert log.count("there is room for 1 of 2 workers") == 1 and log.count("1 more worker can be had now") == 1
    assert f" step {more_at}/" in log and f" step {more_at + 5}/" in log
    # It paused right at a line of the log: nothing was done twice, and no line is missing.
    assert log[: log.index(f"resumes at step {more_at}")].count(f" step {more_at + 5}/") == 0
    assert [line["step"] for line in training.lines()] == list(range(5, STEPS + 1, 5))
    assert nothing_is_left()


def test_one_at_a_url_with_a_pool_too(cluster: Cluster, small_run: dict[str, Any], tmp_path: Path) -> None:
    """The shards reserve nothing, so one of them lives on the lost node."""
    small_run["run"]["storage_path"] = f"file://{tmp_path}/store"
    small_run["negatives"] = {
        "source": "pool",
        "num_shards": 2,
        "cpus_per_shard": 0,
        "refresh": "sync",
        "refresh_every_steps": 50,
    }
    asked = settings(small_run)
    training, store = Training(asked), Remote(asked.run_dir)
    with training.slowly():
        both = training.line(lambda row: row.get("negatives/shards_alive") == 2, within_s=180, what="both shards")
        soon(lambda: stored_checkpoints(store), within_s=60, what="a checkpoint at the URL")
        # The shards were spread over the nodes, at most one to each.
        lost = next(node for node in cluster.worker_nodes if node.node_id in shard_nodes())
        cluster.remove_node(lost, allow_graceful=False)
        soon(lambda: len(starts(training)) == 2, within_s=150, what="the run with one worker")
        training.line(lambda row: row["step"] > both["step"] + EVERY, within_s=60, what="its steps")
        cluster.add_node(num_cpus=1)
        soon(lambda: len(starts(training)) == 3, within_s=90, what="the run with two workers")
        training.line(lambda row: row.get("negatives/shards_alive") == 2, within_s=120, what="both shards again")
    assert training.finish(within_s=200).steps == STEPS
    assert [workers for _, workers in starts(training)] == [2, 1, 2]
    lines = training.lines()
    assert [line["step"] for line in lines] == list(range(5, STEPS + 1, 5))
    assert lines[-1]["negatives/index_step"] == STEPS - 50
    assert stored_checkpoints(store)[0] == f"step_{STEPS:09d}" and store.read("result.json")
    assert [
        json.loads(line)["step"] for line in (store.read("metrics.jsonl") or b"").splitlines() if b'"loss"' in line
    ] == [line["step"] for line in lines]
    assert nothing_is_left()


def shard_nodes() -> set[str]:
    """The nodes on which shards of a pool live."""
    found = ray._private.state.actors().values()
    return {a["Address"]["NodeID"] for a in found if a["ActorClassName"] == "ShardActor" and a["State"] == "ALIVE"}


def test_an_announced_loss_costs_nothing_where_enough_are_left(cluster: Cluster, small_run: dict[str, Any]) -> None:
    training = Training(settings(small_run))
    with training.slowly():
        training.line(lambda row: row["step"] >= 10, within_s=180, what="steps")
        leaving = next(iter(cluster.worker_nodes))
        announce(cluster, leaving.node_id, left_s=seconds(120))
        soon(lambda: len(starts(training)) == 2, within_s=100, what="the run with one worker")
        cluster.remove_node(leaving, allow_graceful=False)
        training.line(lambda row: True, within_s=60, what="steps after the node is gone")
    assert training.finish(within_s=200).steps == STEPS
    (_, workers), (paused_at, fewer) = starts(training)
    assert (workers, fewer) == (2, 1)
    log = training.log()
    assert log.count("will be taken away") == 1 and "workers were lost" not in log
    assert log[: log.index(f"resumes at step {paused_at}")].count(f" step {paused_at + 5}/") == 0
    assert [line["step"] for line in training.lines()] == list(range(5, STEPS + 1, 5))
    assert nothing_is_left()


def test_a_run_begins_with_those_that_fit_and_too_few_are_refused(cluster: Cluster, small_run: dict[str, Any]) -> None:
    with pytest.raises(ClusterError, match=r"3 workers x 1 CPU"):
        Training(settings(small_run, num_workers=4, min_workers=3)).finish(within_s=60)
    small_run["run"]["name"] = "begins"
    training = Training(settings(small_run, num_workers=4, min_workers=2))
    with training.slowly():
        training.line(lambda row: row["step"] >= 10, within_s=180, what="steps")
        assert starts(training) == [(0, 2)]
        for node in list(cluster.worker_nodes):
            cluster.remove_node(node, allow_graceful=False)
        soon(lambda: "workers were lost" in training.log(), within_s=120, what="the news")
        for _ in range(2):
            cluster.add_node(num_cpus=1)
    assert training.finish(within_s=250).steps == STEPS
    assert [workers for _, workers in starts(training)] == [2, 2]
    assert nothing_is_left()
