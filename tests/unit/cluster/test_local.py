"""Training in one process without Ray, as one worker on one machine does, and sentences that are handed over."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import yaml
from commands import Command
from invoke import assert_refused, hncse
from tiny import make_sentences
from waits import seconds, soon

import hncse_ray
from hncse_ray.cluster import run
from hncse_ray.config import load_settings
from hncse_ray.errors import SettingsError
from hncse_ray.reporting import Event, Notice, RunStarted

Tree = dict[str, Any]

ALONE = """
import sys
import time
sys.modules |= {"ray": None, "faiss": None, "optuna": None, "plotly": None}  # as if they were not installed
import hncse_ray
settings = hncse_ray.load_settings(sys.argv[1])
result = hncse_ray.train(settings)
print(result.steps, hncse_ray.load_encoder(result.model).encode(["A river."]).shape[1])
"""


class Heard:
    def __init__(self) -> None:
        self.events: list[Event] = []

    def on(self, event: Event) -> None:
        self.events.append(event)

    def close(self) -> None: ...

    def of(self, kind: type) -> list[Any]:
        return [event for event in self.events if isinstance(event, kind)]


@pytest.fixture
def local(small_run: Tree) -> Tree:
    small_run["negatives"] = {"source": "in_process", "refresh": "sync", "refresh_every_steps": 4}
    return small_run


def write(tree: Tree, path: Path) -> Path:
    path.write_text(yaml.safe_dump(tree), encoding="utf-8")
    return path


def lines_of(run: Path) -> list[Tree]:
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    timed = ("sentences_per_s", "_ms_p", "build_", "waited")
    return [{name: value for name, value in row.items() if not any(t in name for t in timed)} for row in rows]


def test_a_run_needs_neither_ray_nor_faiss_and_without_plotly_only_its_page_is_missing(
    local: Tree, tmp_path: Path
) -> None:
    recipe = write(local, tmp_path / "recipe.yaml")
    done = subprocess.run(
        [sys.executable, "-c", ALONE, str(recipe)], capture_output=True, text=True, timeout=seconds(120)
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["12", "32"]
    run = tmp_path / "runs" / "small"
    assert "the page of the run could not be written" in (run / "log.txt").read_text() + done.stderr
    assert (run / "result.json").exists() and not (run / "report.html").exists()


def test_a_run_leaves_the_folder_that_one_with_ray_leaves(local: Tree) -> None:
    settings, heard = load_settings(local), Heard()
    result = hncse_ray.train(settings, reporter=heard)
    run = Path(settings.run_dir)
    assert {path.name for path in run.iterdir() if not path.name.startswith(".")} == {
        "model", "checkpoints", "settings.yaml", "metrics.jsonl", "log.txt", "result.json", "report.html",
        "tensorboard", "samples.jsonl",
    }  # fmt: skip
    assert sorted(p.name for p in (run / "checkpoints").iterdir()) == ["step_000000008", "step_000000012"]
    assert "finished after 12 steps" in (run / "log.txt").read_text()
    assert result.steps == 12 and [event.resumed for event in heard.of(RunStarted)] == [False]
    assert hncse_ray.train(settings) == result  # is finished


def test_an_interrupted_run_goes_on_as_if_it_had_not_been(local: Tree, tmp_path: Path) -> None:
    local["train"] |= {"max_steps": 400, "checkpoint_every_steps": 4, "evaluate_every_steps": 200}
    local["negatives"] = {"source": "none"}
    recipe, runs = write(local, tmp_path / "recipe.yaml"), tmp_path / "runs"
    first = Command("train", str(recipe))
    soon((runs / "small/checkpoints/step_000000004").exists, within_s=120, what="a checkpoint")
    first.process.send_signal(signal.SIGINT)
    _, err = first.ended(within_s=60)
    assert first.process.returncode == 130, err
    assert "the same command again goes on" in err and "Traceback" not in err
    assert not (runs / "small/model").exists()
    assert all(path.name.startswith("step_") for path in (runs / "small/checkpoints").iterdir())

    again, whole = Heard(), load_settings(local, ["run.name=whole"])
    hncse_ray.train(load_settings(local), reporter=again)
    hncse_ray.train(whole)
    (started,) = again.of(RunStarted)
    assert started.resumed and 0 < started.step < 400
    assert lines_of(runs / "small") == lines_of(runs / "whole")
    weights = [(runs / name / "model/model.safetensors").read_bytes() for name in ("small", "whole")]
    assert weights[0] == weights[1]


def test_a_pool_becomes_an_index_in_this_process_and_the_user_is_told(local: Tree) -> None:
    heard = Heard()
    local["negatives"] |= {"source": "pool", "num_shards": 2, "cpus_per_shard": 1}
    local["cluster"]["engine"] = "local"
    hncse_ray.train(load_settings(local), reporter=heard)
    assert [notice.text for notice in heard.of(Notice) if "made in this process" in notice.text]
    here = hncse_ray.train(load_settings(local, ["negatives.source=in_process", "negatives.num_shards=1",
                                                 "negatives.cpus_per_shard=0", "run.name=here"]))  # fmt: skip
    runs = Path(here.model).parents[1]
    assert lines_of(runs / "small") == lines_of(runs / "here")


def test_a_reporter_that_fails_does_not_end_the_run(local: Tree) -> None:
    class Broken:
        def on(self, event: Event) -> None:
            if isinstance(event, RunStarted):
                raise OSError(28, "No space left on device")

        def close(self) -> None: ...

    settings = load_settings(local)
    assert hncse_ray.train(settings, reporter=Broken()).steps == 12
    assert "an event could not be reported" in (Path(settings.run_dir) / "log.txt").read_text()


@pytest.mark.parametrize(
    ("overrides", "variables", "engine"),
    [
        ([], {}, run.train_here),
        ([], {"RAY_ADDRESS": "local"}, run.train_here),
        (["negatives.source=pool"], {}, run.train_beside_pool),
        (["negatives.source=pool", "cluster.engine=local"], {}, run.train_here),
        (["cluster.engine=ray"], {}, run.train_on_ray),
        (["cluster.num_workers=2"], {}, run.train_on_ray),
        (["cluster.min_workers=1", "cluster.use_gpu=false"], {}, run.train_on_ray),
        (["cluster.trainer_labels={role: trainer}"], {}, run.train_on_ray),
        (["negatives.source=pool", "negatives.gpus_per_shard=1"], {}, run.train_on_ray),
        ([], {"RAY_ADDRESS": "10.0.0.1:6379"}, run.train_on_ray),
        ([], {"RAY_JOB_CONFIG_JSON_ENV_VAR": "{}"}, run.train_on_ray),
    ],
)
def test_one_worker_that_nothing_else_is_asked_of_is_this_process(
    local: Tree, monkeypatch: pytest.MonkeyPatch, overrides: list[str], variables: dict[str, str], engine: run.Engine
) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert run.choose_engine(load_settings(local, overrides)) is engine


@pytest.mark.parametrize(
    ("override", "said"),
    [("cluster.num_workers=2", "num_workers needs engine: ray"), ("cluster.min_workers=1", "min_workers needs engine")],
)
def test_several_workers_are_refused(local: Tree, override: str, said: str) -> None:
    local["cluster"]["engine"] = "local"
    with pytest.raises(SettingsError, match=f"one worker in the command's own process; {said}"):
        load_settings(local, [override])


def test_a_sweep_and_a_job_are_refused(local: Tree, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    local["cluster"]["engine"] = "local"
    recipe, space = write(local, tmp_path / "recipe.yaml"), tmp_path / "space.yaml"
    space.write_text("parameters:\n  train.learning_rate:\n    loguniform: [1.0e-5, 1.0e-3]\n")
    tuned = hncse("tune", recipe, "--space", space, "--out", tmp_path / "sweep")
    assert_refused(tuned, "cluster.engine", "a sweep runs many")
    assert not (tmp_path / "sweep").exists()
    assert_refused(hncse("submit", "train", recipe, "cluster.engine=local"), "cluster.engine", "a job is on a cluster")
    monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", "{}")
    assert_refused(hncse("train", recipe), "cluster.engine", "a job is on a cluster")
    assert not (tmp_path / "runs").exists()


def test_sentences_are_trained_on_without_a_file(local: Tree) -> None:
    sentences = [*make_sentences(120), "  twice   ", "twice", "", "\ud800"]
    del local["corpus"]["path"]
    local["corpus"]["source"] = "memory"
    settings, heard = load_settings(local), Heard()
    assert hncse_ray.train(settings, sentences=sentences, reporter=heard).steps == 12
    (started,) = heard.of(RunStarted)
    assert started.sentences == 121
    with pytest.raises(SettingsError, match=r"hncse_ray\.train\(settings, sentences="):
        hncse_ray.train(load_settings(local, ["run.name=none"]))
    assert not (Path(settings.run.storage_path) / "none").exists()


def test_sentences_take_the_place_of_a_recipes_corpus(local: Tree) -> None:
    settings, heard = load_settings(local), Heard()
    hncse_ray.train(settings, sentences=iter(make_sentences(80)), reporter=heard)
    (started,) = heard.of(RunStarted)
    assert started.sentences == 80
    assert load_settings(Path(settings.run_dir) / "settings.yaml").corpus.source == "memory"


@pytest.mark.parametrize("kind", ["file", "folder"])
def test_a_finished_run_says_that_its_source_has_changed(
    local: Tree, tmp_path: Path, caplog: pytest.LogCaptureFixture, kind: str
) -> None:
    folder = tmp_path / "documents"
    folder.mkdir()
    (folder / "a.txt").write_text("\n\n".join(make_sentences(80)))
    local["corpus"] |= {"path": str(folder if kind == "folder" else folder / "a.txt"), "source": "auto"}
    if kind == "folder":
        local["corpus"]["passage_words"] = 10
    settings = load_settings(local, ["train.max_steps=2"])
    first = hncse_ray.train(settings)
    caplog.clear()
    assert hncse_ray.train(settings).model == first.model
    assert not [record for record in caplog.records if record.levelname == "WARNING"]
    changed = folder / ("b.txt" if kind == "folder" else "a.txt")
    changed.write_text("\n\n".join(make_sentences(90, seed=2)))
    later = time.time() + 5
    os.utime(Path(settings.run_dir) / "result.json", (later, later))
    assert hncse_ray.train(settings).model == first.model and "has changed since" not in caplog.text
    os.utime(Path(settings.run_dir) / "result.json", (later - 3600, later - 3600))
    assert hncse_ray.train(settings).model == first.model
    assert f"{folder / 'a.txt'} has changed since: choose another run.name" in caplog.text


def test_other_sentences_do_not_go_on_with_a_run(local: Tree) -> None:
    local["train"]["max_steps"] = 8
    settings = load_settings(local)
    hncse_ray.train(settings, sentences=make_sentences(80))
    (Path(settings.run_dir) / "result.json").unlink()
    with pytest.raises(hncse_ray.HncseError, match="another corpus"):
        hncse_ray.train(settings, sentences=make_sentences(81))


@pytest.mark.parametrize("sentences", ["one text", [b"bytes"], [1], 1, {"one": 1}, {"one"}], ids=repr)
def test_what_is_no_list_of_texts_is_refused(local: Tree, sentences: Any) -> None:
    settings = load_settings(local)
    with pytest.raises(SettingsError, match="is no list of texts"):
        hncse_ray.train(settings, sentences=sentences)
    with pytest.raises(
        SettingsError, match=r"are no Settings, but of type str\. Make them by hncse_ray\.load_settings"
    ):
        hncse_ray.train("quickstart")  # type: ignore[arg-type]
    assert not Path(settings.run_dir).exists()
