"""Runs that are kept at a URL, on a real Ray: killed and resumed on a fresh machine, through an outage, on two nodes.

The URL is on a server of S3 or of Google's storage where one can be had, see tests/object_stores.py.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import uuid
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import pytest
import ray
import yaml
from commands import marked
from object_stores import BUCKET, Gate, gcs_server, s3_server
from pool_faults import actors
from ray.cluster_utils import Cluster
from tiny import small_settings
from waits import seconds, soon

from hncse_ray.cluster import train
from hncse_ray.config import Settings, load_settings
from hncse_ray.reporting.events import Event, Notice, RunStarted
from hncse_ray.storage.remote import Remote
from hncse_ray.training.run_folder import working_folder
from hncse_ray.training.store import stored_checkpoints

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]
STEPS = 60


class Machine:
    """``hncse train`` with a cache of its own, as on a machine of its own."""

    def __init__(self, recipe: Path, name: str, cache: Path) -> None:
        overrides = [f"run.name={name}", f"corpus.cache_dir={cache}"]
        self.settings = load_settings(recipe, overrides)
        self.mark = uuid.uuid4().hex
        self.process = subprocess.Popen(
            [sys.executable, "-m", "hncse_ray.cli", "train", str(recipe), *overrides, "--json"],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=os.environ | {"HNCSE_TEST_MARK": self.mark},
            start_new_session=True,
        )

    def finish(self) -> tuple[dict, str]:
        out, err = self.process.communicate(timeout=seconds(500))
        assert self.process.returncode == 0, err
        return json.loads(out.splitlines()[-1]), err

    def kill(self) -> None:
        """Kill all processes of the machine at once, as when its power goes."""
        for process in marked(self.mark):
            with suppress(psutil.NoSuchProcess):
                process.kill()
        self.process.communicate(timeout=seconds(60))


@pytest.fixture(scope="module", params=["s3", "gs"])
def scheme(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def gate(scheme: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Gate]:
    server = {"s3": s3_server, "gs": gcs_server}[scheme]
    with server(tmp_path_factory.mktemp(scheme)) as gate:
        yield gate


@pytest.fixture(scope="module")
def runs(scheme: str, gate: Gate) -> str:
    return f"{scheme}://{BUCKET}/some/runs"


@pytest.fixture(scope="module")
def recipe(runs: str, tiny_model: Path, corpus_file: Path, pairs_file: Path, tmp_path_factory: Any) -> Path:
    path = tmp_path_factory.mktemp("recipe") / "small.yaml"
    tree = small_settings(tiny_model, corpus_file, pairs_file, path.parent)
    tree["run"] = {"storage_path": runs, "seed": 3}
    del tree["corpus"]["cache_dir"]  # each node has one of its own
    tree["objective"] = {"name": "instance_smoothing", "buffer_size": 64, "group_size": 4}
    tree["train"] |= {"max_steps": STEPS, "evaluate_every_steps": 20, "checkpoint_every_steps": 5}
    tree["cluster"] = {"engine": "ray"}
    path.write_text(yaml.safe_dump(tree))
    return path


def lines_of(remote: Remote) -> list[dict]:
    rows = [json.loads(line) for line in (remote.read("metrics.jsonl") or b"").decode().splitlines()]
    return [{key: value for key, value in row.items() if key not in ("sentences_per_s", "data/waited")} for row in rows]


@pytest.fixture(scope="module")
def reference(runs: str, recipe: Path, tmp_path_factory: pytest.TempPathFactory) -> Remote:
    result, _ = Machine(recipe, "reference", tmp_path_factory.mktemp("cache")).finish()
    remote = Remote(f"{runs}/reference")
    assert result["model"] == f"{remote.url}/model" and result["steps"] == STEPS
    return remote


def test_a_run_leaves_all_of_itself_at_the_url(reference: Remote) -> None:
    names = reference.names()
    top = {name.partition("/")[0] for name in names}
    assert top == {
        "settings.yaml", "result.json", "metrics.jsonl", "samples.jsonl", "log.txt", "tensorboard", "checkpoints",
        "model",
    }  # fmt: skip
    assert stored_checkpoints(reference)[0] == f"step_{STEPS:09d}"
    assert b"finished after" in (reference.read("log.txt") or b"")


def test_a_finished_run_is_not_run_again_on_another_machine(recipe: Path, reference: Remote, tmp_path: Path) -> None:
    before = reference.read("metrics.jsonl")
    result, err = Machine(recipe, "reference", tmp_path).finish()
    assert result["model"] == f"{reference.url}/model" and "finished already" in err
    assert reference.read("metrics.jsonl") == before


def test_a_machine_dies_and_another_goes_on_with_the_same_losses(
    runs: str, recipe: Path, reference: Remote, tmp_path: Path
) -> None:
    remote = Remote(f"{runs}/killed")
    first = Machine(recipe, "killed", tmp_path / "one")
    soon(lambda: stored_checkpoints(remote), within_s=300, what="a checkpoint at the URL")
    first.kill()
    assert remote.read("result.json") is None
    result, err = Machine(recipe, "killed", tmp_path / "two").finish()
    assert "shows no life" in err and "resumes at step" in err
    assert result["steps"] == STEPS
    assert lines_of(remote) == lines_of(reference)
    assert remote.read("model/model.safetensors") == reference.read("model/model.safetensors")


def test_the_storage_is_away_for_a_while(
    runs: str, recipe: Path, reference: Remote, gate: Gate, tmp_path: Path
) -> None:
    remote = Remote(f"{runs}/outage")
    machine = Machine(recipe, "outage", tmp_path)
    work = working_folder(machine.settings)
    soon(lambda: stored_checkpoints(remote), within_s=300, what="a checkpoint at the URL")
    gate.close()
    try:
        soon(lambda: "the storage fails" in (work / "log.txt").read_text(), within_s=300, what="the news")
    finally:
        gate.open()
    machine.finish()
    assert lines_of(remote) == lines_of(reference)
    assert remote.read("model/model.safetensors") == reference.read("model/model.safetensors")
    assert stored_checkpoints(remote)[0] == f"step_{STEPS:09d}"


class TestTwoNodes:
    """A head for the driver, and two nodes for one worker each, all three with caches of their own."""

    @pytest.fixture
    def cluster(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Cluster]:
        monkeypatch.setenv("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.2")
        monkeypatch.setenv("HNCSE_CACHE", str(tmp_path / "driver"))
        cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
        try:
            for name in ("one", "two"):
                cluster.add_node(num_cpus=1, env_vars={"HNCSE_CACHE": str(tmp_path / name)})
            ray.init(address=cluster.address, log_to_driver=False)
            yield cluster
        finally:
            ray.shutdown()
            cluster.shutdown()

    def test_each_fetches_what_it_needs(self, cluster: Cluster, small_run: dict[str, Any], tmp_path: Path) -> None:
        tree = {name: dict(section) for name, section in small_run.items()}
        tree["run"]["storage_path"] = f"file://{tmp_path}/store"
        tree["train"] |= {"max_steps": 400, "checkpoint_every_steps": 20, "evaluate_every_steps": 200}
        tree["cluster"] = {"num_workers": 2, "cpus_per_worker": 1}
        del tree["corpus"]["cache_dir"]
        settings = load_settings(tree)
        seen = Seen()
        killer = threading.Thread(target=kill_a_worker, args=(settings,), daemon=True)
        killer.start()
        result = train(settings, reporter=seen)
        killer.join(timeout=seconds(10))
        assert result.steps == 400
        starts = [event for event in seen.events if isinstance(event, RunStarted)]
        assert len(starts) == 2 and starts[0].step == 0 and starts[1].step >= 20
        assert not [event.text for event in seen.events if isinstance(event, Notice)]
        where = working_folder(settings).name
        for name in ("one", "two"):
            assert list((tmp_path / name / "runs" / where / "checkpoints").glob("step_*")), name
        assert not list((tmp_path / "driver/runs" / where / "checkpoints").glob("step_*"))
        store = Remote(settings.run_dir)
        assert store.read("model/model.safetensors") and store.read("result.json")


class Seen:
    def __init__(self) -> None:
        self.events: list[Event] = []

    def on(self, event: Event) -> None:
        self.events.append(event)

    def close(self) -> None:
        pass


def kill_a_worker(settings: Settings) -> None:
    store = Remote(settings.run_dir)
    soon(lambda: stored_checkpoints(store), within_s=120, what="a checkpoint at the URL")
    actors("RayTrainWorker")[-1].kill()
