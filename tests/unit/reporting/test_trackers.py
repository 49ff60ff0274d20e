"""MLflow against its own file store, Weights & Biases offline; and a run that does not notice when they fail."""

from __future__ import annotations

import json
import logging
import threading
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
from waits import soon

from hncse_ray.config import load_settings
from hncse_ray.errors import SettingsError
from hncse_ray.reporting.events import Evaluated, Event, Notice, RunFinished, RunStarted, StageProgress, StepsLogged
from hncse_ray.reporting.trackers import TRACKERS, Tracking, chosen_trackers, tracking

SETTINGS = {"train.batch_size": 16, "objective.name": "hybrid", "train.max_steps": None}


def started(step: int = 0) -> RunStarted:
    return RunStarted("small", step, 12, 1300, 16, 2, "cpu", "fp32 (as set)", resumed=step > 0)


def events(*, step: int = 0, ends: bool = True) -> list[Event]:
    found: list[Event] = [
        StageProgress("tokenise", 10, None),
        started(step),
        StepsLogged(step + 4, {"loss": 0.75, "negatives/missing": 0.0}, 1e-3, 100.0),
        Evaluated(step + 4, "dev", {"pairs/recall@10": 0.875}, "pairs/recall@10", True),
        Notice("a remark"),
        StepsLogged(step + 8, {"loss": 0.5}, 1e-4, 120.0),
    ]
    return [*found, RunFinished(step + 8, step + 4, 100.0, False)] if ends else found


def follow(name: str, folder: Path, happened: list[Event]) -> None:
    with tracking([name], folder, SETTINGS) as (reporter,):
        for event in happened:
            reporter.on(event)


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    from mlflow import MlflowClient

    uri = f"sqlite:///{tmp_path}/mlflow.db"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    monkeypatch.delenv("MLFLOW_EXPERIMENT_NAME", raising=False)
    return MlflowClient(uri)


def runs_of(store: Any, experiment: str = "hncse_ray") -> list[Any]:
    return list(store.search_runs([store.get_experiment_by_name(experiment).experiment_id]))


def test_mlflow_has_numbers_settings_and_end_of_a_run(store: Any, tmp_path: Path) -> None:
    follow("mlflow", tmp_path, events())
    (run,) = runs_of(store)
    assert (run.info.run_name, run.info.status) == ("small", "FINISHED")
    assert run.data.params == {"train.batch_size": "16", "objective.name": "hybrid", "train.max_steps": "None"}
    history = store.get_metric_history(run.info.run_id, "train/loss")
    assert [(m.step, m.value) for m in history] == [(4, 0.75), (8, 0.5)]
    assert run.data.metrics["dev/pairs/recall_at_10"] == 0.875 and run.data.metrics["train/negatives/missing"] == 0.0


def test_a_run_that_is_taken_up_again_goes_on_in_the_same_place(
    store: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_EXPERIMENT_NAME", "mine")
    follow("mlflow", tmp_path, events(ends=False))
    assert [run.info.status for run in runs_of(store, "mine")] == ["FAILED"]
    follow("mlflow", tmp_path, events(step=8))
    (run,) = runs_of(store, "mine")
    assert run.info.status == "FINISHED"
    assert [m.step for m in store.get_metric_history(run.info.run_id, "train/loss")] == [4, 8, 12, 16]
    follow("mlflow", tmp_path, events())  # begun anew, in a folder whose checkpoints are gone
    assert len(runs_of(store, "mine")) == 2


def test_wandb_keeps_a_run_offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    follow("wandb", tmp_path, events())
    (kept,) = tmp_path.glob("wandb/offline-run-*/*.wandb")
    known = json.loads((tmp_path / "trackers.json").read_text())["wandb"]
    assert kept.name == f"run-{known}.wandb"
    # What W&B's own process has not written yet when its `finish` returns, it writes soon after.
    soon(lambda: any(record.HasField("exit") for record in read_wandb(kept)), within_s=30, what="the last record")
    records = list(read_wandb(kept))
    history = [{item.nested_key[0] if item.nested_key else item.key: json.loads(item.value_json)
                for item in record.history.item} for record in records if record.HasField("history")]  # fmt: skip
    assert [(row["_step"], row["train/loss"]) for row in history if "train/loss" in row] == [(4, 0.75), (8, 0.5)]
    assert [row["dev/pairs/recall@10"] for row in history if "dev/pairs/recall@10" in row] == [0.875]
    (begun,) = [record.run for record in records if record.HasField("run")][:1]
    assert begun.display_name == "small"
    assert {item.key: json.loads(item.value_json) for item in begun.config.update}["objective.name"] == "hybrid"
    assert [record.exit.exit_code for record in records if record.HasField("exit")] == [0]


def read_wandb(path: Path) -> Iterator[Any]:
    """Read the records of a file of W&B: LevelDB's log format, in blocks of 32 KiB, after seven bytes of its own."""
    from wandb.proto.wandb_internal_pb2 import Record

    data, at, piece = path.read_bytes(), 7, b""
    while at + 7 <= len(data):
        if (left := 32_768 - at % 32_768) < 7:  # what is left of a block has no room for a header
            at += left
            continue
        length, kind = int.from_bytes(data[at + 4 : at + 6], "little"), data[at + 6]
        piece += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # whole, or the last part
            record = Record()
            record.ParseFromString(piece)
            piece = b""
            yield record


class Broken:
    """A tracker whose server goes away, or never answers."""

    def __init__(self, where: str) -> None:
        self.where, self.calls = where, 0

    def _reach(self, place: str) -> None:
        self.calls += 1
        if place == self.where:
            raise ConnectionError("no route to the server\nwith a long story")

    def begin(self, run: str, known: str | None, settings: Mapping[str, object]) -> str:
        self._reach("begin")
        return "known"

    def log(self, numbers: Mapping[str, float], step: int) -> None:
        self._reach("log")

    def end(self, well: bool) -> None:
        self._reach("end")


@pytest.mark.parametrize("where", ["begin", "log", "end"])
def test_a_tracker_that_fails_is_said_once_and_then_left_alone(
    where: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    broken = Broken(where)
    monkeypatch.setitem(TRACKERS, "mlflow", lambda: broken)
    with caplog.at_level(logging.WARNING):
        follow("mlflow", tmp_path, events())
    assert [r.getMessage() for r in caplog.records] == ["mlflow: no route to the server; the run goes on without it"]
    assert broken.calls == {"begin": 1, "log": 2, "end": 5}[where]


def test_a_tracker_that_hangs_does_not_hold_the_run_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    release = threading.Event()

    class Hanging(Broken):
        def _reach(self, place: str) -> None:
            release.wait()

    monkeypatch.setattr("hncse_ray.reporting.trackers._LAST_S", 0.1)
    reporter = Tracking("mlflow", lambda: Hanging(""), tmp_path, SETTINGS)
    begun = time.monotonic()
    for event in events():
        reporter.on(event)
    assert time.monotonic() - begun < 1
    with caplog.at_level(logging.WARNING):
        reporter.close()
    assert "mlflow: the last numbers are not sent after 0.1 s" in caplog.text
    release.set()


def test_trackers_are_chosen_by_setting_or_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    base = {"corpus": {"source": "python-docs"}}
    monkeypatch.delenv("HNCSE_TRACKERS", raising=False)
    assert chosen_trackers(load_settings(base).run.trackers) == ()
    assert chosen_trackers(load_settings(base, ["run.trackers=mlflow"]).run.trackers) == ("mlflow",)
    monkeypatch.setenv("HNCSE_TRACKERS", "wandb, mlflow")
    assert chosen_trackers(load_settings(base).run.trackers) == ("wandb", "mlflow")
    assert chosen_trackers(load_settings(base, ["run.trackers=[]"]).run.trackers) == ()
    monkeypatch.setenv("HNCSE_TRACKERS", "tensorbord")
    with pytest.raises(
        SettingsError, match="HNCSE_TRACKERS=tensorbord: 'tensorbord' is no tracker. Choose from mlflow"
    ):
        chosen_trackers(None)
    with pytest.raises(SettingsError, match="run.trackers"):
        load_settings(base, ["run.trackers=comet"])


def test_a_tracker_that_is_not_installed_is_refused_before_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(SettingsError, match=r"mlflow is not installed. Try: pip install 'hncse-ray\[mlflow\]'"):
        chosen_trackers(["mlflow"])
