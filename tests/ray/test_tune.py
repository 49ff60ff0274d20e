"""Sweeps on a real Ray: trials that finish, stop early and fail; kills, Ctrl-C; and nothing left behind."""

from __future__ import annotations

import csv
import os
import signal
import time
from pathlib import Path

import pytest
import yaml
from commands import Command
from optuna.trial import FrozenTrial, TrialState
from tiny import small_settings
from waits import soon

import hncse_ray
from hncse_ray.config import load_settings
from hncse_ray.tuning import open_study

pytestmark = pytest.mark.timeout(1500)
SPACE = {
    "parameters": {
        "encoder.max_length": {"categorical": [24, 128]},  # the model takes 64: the latter fails
        "objective.temperature": {"loguniform": [0.01, 1.0]},
    },
    "first": [
        {"encoder.max_length": 24, "objective.temperature": 0.05},
        {"encoder.max_length": 128, "objective.temperature": 0.05},
        {"encoder.max_length": 24, "objective.temperature": 1.0},
    ],
}


@pytest.fixture(scope="module")
def recipe(tiny_model: Path, corpus_file: Path, pairs_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tune")
    corpus, pairs, model = map(os.path.relpath, (corpus_file, pairs_file, tiny_model))  # as they are named by hand
    tree = small_settings(model, corpus, pairs, folder)
    tree["objective"] = {"name": "info_nce"}
    every = dict.fromkeys(("log_every_steps", "evaluate_every_steps", "checkpoint_every_steps"), 5)
    tree["train"] |= {"max_steps": 20, **every}
    tree["evaluation"]["metric"] = "pairs/mrr"
    path = folder / "small.yaml"
    path.write_text(yaml.safe_dump(tree))
    (folder / "space.yaml").write_text(yaml.safe_dump(SPACE))
    one = {"parameters": {"objective.temperature": {"uniform": [0.01, 1.0]}}}
    (folder / "one.yaml").write_text(yaml.safe_dump(one))
    return path


def trials_of(folder: Path) -> list[FrozenTrial]:
    return open_study(folder).get_trials() if (folder / "study.db").exists() else []


def ended(folder: Path) -> dict[int, tuple[TrialState, float | None]]:
    return {t.number: (t.state, t.value) for t in trials_of(folder) if t.state.is_finished()}


def starts_of(folder: Path, number: int) -> int:
    return (folder / "trials" / f"trial-{number:04d}" / "log.txt").read_text().count(" starts: ")


@pytest.mark.parametrize("source", ["none", pytest.param("pool", marks=pytest.mark.slow)])
def test_a_sweep_leaves_the_best_and_says_why_a_trial_failed(recipe: Path, source: str) -> None:
    out = recipe.parent / f"swept-{source}"
    command = Command(
        "tune", str(recipe), f"negatives.source={source}", "negatives.max_score=null", "negatives.refresh=sync",
        "--space", str(recipe.parent / "space.yaml"), "--trials", "3", "--stopping", "none", "--out", str(out),
    )  # fmt: skip
    trainers = set[int]()
    while command.process.poll() is None:
        trainers |= {process.pid for process in command.processes("ray::ImplicitFunc")}
        time.sleep(0.2)
    result = command.finish()
    assert command.is_gone(), command.processes()
    assert result["trials"] == {"finished": 2, "failed": 1}
    assert len(trainers) == 1  # one process after another trial

    rows = list(csv.DictReader((out / "trials.csv").open()))
    assert [row["state"] for row in rows] == ["finished", "failed", "finished"]
    assert "64 tokens at most" in rows[1]["reason"]
    best = max((row for row in rows if row["score"]), key=lambda row: float(row["score"]))
    assert result["best_trial"] == int(best["trial"]) and result["score"] == pytest.approx(float(best["score"]))
    recipe_found = load_settings(out / "best.yaml")
    assert str(recipe_found.objective.temperature) == best["objective.temperature"]
    assert recipe_found.negatives.source == source and recipe_found.evaluation.test
    assert set(result["after"]) == {"pairs/recall@1", "pairs/recall@10", "pairs/mrr", "pairs/ndcg@10"}
    assert (out / "model" / "model.safetensors").is_file() and (out / "report.html").is_file()
    for row in rows:  # disk space was freed: no checkpoints, and no model but the best
        run = out / "trials" / f"trial-{int(row['trial']):04d}"
        assert not (run / "checkpoints").exists()
        assert (run / "model").exists() == (row is best)
    run, again = out / "trials" / f"trial-{result['best_trial']:04d}", recipe.parent / f"again-{source}"
    here = ["cluster.engine=local", f"run.storage_path={again}"]
    hncse_ray.train(load_settings(run / "settings.yaml", here))
    weights = [(place / "model" / "model.safetensors").read_bytes() for place in (run, again / run.name)]
    assert weights[0] == weights[1]  # nothing of the trials before is left in that process
    metrics = (out / "trials" / "trial-0000" / "metrics.jsonl").read_text()
    assert '"split": "dev"' in metrics and '"split": "test"' not in metrics


def sweep_under_way(recipe: Path, out: Path, steps: int) -> Command:
    """A sweep of two trials, the first of which has a checkpoint."""
    command = Command(
        "tune", str(recipe), f"train.max_steps={steps}", "--trials", "2", "--stopping", "none", "--out", str(out),
        "--space", str(recipe.parent / "one.yaml"),
    )  # fmt: skip
    soon((out / "trials/trial-0000/checkpoints/step_000000020").exists, within_s=240, what="a checkpoint")
    return command


def test_a_trial_whose_process_is_killed_goes_on_in_another(recipe: Path) -> None:
    out = recipe.parent / "lost"
    command = sweep_under_way(recipe, out, steps=200)
    (trainer,) = command.processes("ray::ImplicitFunc")
    trainer.kill()
    assert command.finish(within_s=600)["trials"] == {"finished": 2}
    assert command.is_gone(), command.processes()
    logs = [(out / f"trials/trial-000{number}/log.txt").read_text() for number in range(2)]
    assert [log.count(" starts: ") for log in logs] == [1, 1]
    assert [log.count("resumes at step") for log in logs] == [1, 0]


def test_a_terminated_sweep_ends_with_the_status_of_that(recipe: Path) -> None:
    command = sweep_under_way(recipe, recipe.parent / "terminated", steps=4000)
    command.process.send_signal(signal.SIGTERM)
    _, err = command.ended(within_s=120)
    assert command.process.returncode == 143 and "Traceback" not in err
    assert err.splitlines()[-1] == "stopped; the same command again goes on where it stopped"
    assert command.is_gone(), command.processes()


@pytest.mark.slow
def test_killed_and_interrupted_a_sweep_goes_on_and_runs_nothing_twice(recipe: Path) -> None:
    out = recipe.parent / "killed"
    space = str(recipe.parent / "one.yaml")  # a trial that fails or is stopped early is over before it can be killed
    arguments = ["tune", str(recipe), "train.max_steps=60", "--trials", "5", "--space", space, "--stopping", "none"]
    first = Command(*arguments, "--out", str(out))
    soon(lambda: len(ended(out)) >= 1 and any(out.glob("trials/*/checkpoints/step_*")), within_s=400,
         what="a trial at its end and another's checkpoint")  # fmt: skip
    known = ended(out)
    first.process.kill()
    assert first.is_gone(), first.processes()
    before = ended(out)
    assert known.items() <= before.items()
    begun = {*before, *(int(path.parts[-3][-4:]) for path in out.glob("trials/*/checkpoints/step_*"))}

    second = Command("tune", "--resume", str(out))
    soon(lambda: len(ended(out)) > len(before), within_s=400, what="a further trial at its end")
    second.process.send_signal(signal.SIGINT)
    _, err = second.ended(within_s=120)
    assert second.process.returncode == 130 and "Traceback" not in err
    assert second.is_gone(), second.processes()
    between = ended(out)
    assert before.items() <= between.items()

    third = Command("tune", "--resume", str(out))
    third.finish(within_s=900)
    assert third.is_gone(), third.processes()
    after = ended(out)
    assert between.items() <= after.items()
    assert [state for state, _ in after.values()].count(TrialState.COMPLETE) == 5  # and any killed while sampled
    assert {starts_of(out, number) for number in begun} == {1}  # what was interrupted went on from its checkpoint


@pytest.mark.slow
def test_further_seeds_decide_and_only_the_chosen_model_sees_the_test_set(recipe: Path) -> None:
    out = recipe.parent / "seeded"
    command = Command(
        "tune", str(recipe), "--space", str(recipe.parent / "space.yaml"), "--trials", "3", "--seeds", "2",
        "--top", "2", "--out", str(out),
    )  # fmt: skip
    result = command.finish(within_s=1200)
    assert command.is_gone(), command.processes()
    assert {len(row["scores"]) for row in result["seeds"]} == {2}
    means = [sum(row["scores"].values()) / 2 for row in result["seeds"]]
    assert means == sorted(means, reverse=True)
    assert result["best_trial"] == result["seeds"][0]["number"] and result["score"] == pytest.approx(means[0])
    for metrics in out.glob("*/*/metrics.jsonl"):
        assert '"split": "test"' not in metrics.read_text()
