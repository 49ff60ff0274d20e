"""An objective of the user's on a real Ray: workers and trials find its file, and a killed run goes on with it."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from commands import Command
from waits import soon

from hncse_ray.config import load_settings

pytestmark = pytest.mark.timeout(900)
MY_LOSSES = """
import torch
from hncse_ray.objectives import info_nce


def loss(z1, z2, negatives=None, *, step, temperature=0.05, noise=0.0, negatives_mask=None):
    moved = torch.nn.functional.normalize(z2 + noise * torch.rand_like(z2), dim=1)
    found, metrics = info_nce(z1, moved, negatives, temperature=temperature, negatives_mask=negatives_mask)
    return found, metrics | {"my_step": step}
"""


@pytest.fixture
def recipe(small_run: dict[str, Any], tmp_path: Path) -> Path:
    """A recipe, and beside it the file with the objective that it names."""
    own = {"name": "my_losses:loss", "settings": {"noise": 0.2}, "dimensions": [16]}
    small_run["train"] |= {"max_steps": 60, "checkpoint_every_steps": 10, "evaluate_every_steps": 20}
    (tmp_path / "my_losses.py").write_text(MY_LOSSES)
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(small_run | {"objective": own}))
    return tmp_path / "recipe.yaml"


def lines_of(run: Path) -> list[dict[str, Any]]:
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in row.items() if key not in ("sentences_per_s", "data/waited")} for row in rows]


@pytest.mark.slow
def test_its_file_is_found_beside_where_the_command_is_started_by_all_workers(recipe: Path, tmp_path: Path) -> None:
    pool = ["cluster.num_workers=2", "negatives.source=pool", "negatives.max_score=null", "train.max_steps=12"]
    command = Command("train", "recipe.yaml", *pool, cwd=tmp_path)
    assert command.finish()["steps"] == 12
    run = tmp_path / "runs" / "small"
    steps = [row for row in lines_of(run) if "loss" in row]
    assert [row["my_step"] for row in steps] == list(range(12))
    assert all(row["loss"] == pytest.approx((row["loss_at_32"] + row["loss_at_16"]) / 2) for row in steps)
    assert load_settings(run / "model" / "settings.yaml").objective == load_settings(recipe).objective
    assert "my_losses:loss" in (run / "model" / "README.md").read_text()
    assert command.is_gone(), command.processes()


@pytest.mark.slow
def test_a_killed_run_goes_on_with_the_same_losses(recipe: Path, tmp_path: Path) -> None:
    whole = Command("train", "recipe.yaml", "run.name=whole", cwd=tmp_path)
    whole.finish()
    assert whole.is_gone(), whole.processes()
    run = tmp_path / "runs" / "small"
    killed = Command("train", "recipe.yaml", cwd=tmp_path)
    soon((run / "checkpoints" / "step_000000010").exists, within_s=240, what="a checkpoint")
    killed.process.kill()
    assert killed.is_gone(), killed.processes()
    assert not (run / "model").exists()
    again = Command("train", "recipe.yaml", cwd=tmp_path)
    again.finish()
    assert (run / "log.txt").read_text().count("resumes at step") == 1
    assert lines_of(run) == lines_of(run.parent / "whole")
    weights = [(place / "model" / "model.safetensors").read_bytes() for place in (run, run.parent / "whole")]
    assert weights[0] == weights[1]
    assert again.is_gone(), again.processes()


@pytest.mark.slow
def test_its_settings_can_be_searched(recipe: Path, tmp_path: Path) -> None:
    space = {
        "parameters": {
            "objective.name": {"categorical": ["info_nce", "my_losses:loss"]},
            "objective.settings.noise": {"uniform": [0.0, 1.0], "when": {"objective.name": "my_losses:loss"}},
        },
        "first": [
            {"objective.name": "my_losses:loss", "objective.settings.noise": 0.25},
            {"objective.name": "info_nce"},
        ],
    }
    (tmp_path / "space.yaml").write_text(yaml.safe_dump(space))
    short = ["train.max_steps=8", "train.evaluate_every_steps=4", "--stopping", "none", "--trials", "2"]
    command = Command(
        "tune", "recipe.yaml", *short, "--space", "space.yaml", "--out", str(tmp_path / "out"), cwd=tmp_path
    )
    assert command.finish(within_s=600)["trials"] == {"finished": 2}
    rows = list(csv.DictReader((tmp_path / "out" / "trials.csv").open()))
    assert [(row["objective.name"], row["objective.settings.noise"]) for row in rows] == [
        ("my_losses:loss", "0.25"), ("info_nce", ""),
    ]  # fmt: skip
    assert command.is_gone(), command.processes()
