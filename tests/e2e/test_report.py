"""``hncse report`` on folders of every kind."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import yaml
from invoke import assert_refused, hncse
from left_runs import leave_sweep
from page_text import figures, table

from hncse_ray.config import load_settings


@pytest.fixture
def run_folder(tmp_path: Path) -> Path:
    folder = tmp_path / "runs" / "quickstart"
    folder.mkdir(parents=True)
    (folder / "settings.yaml").write_text(load_settings("quickstart").to_yaml())
    (folder / "metrics.jsonl").write_text('{"step": 5, "loss": 0.5}\n')
    return folder


@pytest.fixture
def sweep_folder(tmp_path: Path) -> Path:
    leave_sweep(tmp_path / "sweep")
    return tmp_path / "sweep"


def test_of_a_run(run_folder: Path) -> None:
    result = hncse("report", run_folder)
    assert result.exit_code == 0, result.stderr
    assert result.stdout.strip() == str(run_folder / "report.html")
    assert "the last step on record is <b>5</b>" in (run_folder / "report.html").read_text()


def test_of_a_sweep(sweep_folder: Path) -> None:
    result = hncse("report", sweep_folder, "--json")
    assert result.exit_code == 0, result.stderr
    page = sweep_folder / "report.html"
    assert json.loads(result.stdout.splitlines()[-1]) == {"kind": "sweep", "report": str(page)}
    rows = table(page.read_text(), 'id="ranking"')
    assert [row[:4] for row in rows[1:]] == [["1", "1", "0.6250", "20"], ["2", "0", "0.5000", "20"]]
    assert (sweep_folder / "plots" / "history.png").exists()


def test_of_several_runs(run_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    other = tmp_path / "runs" / "other"
    other.mkdir()
    (other / "settings.yaml").write_text(
        load_settings("quickstart", ["run.name=other", "train.batch_size=32"]).to_yaml()
    )
    scores = [
        {"step": step, "split": "dev", "python-docs/recall@10": 0.5 + step / 100, "is_best": True} for step in (0, 5)
    ]
    (other / "metrics.jsonl").write_text(
        "".join(json.dumps(row) + "\n" for row in [*scores, {"step": 5, "loss": 0.25}])
    )
    monkeypatch.chdir(tmp_path)
    result = hncse("report", run_folder, other, "--json")
    assert result.exit_code == 0, result.stderr
    assert json.loads(result.stdout.splitlines()[-1]) == {"kind": "runs", "report": "runs.html"}
    page = (tmp_path / "runs.html").read_text()
    head, *rows = table(page, 'id="runs"')
    assert head == ["run", "state", "steps", "python-docs/recall@10, dev"]
    assert rows == [["quickstart", "not finished", "5", "–"], ["other", "not finished", "5", "0.5500 +0.0500"]]
    assert table(page, 'id="differing"') == [["setting", "quickstart", "other"], ["train.batch_size", "64", "32"]]
    drawn = {trace["name"]: trace["y"] for traces, layout in figures(page).values() for trace in traces
             if layout["yaxis"]["title"]["text"] == "loss"}  # fmt: skip
    assert drawn == {"quickstart": [0.5], "other": [0.25]}
    shutil.copytree(other, tmp_path / "again" / "other")
    assert hncse("report", other, tmp_path / "again" / "other", "--out", tmp_path / "x.html").exit_code == 0
    _, *rows = table((tmp_path / "x.html").read_text(), 'id="runs"')
    assert [row[0] for row in rows] == ["runs/other", "again/other"]


def test_of_several_that_are_not_all_runs(run_folder: Path, sweep_folder: Path, tmp_path: Path) -> None:
    assert_refused(hncse("report", run_folder, sweep_folder, "--out", tmp_path / "x.html"), "holds no run")
    assert_refused(hncse("report", run_folder, tmp_path / "none"), "no such folder")
    assert_refused(hncse("report", run_folder, "--out", tmp_path / "x.html"), "--out")
    assert_refused(hncse("report", run_folder, run_folder, "--map", "umap"), "--map umap: is for one run")
    assert_refused(hncse("report", sweep_folder, "--map", "umap"), "--map umap: is for one run")
    assert_refused(hncse("report", run_folder, run_folder, "--out", tmp_path / "no" / "x.html"), "cannot be written")
    assert not (tmp_path / "x.html").exists()


def test_of_something_else(tmp_path: Path, run_folder: Path) -> None:
    assert_refused(hncse("report", tmp_path / "none"), "no such folder")
    assert_refused(hncse("report", run_folder / "settings.yaml"), "no such folder")
    assert_refused(hncse("report", tmp_path), "holds neither a run nor a sweep")
    (run_folder / "metrics.jsonl").write_text("{\n{\n")
    assert_refused(hncse("report", run_folder), "line 1 is not a row of a step")
    assert not (run_folder / "report.html").exists()


def test_of_a_sweep_that_cannot_be_read(sweep_folder: Path) -> None:
    (sweep_folder / "sweep.yaml").write_text(yaml.safe_dump({"options": 1}))
    assert_refused(hncse("report", sweep_folder), "sweep.yaml: cannot be read")
    assert not (sweep_folder / "report.html").exists()
