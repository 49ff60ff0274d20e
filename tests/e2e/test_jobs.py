"""The scripts in jobs/, and `hncse submit` up to where a cluster is needed."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from hncse_ray.cli import app

ROOT = Path(__file__).parents[2]
JOBS = sorted((ROOT / "jobs").glob("*.py"))


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
        (["--env", "HF_TOKEN", "train", "quickstart"], "--env HF_TOKEN: looks like a secret"),
        (["train", "quickstart"], "no cluster is named. Give --address"),
    ],
)
def test_what_cannot_be_submitted_is_one_message(
    arguments: list[str], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("RAY_ADDRESS", "RAY_API_SERVER_ADDRESS", "HF_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")  # the command would set it for this process
    result = CliRunner().invoke(app, ["submit", *arguments])
    assert result.exit_code == 2 and not result.stdout
    assert message in result.stderr and len(result.stderr.strip().splitlines()) == 1
