"""The state of a sweep: what is asked for, told, stopped, and resumed."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path

import pytest
import yaml
from optuna.trial import TrialState

from hncse_ray.errors import StorageError, TrainingError
from hncse_ray.tuning import SweepStudy, Values, open_study, parse_space, rank_trials
from hncse_ray.tuning.study import Stopping

SPACE = parse_space(
    yaml.safe_load(
        """
parameters:
  objective.name: {categorical: [info_nce, hybrid]}
  objective.temperature: {uniform: [0.01, 1.0]}
  objective.w_neg: {uniform: [0, 2], when: {objective.name: hybrid}}
first:
  - {objective.name: hybrid, objective.temperature: 0.5, objective.w_neg: 1.0}
"""
    ),
    "space",
)


def open_sweep(
    folder: Path, *, stopping: Stopping = "none", grace: int = 10, seed: int = 0, misfits: int = 0
) -> SweepStudy:
    left = [misfits]

    def accepts(values: Values) -> str | None:
        left[0] -= 1
        return "does not fit" if left[0] >= 0 else None

    return SweepStudy(folder, SPACE, seed=seed, stopping=stopping, grace=grace, accepts=accepts)


def score_of(values: Mapping[str, object]) -> float:
    return -abs(float(values["objective.temperature"]) - 0.3)  # type: ignore[arg-type]


def run_trials(study: SweepStudy, count: int) -> list[Values]:
    tried = []
    for _ in range(count):
        task = study.next()
        tried.append(task.values)
        study.report(task.number, 0, -9.0)
        study.report(task.number, 10, score_of(task.values))
        study.complete(task.number, {"seconds": 1.0})
    return tried


def test_first_points_come_first_then_sampled_ones_and_the_best_is_ranked_first(tmp_path: Path) -> None:
    study = open_sweep(tmp_path)
    tried = run_trials(study, 30)
    assert tried[0] == SPACE.first[0]
    assert len({str(v) for v in tried}) == 30
    ranked = rank_trials(study.finished())
    assert [t.value for t in ranked] == sorted((t.value for t in ranked), reverse=True)
    assert ranked[0].value == max(score_of(v) for v in tried)
    late = [score_of(v) for v in tried[20:]]
    early = [score_of(v) for v in tried[1:9]]
    assert sum(late) / len(late) > sum(early) / len(early)  # it learns: the later ones are nearer to the optimum


def test_values_are_tried_once_as_long_as_there_are_others(tmp_path: Path) -> None:
    space = parse_space({"parameters": {"train.batch_size": {"categorical": [8, 16, 32]}}}, "space")
    study = SweepStudy(tmp_path, space, seed=0, stopping="none", grace=10, accepts=lambda values: None)
    tried = [study.next() for _ in range(3)]
    assert sorted(task.values["train.batch_size"] for task in tried) == [8, 16, 32]
    study.fail(tried[1].number, "a node was lost", {})
    assert study.next().values == tried[1].values  # it may do better another time
    assert study.next().values in [task.values for task in tried] and study.unfinished(5) == 4


def test_trials_of_a_space_that_is_used_up_are_numbered_one_by_one(tmp_path: Path) -> None:
    space = parse_space(
        {
            "parameters": {
                "objective.name": {"categorical": ["info_nce", "hybrid"]},
                "objective.w_neg": {"uniform": [0.1, 0.3], "step": 0.1, "when": {"objective.name": "hybrid"}},
                "train.batch_size": {"int": [8, 16], "step": 8},
            }
        },
        "space",
    )
    misfit = {"objective.name": "info_nce", "train.batch_size": 8}
    study = SweepStudy(
        tmp_path, space, seed=0, stopping="none", grace=10, accepts=lambda values: "no" if values == misfit else None
    )
    tasks = [study.next() for _ in range(7)]
    assert len({str(task.values) for task in tasks}) == 7 and misfit not in [task.values for task in tasks]
    assert tasks[-1].number <= 2 * 7 + 3  # a combination that was tried costs one number, and so does a misfit
    again = [study.next().number for _ in range(5)]
    misfits = [t.number for t in study.study.get_trials() if t.user_attrs.get("misfit") == "no"]
    assert again == [n for n in range(tasks[-1].number + 1, again[-1] + 1) if n not in misfits]


def test_suggestions_depend_on_the_seed_and_the_past_not_on_interruptions(tmp_path: Path) -> None:
    folders = [tmp_path / name for name in ("whole", "cut", "other")]
    for folder in folders:
        folder.mkdir()
    whole = run_trials(open_sweep(folders[0]), 12)
    cut = [values for _ in range(4) for values in run_trials(open_sweep(folders[1]), 3)]
    assert cut == whole
    assert run_trials(open_sweep(folders[2], seed=1), 12) != whole


def test_an_interrupted_trial_comes_again_and_keeps_its_scores(tmp_path: Path) -> None:
    study = open_sweep(tmp_path)
    run_trials(study, 2)
    task = study.next()
    study.report(task.number, 10, 0.25)
    again = open_sweep(tmp_path)
    assert again.unfinished(3) == 1
    assert again.next() == task
    assert again.report(task.number, 10, 0.99) is False  # known: not changed
    again.report(task.number, 20, 0.2)
    again.complete(task.number, {})
    trial = rank_trials(again.finished())[0]
    assert (trial.number, trial.value, trial.intermediate_values) == (2, 0.25, {10: 0.25, 20: 0.2})
    assert again.next().number == 3


def test_a_trial_that_was_being_sampled_at_a_kill_is_sampled_anew(tmp_path: Path) -> None:
    study = open_sweep(tmp_path)
    study.study.ask()  # took the first point, and was killed before its values were kept
    again = open_sweep(tmp_path)
    assert again.unfinished(2) == 2
    assert again.next().values == SPACE.first[0]


def test_the_score_is_the_best_after_training_began(tmp_path: Path) -> None:
    study = open_sweep(tmp_path)
    task = study.next()
    for step, score in ((0, 0.9), (10, 0.4), (20, 0.6), (30, 0.5)):
        study.report(task.number, step, score)
    study.complete(task.number, {"seconds": 3.0})
    trial = study.finished()[0]
    assert trial.value == 0.6 and trial.user_attrs["seconds"] == 3.0


def test_a_trial_without_a_score_has_failed(tmp_path: Path) -> None:
    study = open_sweep(tmp_path)
    first, second = study.next(), study.next()
    study.report(first.number, 0, 0.5)
    study.complete(first.number, {})
    study.report(second.number, 10, math.nan)
    study.fail(second.number, "the loss is not a number", {"seconds": 2.0})
    assert [t.state for t in study.finished()] == [TrialState.FAIL, TrialState.FAIL]
    assert study.finished()[0].user_attrs["reason"] == "it was never scored"
    assert study.finished()[1].user_attrs == {
        "values": second.values,
        "seconds": 2.0,
        "reason": "the loss is not a number",
    }
    assert rank_trials(study.finished()) == []
    assert study.next().number == 2  # the sweep goes on


def test_asha_stops_what_is_not_in_the_best_third_at_a_rung(tmp_path: Path) -> None:
    study = open_sweep(tmp_path, stopping="asha", grace=10)
    stopped = {}
    for score in (0.5, 0.6, 0.4, 0.7, 0.3, 0.2):
        number = study.next().number
        assert study.report(number, 0, 0.0) is False and study.report(number, 5, -1.0) is False  # before the grace
        stopped[score] = study.report(number, 10, score)
    # The best so far goes on; a worse one than the best third stops (Li et al. 2020, algorithm 2).
    assert stopped == {0.5: False, 0.6: False, 0.4: True, 0.7: False, 0.3: True, 0.2: True}


def test_median_stopping(tmp_path: Path) -> None:
    study = open_sweep(tmp_path, stopping="median", grace=10)
    for score in (0.1, 0.2, 0.3, 0.4, 0.5):
        number = study.next().number
        assert study.report(number, 10, score) is False
        study.complete(number, {})
    low, high = study.next().number, study.next().number
    assert study.report(low, 10, 0.25) is True and study.report(high, 10, 0.35) is False


def test_a_stopped_trial_is_neither_failed_nor_ranked(tmp_path: Path) -> None:
    study = open_sweep(tmp_path)
    run_trials(study, 1)
    task = study.next()
    study.report(task.number, 10, 5.0)
    study.stop(task.number, {"seconds": 1.0})
    assert [t.state for t in study.finished()] == [TrialState.COMPLETE, TrialState.PRUNED]
    assert [t.number for t in rank_trials(study.finished())] == [0]
    study.complete(task.number, {})  # late news of it change nothing
    assert study.finished()[1].state == TrialState.PRUNED


def test_values_that_do_not_fit_together_are_not_counted_as_trials(tmp_path: Path) -> None:
    study = open_sweep(tmp_path, misfits=3)
    task = study.next()
    study.report(task.number, 10, 1.0)
    study.complete(task.number, {})
    assert task.number == 3 and len(study.finished()) == 1 and study.unfinished(4) == 3
    with pytest.raises(TrainingError, match="200 sampled combinations in a row do not fit together"):
        open_sweep(tmp_path, misfits=10_000).next()


def test_a_damaged_or_missing_study_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match=r"has no study.db"):
        open_study(tmp_path)
    (tmp_path / "study.db").write_bytes(b"this is no database" * 100)
    with pytest.raises(StorageError, match=r"study.db: cannot be opened"):
        open_study(tmp_path)


@pytest.mark.parametrize("name", ["a?b", "a%20b", "a%2Fb", "a#b", "{SCHEMA_VERSION}", "file:x", "ä b"])
def test_a_study_lies_in_its_folder_whatever_that_is_called(tmp_path: Path, name: str) -> None:
    folder = tmp_path / name
    folder.mkdir()
    run_trials(open_sweep(folder), 1)
    assert [path.name for path in folder.iterdir()] == ["study.db"]
    assert [path.name for path in tmp_path.iterdir()] == [name]
    assert len(open_study(folder).trials) == 1
