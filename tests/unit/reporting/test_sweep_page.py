"""The page of a sweep, from real studies."""

from __future__ import annotations

import html
import math
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import optuna
import pytest
from optuna.trial import TrialState
from page_text import figures, loads, table
from PIL import Image

from hncse_ray.errors import StorageError
from hncse_ray.reporting.sweep_page import SeedRow, write_sweep_page

METRIC = "pairs/recall@1"
Suggest = Callable[[optuna.Trial], dict[str, Any]]


@pytest.fixture(autouse=True)
def quiet() -> None:
    optuna.logging.set_verbosity(optuna.logging.ERROR)


def new_study() -> optuna.Study:
    return optuna.create_study(direction="maximize", sampler=optuna.samplers.RandomSampler(seed=1))


def plain(trial: optuna.Trial) -> dict[str, Any]:
    return {"objective.temperature": trial.suggest_float("objective.temperature", 0.01, 0.2, log=True)}


def conditional(trial: optuna.Trial) -> dict[str, Any]:
    values = {"objective.name": trial.suggest_categorical("objective.name", ["info_nce", "hybrid"]), **plain(trial)}
    if values["objective.name"] == "hybrid":
        values["objective.n_mixes"] = trial.suggest_int("objective.n_mixes", 8, 64, step=8)
    return values


def add(
    study: optuna.Study,
    scores: Sequence[float],
    *,
    state: TrialState = TrialState.COMPLETE,
    suggest: Suggest = plain,
    **facts: Any,
) -> optuna.Trial:
    """Add a trial scored at steps 10, 20, ..."""
    trial = study.ask()
    for name, fact in ({"values": suggest(trial)} | facts).items():
        trial.set_user_attr(name, fact)
    for i, score in enumerate(scores, start=1):
        trial.report(score, 10 * i)
    if state is TrialState.COMPLETE:
        study.tell(trial, max(score for score in scores if not math.isnan(score)))
    elif state is not TrialState.RUNNING:
        study.tell(trial, state=state)
    return trial


def written(study: optuna.Study, folder: Path, **changes: Any) -> str:
    facts: dict[str, Any] = {"title": "Sweep", "total_steps": 40, "metric": METRIC, "command": "hncse train best.yaml"}
    page = write_sweep_page(study, folder, **facts | changes)
    assert page == folder / "report.html"
    return page.read_text(encoding="utf-8")


def images(folder: Path) -> set[str]:
    """Return the names of the images; each has been found to be one, and not empty."""
    for path in (folder / "plots").iterdir():
        with Image.open(path) as image:
            assert image.format == "PNG" and image.width > 400 and image.height > 300
            assert len(image.convert("L").getcolors() or ()) > 2, f"{path.name} is blank"
    return {path.name for path in (folder / "plots").iterdir()}


@pytest.fixture(scope="module")
def study() -> optuna.Study:
    """Twelve trials that ran to their end, two stopped, one failed, and one that was never run."""
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    study = new_study()
    for i in range(12):
        final = 0.5 + 0.01 * ((7 * i) % 12)
        add(study, [0.4, 0.45, final - 0.02, final], suggest=conditional, seconds=60.0 + i, best_step=40)
    add(study, [0.3], state=TrialState.PRUNED, suggest=conditional, seconds=10.0)
    add(study, [0.3, 0.35, 0.36], state=TrialState.PRUNED, suggest=conditional, seconds=30.0)
    add(study, [0.4, math.nan], state=TrialState.FAIL, suggest=conditional, seconds=20.0, reason="not a number")
    add(study, [], state=TrialState.FAIL, suggest=conditional, misfit="they do not fit together")
    return study


@pytest.fixture(scope="module")
def folder(study: optuna.Study, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sweep")
    written(study, folder)
    return folder


@pytest.fixture(scope="module")
def page(folder: Path) -> str:
    return (folder / "report.html").read_text(encoding="utf-8")


class TestFullSweep:
    def test_it_needs_no_network(self, page: str) -> None:
        assert loads(page) == []
        assert len(page) < 1_000_000

    def test_the_headline_is_the_best_trial(self, page: str, study: optuna.Study) -> None:
        best = study.best_trial
        assert f'id="best-score">{best.value:.4f}<' in page
        assert f"trial {best.number}, at step 40 of 40" in page
        shown = dict(table(page, 'class="settings"'))
        assert shown.keys() == best.params.keys()
        assert shown["objective.temperature"] == f"{best.params['objective.temperature']:.4g}"
        assert '<pre id="command">hncse train best.yaml</pre>' in page

    def test_the_best_ten_are_the_studys(self, page: str, study: optuna.Study) -> None:
        head, *rows = table(page, 'id="ranking"')
        assert head[:5] == ["rank", "trial", "score", "steps", "time"]
        done = [trial for trial in study.trials if trial.state is TrialState.COMPLETE]
        expected = sorted(done, key=lambda trial: -(trial.value or 0))[:10]
        assert len(rows) == 10
        for i, (row, trial) in enumerate(zip(rows, expected, strict=True), start=1):
            seconds = trial.user_attrs["seconds"]
            assert row[:5] == [str(i), str(trial.number), f"{trial.value:.4f}", "40", f"1 min {seconds - 60:02.0f} s"]
            shown = dict(zip(head[5:], row[5:], strict=True))
            assert shown["objective.name"] == trial.params["objective.name"]
            mixes = trial.params.get("objective.n_mixes")
            assert shown["objective.n_mixes"] == ("–" if mixes is None else str(mixes))

    def test_what_stopping_early_saved(self, page: str) -> None:
        # 12 finished and 2 stopped of 40 steps each; the stopped ones took 10 and 30.
        text = re.sub(r"\s+", " ", html.unescape(re.sub(r"<[^>]+>", "", page[page.index('<ul class="facts">') :])))
        assert "15 trials: 12 finished, 2 stopped early, 1 failed" in text
        assert "stopping early saved 40 steps, 7% of what" in text
        assert "14 min 06 s of trials in all" in text  # 12 * 60 + 66 + 10 + 30 + 20

    def test_failed_trials_have_their_reasons(self, page: str) -> None:
        head, *rows = table(page, 'id="failed"')
        assert [row[:3] for row in rows] == [["14", "not a number", "20"]]

    def test_learning_curves_are_those_of_the_trials(self, page: str, study: optuna.Study) -> None:
        traces, _ = figures(page)["learning-curves"]
        assert len(traces) == 15
        best = traces[-1]
        assert best["name"] == f"best (trial {study.best_trial.number})"
        assert (best["x"], best["y"]) == ([10, 20, 30, 40], list(study.best_trial.intermediate_values.values()))
        assert sorted(trace["line"]["dash"] for trace in traces) == ["dash"] * 2 + ["dot"] + ["solid"] * 12
        (failed,) = [trace for trace in traces if trace["name"] == "failed"]
        assert (failed["x"], failed["y"], failed["marker"]["symbol"]) == ([10], [0.4], ["x"])

    def test_there_is_a_slice_for_each_setting(self, page: str, study: optuna.Study) -> None:
        drawn = figures(page)
        assert {name for name in drawn if name.startswith("slice")} == {"slice-0", "slice-1", "slice-2"}
        (trace,), _ = drawn["slice-0"]  # objective.n_mixes: only of trials that have it
        with_it = [t for t in study.trials if t.state is TrialState.COMPLETE and "objective.n_mixes" in t.params]
        names = sorted({name for t in study.trials for name in t.params})
        (trace,), _ = drawn[f"slice-{names.index('objective.n_mixes')}"]
        assert sorted(trace["y"]) == sorted(t.value for t in with_it)

    def test_parallel_coordinates_have_a_line_a_trial_and_the_best_on_top(self, page: str) -> None:
        traces, layout = figures(page)["parallel-coordinate"]
        assert len(traces) == 12
        assert traces[-1]["y"][0] == 1.0 and traces[0]["y"][0] == 0.0
        assert len(layout["xaxis"]["ticktext"]) == 4

    def test_importances_are_optunas(self, page: str, study: optuna.Study) -> None:
        (bars,), _ = figures(page)["importances"]
        expected = optuna.importance.get_param_importances(study)
        assert dict(zip(bars["y"], bars["x"], strict=True)) == pytest.approx(expected)

    def test_the_images_are_there(self, folder: Path) -> None:
        names = ("history", "importances", "parallel_coordinate", "slice", "learning_curves")
        assert images(folder) == {f"{name}.png" for name in names}

    def test_writing_again_replaces_all_and_leaves_nothing_else(self, study: optuna.Study, tmp_path: Path) -> None:
        (tmp_path / "plots").mkdir()
        (tmp_path / "plots" / "old.png").write_bytes(b"x")
        written(study, tmp_path)
        assert {path.name for path in tmp_path.iterdir()} == {"report.html", "plots"}
        assert "old.png" not in images(tmp_path)


def test_with_seeds_the_choice_is_the_best_mean(tmp_path: Path) -> None:
    study = new_study()
    add(study, [0.5])
    add(study, [0.625])
    rows = [
        SeedRow(0, {1: 0.5, 2: 0.75}, 0.625, 0.1768, {"objective.temperature": 0.05}),
        SeedRow(1, {1: 0.5, 2: 0.5}, 0.5, 0.0, {"objective.temperature": 0.1}),
    ]
    page = written(study, tmp_path, seeds=rows)
    head, *shown = table(page, 'id="seeds"')
    assert head == ["rank", "trial", "mean ± sd", "by seed", "objective.temperature"]
    assert shown == [
        ["1", "0", "0.6250 ± 0.1768", "0.5000 0.7500", "0.05"],
        ["2", "1", "0.5000 ± 0.0000", "0.5000 0.5000", "0.1"],
    ]
    assert 'id="best-score">0.6250<' in page and "trial 0, mean of 2 further seeds" in page
    assert figures(page)["learning-curves"][0][-1]["name"] == "best (trial 0)"


class TestDegenerateStudies:
    def test_no_trial_at_all(self, tmp_path: Path) -> None:
        page = written(new_study(), tmp_path)
        assert "No trial has finished with a score." in page and "No trial has reported a score yet." in page
        assert figures(page) == {} and images(tmp_path) == set()
        assert "hncse train best.yaml" not in page, "there is no best to train"

    def test_none_finished(self, tmp_path: Path) -> None:
        study = new_study()
        add(study, [0.3], state=TrialState.PRUNED)
        add(study, [0.3], state=TrialState.RUNNING)
        add(study, [math.nan], state=TrialState.FAIL)
        page = written(study, tmp_path)
        assert figures(page).keys() == {"learning-curves"} and images(tmp_path) == {"learning_curves.png"}
        assert "no reason was recorded" in page

    def test_one_trial(self, tmp_path: Path) -> None:
        study = new_study()
        add(study, [0.5, 0.25])
        page = written(study, tmp_path)
        assert 'id="no-importances"' in page and "importances" not in figures(page)
        assert images(tmp_path) == {f"{n}.png" for n in ("history", "parallel_coordinate", "slice", "learning_curves")}
        assert len(table(page, 'id="ranking"')) == 2

    def test_of_few_trials_no_importance_is_claimed(self, tmp_path: Path) -> None:
        study = new_study()
        for score in (0.5, 0.6, 0.7, 0.8):
            add(study, [score])
        assert "importances" not in figures(written(study, tmp_path))
        add(study, [0.9])
        assert "importances" in figures(written(study, tmp_path))

    def test_all_scores_the_same(self, tmp_path: Path) -> None:
        study = new_study()
        for _ in range(3):
            add(study, [0.5])
        page = written(study, tmp_path)
        assert "5 trials have finished with different scores" in page
        assert [row[1] for row in table(page, 'id="ranking"')[1:]] == ["0", "1", "2"]

    def test_nothing_varied(self, tmp_path: Path) -> None:
        study = new_study()
        for score in (0.5, 0.6):
            add(study, [score], suggest=lambda trial: {})
        page = written(study, tmp_path)
        assert "No setting was varied." in page and "The recipe as it is." in page
        assert images(tmp_path) == {"history.png", "learning_curves.png"}

    def test_scores_that_are_no_numbers_are_gaps(self, tmp_path: Path) -> None:
        study = new_study()
        add(study, [math.nan, 0.5, 0.25])
        add(study, [math.nan, math.nan], state=TrialState.RUNNING)
        traces, _ = figures(written(study, tmp_path))["learning-curves"]
        assert [(trace["x"], trace["y"]) for trace in traces] == [([20, 30], [0.5, 0.25])]

    def test_two_hundred_trials(self, tmp_path: Path) -> None:
        study = new_study()
        for i in range(200):
            state = TrialState.PRUNED if i % 3 else TrialState.COMPLETE
            add(study, [0.3, 0.3 + i / 1000], state=state, suggest=conditional)
        page = written(study, tmp_path)
        assert len(figures(page)["learning-curves"][0]) == 200
        assert len(images(tmp_path)) == 5

    def test_choices_of_every_kind(self, tmp_path: Path) -> None:
        choices: list[Any] = [True, None, 3, "a$b$c", "cos\\x $"]
        study = new_study()
        for i in range(12):
            add(study, [0.5 + i], suggest=lambda t: {"train.choice": t.suggest_categorical("train.choice", choices)})
        page = written(study, tmp_path)
        assert "slice.png" in images(tmp_path)
        shown = {row[5] for row in table(page, 'id="ranking"')[1:]}
        assert shown <= {"true", "null", "3", "a$b$c", "cos\\x $"} and len(shown) > 2


EVIL = "<script>alert('x')</script><img src=\"https://example.org/x\" onerror=alert(1)>"


def test_markup_in_names_and_reasons_is_text(tmp_path: Path) -> None:
    study = new_study()
    for score in (0.5, 0.6):
        add(study, [score], suggest=lambda t: {EVIL: t.suggest_categorical(EVIL, [EVIL, "b"])})
    add(study, [0.3], state=TrialState.FAIL, reason=EVIL)
    page = written(study, tmp_path, title=EVIL, command=f"{EVIL} && true", metric=EVIL)
    assert "<script>alert" not in page and "<img" not in page
    assert loads(page) == []
    assert page.count("</script>") == len(re.findall(r"<script[ >]", page))
    assert table(page, 'id="failed"')[1][1] == EVIL


def test_long_names_are_given_places_to_break(tmp_path: Path) -> None:
    name = "section." + "very_long_name_" * 8
    study = new_study()
    for score in (0.5, 0.6, 0.7, 0.8, 0.9):
        add(study, [score], suggest=lambda t: {name: t.suggest_float(name, 0, 1)})
    page = written(study, tmp_path)
    assert "very_<wbr>long_<wbr>name_" in page
    _, layout = figures(page)["importances"]
    assert max(len(line) for line in layout["yaxis"]["ticktext"][0].split("<br>")) <= 24


def test_matplotlib_is_left_as_it_was(tmp_path: Path) -> None:
    before = (matplotlib.get_backend(), dict(matplotlib.rcParams))
    study = new_study()
    add(study, [0.5])
    written(study, tmp_path)
    assert (matplotlib.get_backend(), dict(matplotlib.rcParams)) == before


def test_a_folder_that_cannot_be_written_is_one_clear_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match="cannot be written"):
        written(new_study(), tmp_path / "file")
