"""The scripts in jobs/, and `hncse submit` up to where a cluster is needed."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from hncse_ray.cli import app

ROOT = Path(__file__).parents[2]
JOBS = sorted((ROOT / "jobs").glob("*.py"))


KEPT = ["run.storage_path=/mnt/runs"]


def commands() -> set[str]:
    return {c.name or getattr(c.callback, "__name__", "") for c in app.registered_commands}


def test_every_job_is_a_command_of_its_name() -> None:
    assert {job.stem for job in JOBS} == {"evaluate", "mine", "prepare", "train", "tune"} <= commands()


def test_a_job_takes_the_commands_arguments_and_passes_its_exit_status_through() -> None:
    job = subprocess.run(
        [sys.executable, "jobs/train.py", "quickstart", "train.batch_sise=8"], cwd=ROOT, capture_output=True, text=True
    )
    assert job.returncode == 2 and not job.stdout
    assert "did you mean 'train.batch_size'" in job.stderr and "Traceback" not in job.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["trian", "quickstart"], "trian: is not a command that can be submitted. Choose from"),
        (["submit", "train"], "submit: is not a command that can be submitted"),
        (
            ["train", "quickstart", "--no-wait"],
            "--no-wait: is an option of submit, not of train. Write it before 'train'",
        ),
        (["train", "quickstart", "--address=http://x"], "is an option of submit, not of train"),
        (["--env", "HF_TOKEN", "train", "quickstart", *KEPT], "--env HF_TOKEN: looks like a secret"),
        (["train", "quickstart", *KEPT], "no cluster is named. Give --address"),
        (["train", "/only/there.yaml", "train.max_setps=3"], "no cluster is named"),  # not for us to say
        (["train", "theirs.yaml", *KEPT], "no cluster is named"),
        (["train", "theirs.yaml", *KEPT, "train.max_setps=3"], "did you mean 'train.max_steps'?"),
        (["train", "quickstart"], "run.storage_path=runs: lies in the folder of a submitted job"),
        (["train", "quickstrat", *KEPT], "quickstrat: no such recipe. Did you mean 'quickstart'?"),
        (["train", "recipes/quickstart.yaml", *KEPT], "no such recipe"),  # here, but not in the folder
        (["prepare", "quickstart", "corpus.max_chars=few"], "corpus.max_chars = 'few'"),
        (["train", "documents.yaml", *KEPT], "no cluster is named"),  # of documents, if the path is a folder there
        (["tune", "quickstart", "--space", "hybird", "--out", "/s"], "no such search space. Did you mean 'hybrid'?"),
        (["tune", "quickstart", "--space", "hybrid", "--out", "/mnt/s", "--trials", "0"], "--trials: 0 is too few"),
        (["tune", "quickstart", "--space", "hybrid", "--out", "s"], "--out s: lies in the folder of a submitted job"),
        (["tune", "--resume", "/mnt/s"], "no cluster is named"),
    ],
)
def test_what_cannot_be_submitted_is_one_message(
    arguments: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("RAY_ADDRESS", "RAY_API_SERVER_ADDRESS", "HF_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")  # the command would set it for this process
    monkeypatch.chdir(ROOT)
    shutil.copyfile("recipes/simcse_bert_base.yaml", tmp_path / "theirs.yaml")
    documents = "corpus: {path: /only/there}\nevaluation: {metric: pseudo-relevance/mrr@10}\n"
    (tmp_path / "documents.yaml").write_text(documents)
    result = CliRunner().invoke(app, ["submit", "--working-dir", str(tmp_path), *arguments])
    assert result.exit_code == 2 and not result.stdout
    assert message in result.stderr and len(result.stderr.strip().splitlines()) == 1


@pytest.mark.parametrize(
    ("arguments", "missed"),
    [
        (["train", "runs/best.yaml", "run.storage_path=/x"], "runs/best.yaml"),
        (["train", "kept.yaml", "run.storage_path=/x", "encoder.model=runs/model"], "runs/model"),
        (["train", "kept.yaml", "run.storage_path=/x", "corpus.path=runs/texts.txt"], "runs/texts.txt"),
        (["tune", "kept.yaml", "--space", "runs/space.yaml", "--out", "/x"], "runs/space.yaml"),
        (["evaluate", "other,runs/model"], "runs/model"),
        (["search", "other", "runs/texts.txt"], "runs/texts.txt"),
    ],
)
def test_what_a_command_reads_and_is_not_uploaded_is_said(
    arguments: list[str], missed: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.delenv("RAY_API_SERVER_ADDRESS", raising=False)
    (tmp_path / "runs" / "model").mkdir(parents=True)
    recipe = "corpus: {path: kept.txt}\nevaluation: {suites: [python-docs], metric: python-docs/mrr}\n"
    for name in ("kept.yaml", "runs/best.yaml"):
        (tmp_path / name).write_text(recipe)
    (tmp_path / "runs" / "space.yaml").write_text("parameters: {objective.temperature: {uniform: [0.1, 0.2]}}\n")
    for name in ("kept.txt", "runs/texts.txt", "runs/model/config.json"):
        (tmp_path / name).write_text("A text.\n")
    result = CliRunner().invoke(app, ["submit", "--working-dir", str(tmp_path), *arguments])
    assert result.exit_code == 2 and len(result.stderr.strip().splitlines()) == 1
    assert f"error: {missed}: is not uploaded" in result.stderr


def test_a_version_of_its_own_that_the_job_gets_may_know_other_settings(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("RAY_ADDRESS", "RAY_API_SERVER_ADDRESS"):
        monkeypatch.delenv(name, raising=False)
    (tmp_path / "hncse_ray").mkdir()
    result = CliRunner().invoke(app, ["submit", "--working-dir", str(tmp_path), "train", "newer", "train.newer=1"])
    assert result.exit_code == 2 and "no cluster is named" in result.stderr


def test_options_that_the_command_does_not_know_are_not_submitted() -> None:
    for arguments, said in (["--fast"], "No such option: --fast"), ([], "Missing argument 'recipe'"):
        result = CliRunner().invoke(app, ["submit", "train", *arguments])
        assert result.exit_code == 2 and said in result.stderr and "Usage: hncse train" in result.stderr
