"""The folder of a sweep: which sweep it is, and what it leaves."""

from __future__ import annotations

import csv
from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from hncse_ray.config import load_settings
from hncse_ray.errors import SettingsError, StorageError
from hncse_ray.tuning import (
    SeedScores,
    Sweep,
    SweepOptions,
    SweepStudy,
    best_settings,
    claim_sweep_folder,
    load_sweep,
    parse_space,
    rank_trials,
    read_sweep,
    write_best,
    write_trials_csv,
)

TREE = yaml.safe_load(
    """
parameters:
  objective.name: {categorical: [info_nce, hybrid]}
  objective.temperature: {uniform: [0.01, 1.0]}
  objective.w_neg: {uniform: [0, 2], when: {objective.name: hybrid}}
first:
  - {objective.name: hybrid, objective.temperature: 0.5, objective.w_neg: 1.0}
  - {objective.name: info_nce, objective.temperature: 0.25}
"""
)


def make_sweep(*overrides: str, **options: int) -> Sweep:
    return Sweep(load_settings("quickstart", overrides), parse_space(TREE, "space"), SweepOptions(**options))


def test_a_sweep_is_read_back_as_it_was(tmp_path: Path) -> None:
    sweep = make_sweep("train.max_steps=7", trials=3, seeds=2)
    with claim_sweep_folder(tmp_path / "s", sweep):
        assert read_sweep(tmp_path / "s") == sweep


def test_a_sweep_over_words_that_yaml_takes_for_others_is_read_back_as_it_was(tmp_path: Path) -> None:
    tree = {"parameters": {"corpus.subset": {"categorical": ["none", "1.10", "007", "on", None]}}}
    sweep = Sweep(load_settings("quickstart", ["run.name=1.10"]), parse_space(tree, ""), SweepOptions())
    with claim_sweep_folder(tmp_path / "s", sweep):
        assert read_sweep(tmp_path / "s") == sweep
    study = SweepStudy(tmp_path, sweep.space, seed=0, stopping="none", grace=5, accepts=lambda values: None)
    for _ in range(12):
        task = study.next()
        study.report(task.number, 5, 0.5)
        study.complete(task.number, {})
    for trial in study.finished():
        settings = load_settings(write_best(tmp_path, sweep, trial))
        assert settings.corpus.subset == trial.user_attrs["values"]["corpus.subset"]
        assert settings.run.name == "1.10-best"


def test_more_trials_and_another_share_of_the_cluster_are_the_same_sweep(tmp_path: Path) -> None:
    sweep = make_sweep(trials=3)
    with claim_sweep_folder(tmp_path, sweep):
        pass
    more = make_sweep("cluster.num_workers=2", trials=9, seeds=1, max_concurrent=2)
    with claim_sweep_folder(tmp_path, more):
        assert read_sweep(tmp_path).options.trials == 9


@pytest.mark.parametrize(
    ("other", "said"),
    [
        (make_sweep("train.max_steps=7"), "train.max_steps was 40, now 7"),
        (make_sweep(grace_steps=5), "now by asha after 5"),
        (replace(make_sweep(), options=SweepOptions(stopping="none")), "now by none"),
        (
            replace(make_sweep(), space=parse_space({"parameters": {"train.batch_size": {"int": [8, 64]}}}, "")),
            "space differs",
        ),
    ],
)
def test_the_folder_of_another_sweep_is_refused_and_left_alone(tmp_path: Path, other: Sweep, said: str) -> None:
    with claim_sweep_folder(tmp_path, make_sweep()):
        pass
    text = (tmp_path / "sweep.yaml").read_text()
    with pytest.raises(StorageError, match="holds another sweep") as caught, claim_sweep_folder(tmp_path, other):
        raise AssertionError("claimed")
    assert said in str(caught.value)
    assert (tmp_path / "sweep.yaml").read_text() == text


def test_a_folder_in_use_or_with_something_else_is_refused(tmp_path: Path) -> None:
    sweep = make_sweep()
    with claim_sweep_folder(tmp_path / "s", sweep):
        with pytest.raises(StorageError, match="in use"), claim_sweep_folder(tmp_path / "s", sweep):
            raise AssertionError("claimed twice")
    (tmp_path / "letters").mkdir()
    (tmp_path / "letters" / "a.txt").write_text("dear")
    with pytest.raises(StorageError, match="holds no sweep"), claim_sweep_folder(tmp_path / "letters", sweep):
        raise AssertionError("claimed")
    assert [p.name for p in (tmp_path / "letters").iterdir()] == ["a.txt"]


def test_a_sweep_that_came_to_nothing_leaves_nothing_and_one_that_began_stays(tmp_path: Path) -> None:
    for made in (False, True):
        with pytest.raises(KeyboardInterrupt), claim_sweep_folder(tmp_path / "new" / "s", make_sweep()):
            if made:
                (tmp_path / "new" / "s" / "study.db").touch()
            raise KeyboardInterrupt
        assert (tmp_path / "new").exists() == made
    with pytest.raises(KeyboardInterrupt), claim_sweep_folder(tmp_path / "new" / "s", make_sweep()):
        (tmp_path / "new" / "s" / "study.db").unlink()  # of a sweep that was there before nothing is removed
        raise KeyboardInterrupt
    assert (tmp_path / "new" / "s" / "sweep.yaml").exists()


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("", "it has no options and no space and no settings"),
        ("options: 3", "it has no options and no space"),
        ("options: {trials: 3}", "it has no space and no settings"),
        ("a: [", "while parsing .* line 1"),
        ("options: {}\nspace: {}\nsettings: {}", "settings: setting 'corpus' is missing"),
        ("options: {trials: 0}\nspace: {}\nsettings: {}", "--trials: 0 is too few"),
        ("options: {trials: x}\nspace: {}\nsettings: {}", "options.trials: input should be a valid integer"),
    ],
)
def test_a_damaged_sweep_file_is_an_error(tmp_path: Path, text: str, told: str) -> None:
    (tmp_path / "sweep.yaml").write_text(text)
    with pytest.raises(StorageError, match=rf"sweep.yaml: cannot be read \({told}.*\)\. `hncse tune` wrote it"):
        read_sweep(tmp_path)
    with pytest.raises(StorageError, match="has no sweep.yaml"):
        read_sweep(tmp_path / "nowhere")


@pytest.mark.parametrize("option", ["trials", "grace_steps", "max_concurrent", "top"])
def test_zero_of_anything_is_refused(option: str) -> None:
    with pytest.raises(SettingsError, match="too few"):
        SweepOptions(**{option: 0})
    for value in ("3", 2.5, True, *([None] if option in ("trials", "top") else [])):
        with pytest.raises(SettingsError, match=f"{value!r} is no whole number"):
            SweepOptions(**{option: value})  # type: ignore[arg-type]


def test_an_option_that_there_is_not_is_refused() -> None:
    with pytest.raises(SettingsError, match="^trial: is no option of a sweep. Choose from trials, stopping, "):
        load_sweep("quickstart", "info_nce", trial=8)


def test_what_a_sweep_leaves(tmp_path: Path) -> None:
    sweep = make_sweep("train.max_steps=7")
    study = SweepStudy(tmp_path, sweep.space, seed=0, stopping="none", grace=5, accepts=lambda values: None)
    for score in (0.5, 0.75):
        task = study.next()
        study.report(task.number, 5, score)
        study.complete(task.number, {"seconds": 2.5, "best_step": 5})
    failed = study.next()
    study.fail(failed.number, "the loss is not a number", {"seconds": 1.0})
    trials = study.finished()

    rows = list(csv.DictReader(write_trials_csv(tmp_path, trials).open()))
    assert [row["state"] for row in rows] == ["finished", "finished", "failed"]
    assert [row["score"] for row in rows] == ["0.5", "0.75", ""]
    assert rows[0]["objective.w_neg"] == "1.0" and rows[1]["objective.w_neg"] == ""
    assert rows[2]["reason"] == "the loss is not a number"

    best = rank_trials(trials)[0]
    path = write_best(tmp_path, sweep, best)
    settings = load_settings(path)
    assert settings == best_settings(sweep, best)
    assert settings.objective.model_dump() == {"name": "info_nce", "dimensions": None, "temperature": 0.25}
    assert settings.train.max_steps == 7 and settings.evaluation.test and settings.run.name == "quickstart-best"
    assert "trial 1" in path.read_text().splitlines()[0]


def test_seeds_are_summed_up() -> None:
    scores = SeedScores(3, {1: 0.5, 2: 0.7})
    assert scores.mean == pytest.approx(0.6) and scores.spread == pytest.approx(0.1414, abs=1e-4)
    assert SeedScores(3, {1: 0.5}).spread == 0.0
