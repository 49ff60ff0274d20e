"""A run of the command with a tracker: its numbers arrive, and a server that is away stops nothing."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from invoke import assert_refused, hncse


@pytest.fixture
def recipe(small_run: dict[str, Any], tmp_path: Path) -> Path:
    small_run["cluster"] |= {"engine": "local"}
    small_run["objective"] = {"name": "info_nce"}
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(small_run))
    return path


def test_mlflow_has_the_numbers_of_a_run(recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from mlflow import MlflowClient

    uri = f"sqlite:///{tmp_path}/mlflow.db"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    assert hncse("train", recipe, "run.trackers=mlflow").exit_code == 0
    client = MlflowClient(uri)
    (run,) = client.search_runs([client.get_experiment_by_name("hncse_ray").experiment_id])
    rows = [json.loads(line) for line in (tmp_path / "runs" / "small" / "metrics.jsonl").read_text().splitlines()]
    losses = [(row["step"], row["loss"]) for row in rows if "loss" in row]
    assert [(m.step, m.value) for m in client.get_metric_history(run.info.run_id, "train/loss")] == losses
    assert (run.info.status, run.data.params["train.batch_size"]) == ("FINISHED", "16")


def test_a_server_that_is_away_stops_nothing(recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    result = hncse("train", recipe, "run.trackers=mlflow", "--json")
    assert result.exit_code == 0 and json.loads(result.stdout.splitlines()[-1])["steps"] == 12
    assert result.stderr.count("the run goes on without it") == 1 and "Traceback" not in result.stderr


def test_a_tracker_that_there_is_not(recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HNCSE_TRACKERS", "comet")
    assert_refused(hncse("train", recipe), "'comet' is no tracker")
    assert not (tmp_path / "runs").exists()
