"""The page of a run: what it gained, how it went, and with which settings. A run that still goes has one too."""

from __future__ import annotations

import json
import math
import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import Any

import plotly.graph_objects as go

from hncse_ray.config import read_setting
from hncse_ray.config.reference import reference, shown_value
from hncse_ray.errors import SettingsError, StorageError
from hncse_ray.recipe import read_yaml
from hncse_ray.reporting.events import RunFinished
from hncse_ray.reporting.page import BLUE, draw, line_figure, write_page
from hncse_ray.reporting.projection import Projection
from hncse_ray.reporting.records import METRICS, SAMPLES
from hncse_ray.reporting.samples import Words, plane_figure, show_samples, words_of
from hncse_ray.reporting.verdict import describe_verdict
from hncse_ray.storage import is_locked

Row = Mapping[str, Any]

# Caption, axis, and the metrics to draw by the name that the reader sees. A figure without data is left out.
_NEGATIVES = (
    ("Age of the index", "optimiser steps", {"negatives/index_age_steps": "age"}),
    (
        "Batches and slots",
        "share",
        {
            "negatives/usable": "slots filled",
            "negatives/waited": "batches waited for",
            "negatives/missing": "batches without neighbours",
            "negatives/partial": "answers without some shard",
        },
    ),
    (
        "Similarity of the selected",
        "cosine",
        {"negatives/index_similarity": "in the index", "negative_similarity": "to the present anchors"},
    ),
    ("Look-up", "milliseconds", {"negatives/search_ms_p50": "median", "negatives/search_ms_p99": "99th percentile"}),
)
_RULES = "negatives/removed_"


@dataclass(frozen=True)
class RunFacts:
    """What a run's folder says of it.

    Attributes:
        name: of the run.
        settings: its ``settings.yaml``, values as text.
        rows: of its ``metrics.jsonl``.
        result: None if it is not finished.
        state: ``finished``, ``stopped early``, ``still going`` or ``not finished``.
        metric: that chooses the checkpoint.
        best_step: the best on dev so far; None before the first score.
    """

    name: str
    settings: Mapping[str, Any]
    rows: Sequence[Row]
    result: RunFinished | None
    state: str
    metric: str
    best_step: int | None

    @property
    def logged(self) -> list[Row]:
        """The rows of training steps."""
        return [row for row in self.rows if "split" not in row and "verdict" not in row]

    @property
    def dev(self) -> list[Row]:
        """The rows of scores on dev."""
        return [row for row in self.rows if row.get("split") == "dev"]

    @property
    def last_step(self) -> int:
        """The last step on record."""
        return max((int(row["step"]) for row in self.rows), default=0)

    @property
    def scores(self) -> list[dict[str, Any]]:
        """A row for each score and split, before and after."""
        return _scores(self.rows, self.result, self.best_step)

    @property
    def answer(self) -> dict[str, Any] | None:
        """The row of :attr:`scores` that tells whether the run helped: on test where there is one, else on dev."""
        of_metric = {row["split"]: row for row in self.scores if row["metric"] == self.metric}
        return next((row for split in ("test", "dev") if (row := of_metric.get(split))), None)


def read_run(run_folder: Path) -> RunFacts:
    """Read the folder of a run that is finished, still going, or was killed.

    Raises:
        StorageError: it holds no run, or cannot be read.
        SettingsError: its ``settings.yaml`` cannot be read.
    """
    settings = read_yaml(run_folder / "settings.yaml")
    rows, result = read_rows(run_folder / METRICS), _read_result(run_folder / "result.json")
    best = max((row["step"] for row in rows if row.get("split") == "dev" and row.get("is_best")), default=None)
    state = "not finished"
    if result is not None:
        state = "stopped early" if result.stopped_early else "finished"
    elif is_locked(run_folder / ".lock"):
        state = "still going"
    return RunFacts(
        name=str(_setting(settings, "run", "name")),
        settings=settings,
        rows=rows,
        result=result,
        state=state,
        metric=str(_setting(settings, "evaluation", "metric")),
        best_step=result.best_step if result else best,
    )


def write_run_page(run_folder: Path, *, projection: Projection = "pca") -> Path:
    """Write ``report.html`` into the folder of a run that is finished, still going, or was killed.

    Args:
        run_folder: of the run.
        projection: of the map of its sentences.

    Returns:
        The page's path.

    Raises:
        StorageError: the folder cannot be read or written.
        SettingsError: its ``settings.yaml`` cannot be read, or the projection's package is not installed.
    """
    run = read_run(run_folder)
    result, logged = run.result, run.logged
    uses_pool = any(name.startswith("negatives/") for row in logged for name in row)
    objective = str(_setting(run.settings, "objective", "name"))
    words = words_of(objective)
    samples = show_samples(read_rows(run_folder / SAMPLES), run_folder / SAMPLES, words=words, projection=projection)
    figures = {}
    if any(run.metric in row for row in run.dev):
        figures["scores"] = _score_figure(run.dev, run.metric, run.best_step, "best" if result else "best so far")
    figures |= _figures(logged, _training(words))
    ranks_only = objective == "distillation" and _value(run.settings, "objective", "contrast_weight") in (0, "?")
    if not ranks_only:  # else nothing draws views together, nor the rest apart
        figures |= plane_figure(logged)
    return write_page(
        run_folder / "report.html",
        "run.html",
        title=f"Run {run.name}",
        objective=objective,
        words=words,
        ranks_only=ranks_only,
        setting=partial(_value, run.settings),
        model=_setting(run.settings, "encoder", "model"),
        corpus=_corpus(run.settings),
        run=run,
        metric=run.metric,
        result=result,
        verdict=describe_verdict(result.verdict) if result and result.verdict else "",
        written=datetime.now().astimezone().strftime("%Y-%m-%d %H:%M %Z"),
        last_step=run.last_step,
        best_step=run.best_step,
        scores=run.scores,
        samples=samples,
        figures=figures,
        phases={name: seconds for name, seconds in result.seconds.items() if seconds > 0} if result else {},
        negatives=_figures(logged, (*_NEGATIVES, _rules(logged))) if uses_pool else {},
        pool=_last(logged, ("index_step", "shards_alive", "failed_builds", "build_seconds", "build_rows_per_s")),
        changed=changed_settings(run.settings),
        repeat=f"hncse train {shlex.quote(str(run_folder / 'settings.yaml'))} run.name={shlex.quote(run.name)}-again",
        settings_yaml=(run_folder / "settings.yaml").read_text(encoding="utf-8"),
    )


def changed_settings(settings: Mapping[str, Any]) -> dict[str, tuple[str, str]]:
    """Return the settings that are not as by default, each with its default; of one that is not known, that.

    Args:
        settings: the tree of ``settings.yaml``, also of another version of hncse_ray.
    """
    objective = settings.get("objective") or {}
    name = objective.get("name") if isinstance(objective, Mapping) else None
    defaults = {
        setting.key: setting.default
        for section in reference()
        for setting in section.settings
        if not setting.objectives or str(name) in setting.objectives or ":" in str(name)
    }
    changed = {}
    for path, value in _leaves(settings, defaults):
        try:
            shown = shown_value(read_setting(path, value))
        except SettingsError:
            shown = str(value)
        if (default := defaults.get(path, "not known to this version")) != shown:
            changed[path] = (shown, default)
    return changed


def _leaves(tree: Mapping[str, Any], known: Mapping[str, str], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in tree.items():
        path = f"{prefix}{key}"
        is_section = not prefix or any(other.startswith(f"{path}.") for other in known)
        is_section &= known.get(path) != "null"  # one that may be missing is a value
        if isinstance(value, Mapping) and is_section:
            yield from _leaves(value, known, f"{path}.")
        else:
            yield path, value


def read_rows(path: Path) -> list[Row]:
    """Read ``metrics.jsonl`` or ``samples.jsonl``, which may not be there yet.

    The last line may have been cut short by a kill.

    Raises:
        StorageError: it cannot be read, or a line other than the last holds no step.
    """
    try:
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines() if path.exists() else []
    except OSError as error:
        raise StorageError(f"cannot be read ({error.strerror})", str(path)) from error
    rows: list[Row] = []
    for number, line in enumerate(lines, start=1):
        try:
            row = json.loads(line)
            rows.append({**row, "step": int(row["step"])})
        except (ValueError, TypeError, KeyError) as error:
            if number < len(lines):
                raise StorageError(f"line {number} is not a row of a step", str(path)) from error
    return rows


def _setting(settings: Mapping[str, Any], section: str, name: str) -> object:
    values = settings.get(section)
    return values.get(name, "?") if isinstance(values, Mapping) else "?"


def _value(settings: Mapping[str, Any], section: str, name: str) -> object:
    """Return a setting as a run reads it; as it stands there if that is not of this version."""
    found = _setting(settings, section, name)
    try:
        return read_setting(f"{section}.{name}", found)
    except SettingsError:
        return found


def _corpus(settings: Mapping[str, Any]) -> object:
    """What the run trained on: the names of files and folders, else the source."""
    paths = _setting(settings, "corpus", "path")
    names = [Path(str(path)).name for path in paths] if isinstance(paths, list | tuple) else []
    return ", ".join(names) or _setting(settings, "corpus", "source")


def _read_result(path: Path) -> RunFinished | None:
    """Return the facts of the finished run; None if it is not finished."""
    if not path.exists():
        return None
    try:
        return RunFinished.read(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError) as error:
        raise StorageError(f"cannot be read ({error})", str(path)) from error


def _scores(rows: Sequence[Row], result: RunFinished | None, best_step: int | None) -> list[dict[str, Any]]:
    """Return a row for each score and split, before and after; of an unfinished run the first and the best so far."""
    whitened: Mapping[str, Mapping[str, float]] = {}
    if result is not None:
        before, after, whitened = result.before, result.after, result.whitened_base
    else:
        found = {row["step"]: _numbers(row) for row in rows if row.get("split") == "dev"}
        before, after = {"dev": found.get(0, {})}, {"dev": {} if best_step is None else found[best_step]}
    return [
        {
            "metric": name,
            "split": split,
            "before": before.get(split, {}).get(name),
            "whitened": whitened.get(split, {}).get(name),
            "after": value,
        }
        for split, values in after.items()
        for name, value in values.items()
    ]


def _numbers(row: Row) -> dict[str, float]:
    return {name: value for name, value in row.items() if name not in ("step", "split", "is_best")}


def series(rows: Sequence[Row], name: str) -> tuple[list[float], list[float]]:
    """Return the steps and values at which a metric was logged."""
    points = [(row["step"], row[name]) for row in rows if isinstance(row.get(name), (int, float))]
    return [step for step, _ in points], [value for _, value in points]


def _training(words: Words) -> tuple[tuple[str, str, dict[str, str]], ...]:
    """Return the specifications of how training went, in the words of its objective."""
    cosines = {"positive_similarity": words.positive, "hardest_negative_similarity": words.nearest}
    return (
        ("Loss", "loss", {"loss": "loss"}),
        ("Agreement with the teacher", "share of lists with its first", {"teacher_agreement": "agreement"}),
        ("Similarity of views", "cosine", cosines),
        ("Uniformity", "lower is more spread out", {"uniformity": "uniformity"}),
        ("Learning rate", "learning rate", {"learning_rate": "learning rate"}),
        ("Speed", "rows a second", {"sentences_per_s": "speed"}),
        ("Model FLOPs utilisation", "share of the GPUs' peak", {"model_flops_utilisation": "utilisation"}),
    )


def _figures(
    rows: Sequence[Row], specifications: Sequence[tuple[str, str, Mapping[str, str]]]
) -> dict[str, dict[str, Any]]:
    """Draw the figures that there is something to draw for, by name."""
    found: dict[str, dict[str, Any]] = {}
    for caption, axis, metrics in specifications:
        drawn = {label: points for name, label in metrics.items() if (points := series(rows, name))[0]}
        if drawn:
            name = caption.lower().replace(" ", "-")
            figure = line_figure(drawn, x_title="optimiser step", y_title=axis)
            found[name] = {"caption": caption, "figure": draw(figure, name, height=280)}
    return found


def _rules(rows: Sequence[Row]) -> tuple[str, str, dict[str, str]]:
    """Return the specification of what each rule removed, without the rules that removed nothing."""
    names = sorted({name for row in rows for name, value in row.items() if name.startswith(_RULES) and value})
    return "Removed by the rules", "hits a batch", {name: name.removeprefix(_RULES).replace("_", " ") for name in names}


def _score_figure(dev: Sequence[Row], metric: str, best_step: int | None, mark: str) -> dict[str, Any]:
    """Draw the dev metric over the steps, with the best step marked."""
    steps, scores = series(dev, metric)
    figure: go.Figure = line_figure({metric: (steps, scores)}, x_title="optimiser step", y_title=metric)
    if best_step in steps:
        figure.add_scatter(
            x=[best_step],
            y=[scores[steps.index(best_step)]],
            name=f"{mark}: step {best_step}",
            mode="markers",
            marker={"symbol": "circle-open", "size": 14, "color": BLUE, "line": {"width": 2.5}},
        )
        figure.update_layout(showlegend=True)
    figure.update_layout(hovermode="closest")
    return {"caption": "Score on dev", "figure": draw(figure, "scores", height=280)}


def _last(rows: Sequence[Row], names: Sequence[str]) -> dict[str, float]:
    """Return the last value of the pool's metrics that the run has."""
    found = {}
    for name in names:
        _, values = series(rows, f"negatives/{name}")
        if values and math.isfinite(values[-1]):
            found[name] = values[-1]
    return found
