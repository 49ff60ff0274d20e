"""The page of a sweep: which trial is the best, what its settings are, and how the search went."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import optuna
from optuna.trial import FrozenTrial, TrialState

from hncse_ray.reporting import sweep_figures
from hncse_ray.reporting.page import draw, write_page
from hncse_ray.reporting.sweep_figures import Curve
from hncse_ray.storage import write_folder

_STATES = {
    TrialState.COMPLETE: "finished",
    TrialState.PRUNED: "stopped early",
    TrialState.FAIL: "failed",
    TrialState.RUNNING: "running",
    TrialState.WAITING: "waiting",
}
_LISTED = 10


@dataclass(frozen=True)
class SeedRow:
    """The settings of one trial, trained again with several seeds.

    Attributes:
        trial: number of the trial that has these settings.
        scores: best dev score by seed.
        mean: of the scores.
        sd: their standard deviation.
        params: the settings.
    """

    trial: int
    scores: Mapping[int, float]
    mean: float
    sd: float
    params: Mapping[str, object]


@dataclass(frozen=True)
class TrialRow:
    """What the page tells of a trial; ``steps`` is the last one it was scored at, 0 if none."""

    number: int
    state: TrialState
    score: float | None
    best_step: int | None
    seconds: float | None
    settings: Mapping[str, object]
    reason: str
    points: tuple[tuple[int, float], ...] = field(repr=False)
    steps: int = 0


@dataclass(frozen=True)
class SweepFacts:
    """The numbers of a sweep.

    Attributes:
        states: how many trials there are of each state that occurs.
        seconds: of all trials together.
        stopped: how many were stopped early.
        saved_steps: what these would have gone on for.
        saved_share: of the steps that finished and stopped trials would have taken together.
    """

    trials: int
    states: Mapping[str, int]
    seconds: float
    stopped: int
    saved_steps: int
    saved_share: float


def write_sweep_page(
    study: optuna.Study,
    folder: Path,
    *,
    title: str,
    total_steps: int,
    metric: str,
    command: str,
    seeds: Sequence[SeedRow] | None = None,
) -> Path:
    """Write ``report.html`` and ``plots/*.png`` into a sweep's folder; what is there is replaced.

    Args:
        study: maximised; trials report scores by optimiser step. Of the attributes that trials may carry, the page
            shows ``values`` (the settings tried; without it the parameters), ``seconds``, ``best_step`` and
            ``reason``. Trials that carry ``misfit`` were sampled but never run: they are left out.
        folder: exists.
        title: the page's.
        total_steps: of a trial that is not stopped.
        metric: what the scores are.
        command: trains the best settings with several seeds.
        seeds: the best settings trained again with further seeds, best first: the first are the sweep's choice.
            Without them it is the trial with the best score.

    Returns:
        The page's path.

    Raises:
        StorageError: the folder cannot be written.
    """
    rows = [_row(trial) for trial in study.get_trials(deepcopy=False) if "misfit" not in trial.user_attrs]
    ranked = [_row(trial) for trial in sweep_figures.scored(study)]
    chosen = seeds[0].trial if seeds else None
    best = next((row for row in ranked if chosen in (None, row.number)), None)
    curves = [Curve(row.number, row.state, row.points) for row in rows]
    best_number = None if best is None else best.number

    images = sweep_figures.draw_images(study, curves, best_number, metric=metric)

    def write_images(plots: Path) -> None:
        for name, png in images.items():
            (plots / f"{name}.png").write_bytes(png)

    write_folder(folder / "plots", write_images)
    return write_page(
        folder / "report.html",
        "sweep.html",
        title=title,
        metric=metric,
        command=command,
        facts=sweep_facts(rows, total_steps=total_steps),
        total_steps=total_steps,
        best=best,
        listed=ranked[:_LISTED],
        columns=_columns(row.settings for row in ranked[:_LISTED]),
        failed=[row for row in rows if row.state is TrialState.FAIL],
        figures=_figures(study, curves, best_number, metric=metric),
        no_importances=sweep_figures.why_no_importances(study),
        seeds=[] if seeds is None else list(seeds),
        seed_columns=_columns(row.params for row in seeds or ()),
    )


def sweep_facts(rows: Sequence[TrialRow], *, total_steps: int) -> SweepFacts:
    """Count trials, time, and the steps that stopping early saved."""
    stopped = [row for row in rows if row.state is TrialState.PRUNED]
    planned = total_steps * (len(stopped) + sum(row.state is TrialState.COMPLETE for row in rows))
    saved = sum(max(0, total_steps - row.steps) for row in stopped)
    counts = {name: sum(row.state is state for row in rows) for state, name in _STATES.items()}
    return SweepFacts(
        trials=len(rows),
        states={name: count for name, count in counts.items() if count},
        seconds=sum(row.seconds or 0.0 for row in rows),
        stopped=len(stopped),
        saved_steps=saved,
        saved_share=saved / planned if planned else 0.0,
    )


def _row(trial: FrozenTrial) -> TrialRow:
    attributes = trial.user_attrs
    points = sorted(trial.intermediate_values.items())
    return TrialRow(
        number=trial.number,
        state=trial.state,
        score=trial.value,
        best_step=attributes.get("best_step"),
        seconds=attributes.get("seconds"),
        settings=attributes.get("values", trial.params),
        reason=str(attributes.get("reason", "no reason was recorded")),
        points=tuple((step, score) for step, score in points if math.isfinite(score)),
        steps=points[-1][0] if points else 0,
    )


def _columns(settings: Iterable[Mapping[str, object]]) -> list[str]:
    """Return every setting that one of them has, in order of appearance."""
    return list(dict.fromkeys(name for each in settings for name in each))


def _figures(study: optuna.Study, curves: Sequence[Curve], best: int | None, *, metric: str) -> dict[str, Any]:
    """Draw what the study has; a figure that cannot be drawn is None."""
    names = ("learning_curves", "history", "importances", "parallel_coordinate", "slices")
    found: dict[str, Any] = dict.fromkeys(names)
    if any(curve.points for curve in curves):
        figure = sweep_figures.learning_curves(curves, best, metric=metric)
        found["learning_curves"] = draw(figure, "learning-curves", width=960, height=340)
    if best is None:
        return found
    found["history"] = draw(sweep_figures.history(study, metric=metric), "history", height=340)
    settings = sweep_figures.searched(study)
    if sweep_figures.why_no_importances(study) is None:
        figure = sweep_figures.importances(study)
        found["importances"] = draw(figure, "importances", height=max(340, 90 + 38 * len(settings)))
    if settings:
        figure, width = sweep_figures.parallel_coordinate(study, metric=metric), 104 * (len(settings) + 1)
        found["parallel_coordinate"] = draw(figure, "parallel-coordinate", width=max(960, width), height=380)
        found["parallel_width"] = width
        drawn = sweep_figures.slices(study, metric=metric)
        found["slices"] = {name: draw(drawn[name], f"slice-{i}", height=240) for i, name in enumerate(settings)}
    return found
