"""The page of a run: what it gained, how it went, and with which settings. A run that still goes has one too."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import plotly.graph_objects as go

from hncse_ray.errors import StorageError
from hncse_ray.recipe import read_yaml
from hncse_ray.reporting.events import RunFinished
from hncse_ray.reporting.page import BLUE, draw, line_figure, write_page
from hncse_ray.reporting.verdict import describe_verdict

Row = Mapping[str, Any]

# Caption, axis, and the metrics to draw by the name that the reader sees. A figure without data is left out.
_TRAINING = (
    ("Loss", "loss", {"loss": "loss"}),
    (
        "Similarity of views",
        "cosine",
        {"positive_similarity": "positive", "hardest_negative_similarity": "hardest negative of the batch"},
    ),
    ("Uniformity", "lower is more spread out", {"uniformity": "uniformity"}),
    ("Learning rate", "learning rate", {"learning_rate": "learning rate"}),
    ("Speed", "sentences a second", {"sentences_per_s": "speed"}),
)
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


def write_run_page(run_folder: Path) -> Path:
    """Write ``report.html`` into the folder of a run that is finished, still going, or was killed.

    Returns:
        The page's path.

    Raises:
        StorageError: the folder cannot be read or written.
        SettingsError: its ``settings.yaml`` cannot be read.
    """
    stored = run_folder / "settings.yaml"
    settings = read_yaml(stored)
    rows = read_metrics(run_folder / "metrics.jsonl")
    result = _read_result(run_folder / "result.json")
    logged = [row for row in rows if "split" not in row]
    dev = [row for row in rows if row.get("split") == "dev"]
    best_step = result.best_step if result else max((row["step"] for row in dev if row.get("is_best")), default=None)
    metric = str(_setting(settings, "evaluation", "metric"))
    uses_pool = any(name.startswith("negatives/") for row in logged for name in row)
    scores = {}
    if any(metric in row for row in dev):
        scores["scores"] = _score_figure(dev, metric, best_step, "best" if result else "best so far")
    return write_page(
        run_folder / "report.html",
        "run.html",
        title=f"Run {_setting(settings, 'run', 'name')}",
        objective=_setting(settings, "objective", "name"),
        model=_setting(settings, "encoder", "model"),
        source=_setting(settings, "corpus", "source"),
        metric=metric,
        result=result,
        verdict=describe_verdict(result.verdict) if result and result.verdict else "",
        last_step=max((row["step"] for row in rows), default=0),
        best_step=best_step,
        scores=_scores(rows, result, best_step),
        figures=scores | _figures(logged, _TRAINING),
        negatives=_figures(logged, (*_NEGATIVES, _rules(logged))) if uses_pool else {},
        pool=_last(logged, ("index_step", "shards_alive", "failed_builds", "build_seconds", "build_rows_per_s")),
        settings_yaml=stored.read_text(encoding="utf-8"),
    )


def read_metrics(path: Path) -> list[Row]:
    """Read ``metrics.jsonl``; its last line may have been cut short by a kill, and it may not be there yet.

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
                raise StorageError(f"line {number} is not a row of metrics", str(path)) from error
    return rows


def _setting(settings: Mapping[str, Any], section: str, name: str) -> object:
    values = settings.get(section)
    return values.get(name, "?") if isinstance(values, Mapping) else "?"


def _read_result(path: Path) -> RunFinished | None:
    """Return the facts of the finished run; None if it is not finished."""
    if not path.exists():
        return None
    try:
        return RunFinished.read(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError) as error:
        raise StorageError(f"cannot be read ({error})", str(path)) from error


def _scores(rows: Sequence[Row], result: RunFinished | None, best_step: int | None) -> list[dict[str, Any]]:
    """Return a row for each score and split, before and after; of an unfinished run the first and the best so far."""
    if result is not None:
        before, after = result.before, result.after
    else:
        found = {row["step"]: _numbers(row) for row in rows if row.get("split") == "dev"}
        before, after = {"dev": found.get(0, {})}, {"dev": {} if best_step is None else found[best_step]}
    return [
        {"metric": name, "split": split, "before": before.get(split, {}).get(name), "after": value}
        for split, values in after.items()
        for name, value in values.items()
    ]


def _numbers(row: Row) -> dict[str, float]:
    return {name: value for name, value in row.items() if name not in ("step", "split", "is_best")}


def _series(rows: Sequence[Row], name: str) -> tuple[list[float], list[float]]:
    """Return the steps and values at which a metric was logged."""
    points = [(row["step"], row[name]) for row in rows if isinstance(row.get(name), (int, float))]
    return [step for step, _ in points], [value for _, value in points]


def _figures(
    rows: Sequence[Row], specifications: Sequence[tuple[str, str, Mapping[str, str]]]
) -> dict[str, dict[str, Any]]:
    """Draw the figures that there is something to draw for, by name."""
    found: dict[str, dict[str, Any]] = {}
    for caption, axis, metrics in specifications:
        series = {label: _series(rows, name) for name, label in metrics.items()}
        drawn = {label: points for label, points in series.items() if points[0]}
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
    steps, scores = _series(dev, metric)
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
        _, values = _series(rows, f"negatives/{name}")
        if values and math.isfinite(values[-1]):
            found[name] = values[-1]
    return found
