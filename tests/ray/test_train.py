"""The train command on a real Ray: workers, kills, Ctrl-C; and nothing left behind."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import yaml
from commands import Command
from tiny import small_settings
from waits import soon

pytestmark = pytest.mark.timeout(900)  # a start takes 40 s on two quiet cores, and some tests make three
STEPS = 100  # long enough that a kill at a checkpoint comes before the end


def lines_of(run: Path) -> list[dict]:
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in row.items() if key not in ("sentences_per_s", "data/waited")} for row in rows]


def weights_of(run: Path) -> bytes:
    return (run / "model" / "model.safetensors").read_bytes()


@pytest.fixture(scope="module")
def recipe(
    tiny_model: Path, corpus_file: Path, pairs_file: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Path]:
    folder = tmp_path_factory.mktemp("ray")
    tree = small_settings(os.path.relpath(tiny_model), corpus_file, pairs_file, folder)
    tree["run"]["name"] = "reference"
    tree["objective"] = {"name": "instance_smoothing", "buffer_size": 64, "group_size": 4}
    tree["train"] |= {"max_steps": STEPS, "evaluate_every_steps": 20, "checkpoint_every_steps": 10}
    tree["cluster"] = {"engine": "ray"}
    path = folder / "small.yaml"
    path.write_text(yaml.safe_dump(tree))
    yield path


@pytest.fixture(scope="module")
def reference(recipe: Path) -> tuple[Path, dict]:
    command = Command("train", str(recipe))
    result = command.finish()
    assert command.is_gone()
    return recipe.parent / "runs" / "reference", result


def checkpoint(recipe: Path, name: str, step: int) -> Callable[[], bool]:
    return (recipe.parent / "runs" / name / "checkpoints" / f"step_{step:09d}").exists


def test_a_run_leaves_a_model_checkpoints_settings_metrics_and_a_log(reference: tuple[Path, dict]) -> None:
    from sentence_transformers import SentenceTransformer

    from hncse_ray import load_encoder, load_settings

    run, result = reference
    assert result["steps"] == STEPS and result["sentences_per_s"] > 0
    assert set(result["before"]) == set(result["after"]) == {"dev", "test"}
    assert "pairs/recall@10" in result["after"]["test"]
    visible = {path.name for path in run.iterdir() if not path.name.startswith(".")}
    assert visible == {
        "model", "checkpoints", "settings.yaml", "metrics.jsonl", "log.txt", "result.json", "report.html",
        "tensorboard", "samples.jsonl",
    }  # fmt: skip
    assert sorted(p.name for p in (run / "checkpoints").glob("step_*")) == ["step_000000090", "step_000000100"]
    assert load_settings(run / "model" / "settings.yaml") == load_settings(run / "settings.yaml")
    assert f"finished after {STEPS} steps" in (run / "log.txt").read_text()
    texts = ["the old man reads a book", "a river"]
    vectors = load_encoder(result["model"]).encode(texts)
    np.testing.assert_allclose(SentenceTransformer(result["model"], device="cpu").encode(texts), vectors, atol=1e-5)


def test_a_finished_run_is_not_run_again(recipe: Path, reference: tuple[Path, dict]) -> None:
    run, result = reference
    before = (run / "metrics.jsonl").read_bytes()
    assert Command("train", str(recipe)).finish() == result
    assert (run / "metrics.jsonl").read_bytes() == before


@pytest.mark.slow
def test_killed_then_interrupted_goes_on_with_the_same_losses(recipe: Path, reference: tuple[Path, dict]) -> None:
    run = recipe.parent / "runs" / "stopped"
    first = Command("train", str(recipe), "run.name=stopped")
    soon((run / "settings.yaml").exists, within_s=240, what="the run's folder")
    rival = Command("train", str(recipe), "run.name=stopped")
    _, err = rival.ended(within_s=200)
    assert rival.process.returncode == 2 and "in use by another process" in err
    soon(checkpoint(recipe, "stopped", 10), within_s=240, what="a checkpoint")
    first.process.kill()
    assert first.is_gone(), first.processes()
    assert not (run / "model").exists()

    second = Command("train", str(recipe), "run.name=stopped")
    soon(lambda: "resumes at step" in (run / "log.txt").read_text(), within_s=240, what="the run to go on")
    second.process.send_signal(signal.SIGINT)
    _, err = second.ended(within_s=120)
    assert second.process.returncode == 130
    assert "the same command again goes on" in err and "Traceback" not in err
    assert second.is_gone(), second.processes()

    third = Command("train", str(recipe), "run.name=stopped")
    third.finish()
    assert (run / "log.txt").read_text().count("resumes at step") == 2
    assert lines_of(run) == lines_of(reference[0])
    assert weights_of(run) == weights_of(reference[0])
    assert third.is_gone(), third.processes()


@pytest.mark.slow
def test_one_of_two_workers_killed_is_replaced(recipe: Path, reference: tuple[Path, dict]) -> None:
    run = recipe.parent / "runs" / "two"
    command = Command("train", str(recipe), "run.name=two", "cluster.num_workers=2")
    soon(checkpoint(recipe, "two", 10), within_s=240, what="a checkpoint")
    workers = command.processes("RayTrainWorker")
    assert len(workers) == 2
    workers[1].kill()
    assert command.finish()["steps"] == STEPS
    assert (run / "log.txt").read_text().count("resumes at step") == 1
    # Which step is best, and so the last lines, may differ.
    rows, alone = (
        [r for r in lines_of(of) if r.get("split") != "test" and "verdict" not in r] for of in (run, reference[0])
    )
    # Before training both encoders are the same; afterwards dropout differs, so only the course is alike.
    assert rows[0] == alone[0]
    assert [r["step"] for r in rows] == [r["step"] for r in alone]
    course = [np.mean([r["positive_similarity"] for r in part if "loss" in r]) for part in (rows, alone)]
    assert course[0] == pytest.approx(course[1], abs=0.05)
    assert command.is_gone(), command.processes()


@pytest.mark.slow
def test_a_run_goes_on_with_the_other_engine(recipe: Path, reference: tuple[Path, dict]) -> None:
    run = recipe.parent / "runs" / "either"
    for engine, step in (("local", 10), ("ray", 40)):
        command = Command("train", str(recipe), "run.name=either", f"cluster.engine={engine}")
        soon(checkpoint(recipe, "either", step), within_s=240, what="a checkpoint")
        command.process.send_signal(signal.SIGINT)
        command.ended(within_s=120)
        assert command.process.returncode == 130 and command.is_gone()
    result = Command("train", str(recipe), "run.name=either", "cluster.engine=local").finish()
    assert (run / "log.txt").read_text().count("resumes at step") == 2
    own = ("model", "report", "seconds", "sentences_per_s")
    found, wanted = ({k: v for k, v in facts.items() if k not in own} for facts in (result, reference[1]))
    assert found == wanted
    assert lines_of(run) == lines_of(reference[0])
    assert weights_of(run) == weights_of(reference[0])


def test_beside_a_pool_the_command_trains_itself_and_killed_it_goes_on_with_the_same_losses(recipe: Path) -> None:
    pool = ["negatives.source=pool", "negatives.refresh=sync", "negatives.refresh_every_steps=20", "run.name=beside"]
    begun = Command("train", str(recipe), *pool, "cluster.engine=auto")
    soon(checkpoint(recipe, "beside", 30), within_s=240, what="a checkpoint")
    assert begun.processes("ShardActor")
    assert not begun.processes("TrainWorker") and not begun.processes("TrainController")
    begun.process.kill()
    assert begun.is_gone(), begun.processes()
    again = Command("train", str(recipe), *pool, "cluster.engine=auto")
    again.finish()
    assert again.is_gone(), again.processes()
    Command("train", str(recipe), *pool, "cluster.engine=local", "run.name=here").finish()  # the same index
    runs = recipe.parent / "runs"
    assert (runs / "beside/log.txt").read_text().count("resumes at step") == 1
    assert weights_of(runs / "beside") == weights_of(runs / "here")


_FAILS = """
import sys, time
import hncse_ray, ray
from hncse_ray.cluster import local

def fails(*_):
    raise hncse_ray.HncseError("before its first step")

local.fit = fails
try:
    hncse_ray.train(hncse_ray.load_settings(sys.argv[1], sys.argv[2:]))
except hncse_ray.HncseError as error:
    print(error)
time.sleep(2)
print(ray.is_initialized())
"""


def test_a_run_that_fails_beside_its_pool_starts_no_second_ray(recipe: Path) -> None:
    pool = ["negatives.source=pool", "negatives.refresh=sync", "cluster.engine=auto", "run.name=fails"]
    found = subprocess.run([sys.executable, "-c", _FAILS, str(recipe), *pool], capture_output=True, text=True)
    assert found.stdout.splitlines()[-2:] == ["before its first step", "False"], found.stderr
    assert "SIGTERM handler" not in found.stderr
