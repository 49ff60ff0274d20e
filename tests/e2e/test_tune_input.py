"""What a user can get wrong about a sweep: all of it is refused before anything starts, and nothing is left."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from invoke import assert_refused, hncse

from hncse_ray import tune
from hncse_ray.errors import SettingsError

SPACE = {
    "parameters": {
        "objective.name": {"categorical": ["info_nce", "hybrid"]},
        "objective.temperature": {"loguniform": [0.01, 1.0]},
        "objective.k": {"int": [2, 4], "when": {"objective.name": "hybrid"}},
    },
    "first": [{"objective.name": "info_nce", "objective.temperature": 0.05}],
}


@pytest.fixture
def recipe(small_run: dict[str, Any], tmp_path: Path) -> Path:
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(small_run))
    return path


@pytest.fixture
def space(tmp_path: Path) -> Path:
    path = tmp_path / "space.yaml"
    path.write_text(yaml.safe_dump(SPACE))
    return path


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--trials", "0"], "--trials: 0 is too few"),
        (["--metric", "pairs/f1"], "metric 'pairs/f1' is not measured"),
        (["--max-concurrent", "500"], "500 trials x (1 worker x 1 CPU) = 500 CPUs, but the cluster has"),
        (["cluster.num_workers=400", "train.batch_size=400"], "1 trial x (400 workers x 1 CPU) = 400 CPUs"),
        (["cluster.use_gpu=true", "cluster.num_workers=99", "train.batch_size=99"], "but the cluster has"),
        (["--stopping", "hyperband"], "choose from asha, median, none"),
        (["--seeds", "-1"], "--seeds: -1 is too few"),
        (["objective.temperature=-1"], "objective.temperature = -1"),
        (["encoder.max_length=999"], "tokens at most"),
    ],
)
def test_options_that_cannot_be(recipe: Path, space: Path, tmp_path: Path, arguments: list[str], said: str) -> None:
    out = tmp_path / "out"
    assert_refused(hncse("tune", recipe, *arguments, "--space", space, "--out", out), said)
    assert not out.exists()


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"objective.temprature": {"uniform": [0.1, 1]}}, "did you mean 'objective.temperature'?"),
        ({"train.learning_rate": {"uniform": [1, 1]}}, "its range [1, 1] is empty"),
        ({"train.learning_rate": {"loguniform": [0, 1]}}, "no logarithm"),
        ({"objective.w_neg": {"uniform": [0, 1], "when": {"objective.name": "hibrid"}}}, "no choice of it"),
        ({"train.batch_size": {"int": [1, 16]}}, "train.batch_size = 1"),
    ],
)
def test_spaces_that_cannot_be(recipe: Path, tmp_path: Path, change: dict[str, Any], said: str) -> None:
    path = tmp_path / "space.yaml"
    path.write_text(yaml.safe_dump(SPACE | {"parameters": SPACE["parameters"] | change}))  # type: ignore[operator]
    assert_refused(hncse("tune", recipe, "--space", path, "--out", tmp_path / "out"), said)
    assert not (tmp_path / "out").exists()


def test_points_outside_the_space(recipe: Path, tmp_path: Path) -> None:
    path = tmp_path / "space.yaml"
    path.write_text(yaml.safe_dump(SPACE | {"first": [{"objective.temperature": 2.0}]}))
    assert_refused(hncse("tune", recipe, "--space", path), "first[0]", "objective.temperature = 2.0 lies outside")


def test_files_that_are_not_there(recipe: Path, tmp_path: Path) -> None:
    assert_refused(hncse("tune", recipe, "--space", "hncse_ful"), "no such search space", "'hncse_full'")
    assert_refused(hncse("tune", "quickstar", "--space", "hybrid"), "no such recipe", "'quickstart'")
    assert_refused(hncse("tune", recipe), "name a recipe and a search space")
    assert_refused(hncse("tune", "--resume", tmp_path / "nowhere"), "has no sweep.yaml")
    assert_refused(hncse("tune", recipe, "--resume", tmp_path), "and a recipe cannot be given together")


def test_the_folder_of_something_else(recipe: Path, space: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "letter.txt").write_text("dear")
    assert_refused(hncse("tune", recipe, "--space", space, "--out", tmp_path / "out"), "holds no sweep")
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["letter.txt"]
    for out in ("s3://bucket/sweep", ""):
        assert_refused(hncse("tune", recipe, "--space", space, "--out", out), f"{out!r}: is no folder")
    beneath = tmp_path / "out" / "letter.txt" / "sweep"
    assert_refused(
        hncse("tune", recipe, "--space", space, "--out", beneath), "cannot be written", "Choose another --out"
    )
    assert not (tmp_path / "cache").exists()  # no corpus was prepared before that was said
    with pytest.raises(SettingsError, match="is no Sweep, but of type str"):
        tune("quickstart", tmp_path / "sweep")  # type: ignore[arg-type]
