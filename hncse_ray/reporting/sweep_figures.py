"""The figures of a sweep: Optuna's own, in the look of our pages, and as images."""

from __future__ import annotations

import io
import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import matplotlib
import matplotlib.pyplot as plt
import optuna
import plotly.colors
import plotly.graph_objects as go
from matplotlib.ticker import NullFormatter
from optuna.exceptions import ExperimentalWarning
from optuna.trial import FrozenTrial, TrialState
from optuna.visualization import matplotlib as images

from hncse_ray.reporting.page import BLUE, GREY, RED, SCALE, TEAL, axis_label

_FEWEST = 5  # of fewer trials PED-ANOVA tells nothing, and says it with figures
_TOO_FEW = f"Until {_FEWEST} trials have finished with different scores, nothing can be told."


@dataclass(frozen=True)
class Curve:
    """What a trial's learning curve shows: its scores by step, and how the trial ended."""

    trial: int
    state: TrialState
    points: tuple[tuple[int, float], ...]


# How trials are told apart: name in the legend, colour, dash for Plotly and for matplotlib.
_KINDS = {
    "best": ("best", BLUE, "solid", "-"),
    TrialState.COMPLETE: ("finished", GREY, "solid", "-"),
    TrialState.PRUNED: ("stopped early", TEAL, "dash", "--"),
    TrialState.FAIL: ("failed", RED, "dot", ":"),
    TrialState.RUNNING: ("running", GREY, "dot", ":"),
}


def scored(study: optuna.Study) -> list[FrozenTrial]:
    """Return the finished trials whose score is a number, the best first, the earlier first of equals."""
    complete = study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
    finite = [trial for trial in complete if trial.value is not None and math.isfinite(trial.value)]
    return sorted(finite, key=lambda trial: (-(trial.value or 0.0), trial.number))


def searched(study: optuna.Study) -> list[str]:
    """Return the settings that finished trials were given, sorted as Optuna sorts them."""
    return sorted({name for trial in scored(study) for name in trial.params})


def why_no_importances(study: optuna.Study) -> str | None:
    """Say why importances cannot be told; None if they can."""
    if scored(study) and not searched(study):
        return "No setting was varied."
    return _TOO_FEW if len({trial.value for trial in scored(study)}) < _FEWEST else None


def learning_curves(curves: Sequence[Curve], best: int | None, *, metric: str) -> go.Figure:
    """Draw score against step of every trial that has a score: the best on top, failed ones with a cross."""
    figure = go.Figure()
    shown: set[object] = set()
    for curve in _drawn_in_order(curves, best):
        kind = "best" if curve.trial == best else curve.state
        name, colour, dash, _ = _KINDS[kind]
        steps, scores = zip(*curve.points, strict=True)
        symbols = ["circle"] * len(steps)
        sizes = [3 if len(steps) > 1 else 6] * len(steps)
        if curve.state is TrialState.FAIL:
            symbols[-1], sizes[-1] = "x", 9
        figure.add_scatter(
            x=steps,
            y=scores,
            name=f"{name} (trial {curve.trial})" if kind == "best" else name,
            legendgroup=name,
            showlegend=kind not in shown,
            mode="lines+markers",
            line={"color": colour, "dash": dash, "width": 3 if kind == "best" else 1.3},
            marker={"symbol": symbols, "size": sizes},
            opacity=1 if kind == "best" else 0.75,
            hovertemplate=f"trial {curve.trial}, step %{{x}}: %{{y:.4f}}<extra></extra>",
        )
        shown.add(kind)
    figure.update_layout(xaxis_title="optimiser step", yaxis_title=metric, showlegend=True)
    figure.update_xaxes(rangemode="tozero")
    return figure


def history(study: optuna.Study, *, metric: str) -> go.Figure:
    """Draw every finished trial's score and the best so far."""
    figure = optuna.visualization.plot_optimization_history(study, target_name=metric)
    figure.update_traces(marker={"color": GREY, "size": 7}, selector={"mode": "markers"})
    figure.update_traces(line={"color": BLUE, "width": 2.5}, name="best so far", selector={"mode": "lines"})
    figure.update_layout(xaxis_title="trial", yaxis_title=metric)
    return figure


def importances(study: optuna.Study) -> go.Figure:
    """Draw how much of the score's variation each setting explains (PED-ANOVA, which takes conditional settings)."""
    figure = optuna.visualization.plot_param_importances(study)
    names = [name for trace in figure.data for name in trace.y]
    figure.update_traces(marker_color=BLUE)
    figure.update_layout(xaxis_title="importance", yaxis_title=None, showlegend=False)
    figure.update_yaxes(tickvals=names, ticktext=[axis_label(name) for name in names])
    highest = max((value for trace in figure.data for value in trace.x), default=1.0)
    figure.update_xaxes(range=[0, 1.15 * (highest or 1.0)])  # the figures beside the bars need space
    return figure


def parallel_coordinate(study: optuna.Study, *, metric: str) -> go.Figure:
    """Draw each finished trial as a line through its settings, coloured by its score, the best on top."""
    figure = optuna.visualization.plot_parallel_coordinate(study, target_name=metric)
    lines = [trace for trace in figure.data if trace.mode == "lines"]  # the rest is a key to the colours
    for line in lines:  # the first axis is the score, from 0 to 1
        line.line.color = plotly.colors.sample_colorscale(list(SCALE), [line.y[0]])[0]
        line.line.width, line.opacity = 1.6, 0.45 + 0.5 * line.y[0]
    figure.data = ()
    figure.add_traces(sorted(lines, key=lambda line: line.y[0]))
    for note in figure.layout.annotations:  # values on the axes
        note.text = note.text if len(note.text) <= 22 else f"…{note.text[-21:]}"
    labels = [axis_label(name, 15) for name in [metric, *searched(study)]]
    figure.update_layout(plot_bgcolor=None, margin={"l": 50, "r": 50, "t": 10, "b": 8})
    figure.update_xaxes(ticklabeloverflow="allow", ticktext=labels, tickangle=0, side="top")
    figure.update_xaxes(range=[-0.45, len(searched(study)) + 0.2])  # the axes' numbers stand on their left
    return figure


def slices(study: optuna.Study, *, metric: str) -> dict[str, go.Figure]:
    """Draw the score against each setting, by setting: later trials are darker."""
    found = {}
    for name in searched(study):
        figure = optuna.visualization.plot_slice(study, params=[name], target_name=metric)
        figure.update_traces(marker={"colorscale": SCALE, "showscale": False, "size": 8})
        figure.update_layout(xaxis_title=None, yaxis_title=None)
        if figure.layout.xaxis.type == "log":
            figure.update_xaxes(dtick="D2", tickformat="~e" if min(figure.data[0].x) < 1e-3 else "~g")
        elif choices := figure.layout.xaxis.categoryarray:
            shown = [axis_label(choice.strip("'"), 12) for choice in choices]
            figure.update_xaxes(tickvals=choices, ticktext=shown, tickangle=0)
        found[name] = figure
    return found


def draw_images(study: optuna.Study, curves: Sequence[Curve], best: int | None, *, metric: str) -> dict[str, bytes]:
    """Draw as PNG what the study has: history, importances, parallel_coordinate, slice, learning_curves."""
    drawings: dict[str, Callable[[], object]] = {}
    if any(curve.points for curve in curves):
        drawings["learning_curves"] = lambda: _curves_image(curves, best, metric=metric)
    if scored(study):
        drawings["history"] = lambda: images.plot_optimization_history(study, target_name=metric)
        if searched(study):
            drawings["parallel_coordinate"] = lambda: images.plot_parallel_coordinate(study, target_name=metric)
            drawings["slice"] = lambda: images.plot_slice(study, target_name=metric)
        if why_no_importances(study) is None:
            drawings["importances"] = lambda: images.plot_param_importances(study)
    names = searched(study)
    # A dollar sign would begin a formula.
    formulas = "$" not in f"{metric}{[trial.params for trial in scored(study)]}"
    drawn: dict[str, bytes] = {}
    with _quiet_matplotlib(formulas):
        for name, drawing in drawings.items():
            drawing()
            figure = plt.gcf()
            per_setting = {"parallel_coordinate": 1.6, "slice": 2.6}.get(name, 0.0)
            figure.set_size_inches(max(9.0, per_setting * len(names)), 5)
            for axes in figure.axes:
                axes.xaxis.set_minor_formatter(NullFormatter())
                axes.yaxis.set_minor_formatter(NullFormatter())
                if name == "slice" and axes.get_xlabel() in names:
                    axes.set_xlabel(axes.get_xlabel().replace(".", ".\n"))
                    plt.setp(axes.get_xticklabels(), rotation=30, ha="right")
                elif name == "parallel_coordinate":
                    axes.grid(False)
            png = io.BytesIO()
            figure.savefig(png, format="png", dpi=110, bbox_inches="tight")
            plt.close(figure)
            drawn[name] = png.getvalue()
    return drawn


def _curves_image(curves: Sequence[Curve], best: int | None, *, metric: str) -> None:
    _, axes = plt.subplots()
    shown: set[object] = set()
    for curve in _drawn_in_order(curves, best):
        kind = "best" if curve.trial == best else curve.state
        name, colour, _, dash = _KINDS[kind]
        steps, scores = zip(*curve.points, strict=True)
        label = None if kind in shown else f"{name} (trial {curve.trial})" if kind == "best" else name
        axes.plot(steps, scores, dash, color=colour, linewidth=2.5 if kind == "best" else 1, marker=".", label=label)
        if curve.state is TrialState.FAIL:
            axes.plot(steps[-1], scores[-1], "x", color=colour)
        shown.add(kind)
    axes.set(xlabel="optimiser step", ylabel=metric, title="Learning curves")
    axes.legend()


def _drawn_in_order(curves: Sequence[Curve], best: int | None) -> list[Curve]:
    """Return the curves that have points, the best last."""
    return sorted((curve for curve in curves if curve.points), key=lambda curve: curve.trial == best)


@contextmanager
def _quiet_matplotlib(formulas: bool) -> Iterator[None]:
    """Draw without a window, and leave matplotlib's settings as they were."""
    backend = matplotlib.get_backend()
    plt.switch_backend("Agg")
    try:
        with plt.rc_context({"text.parse_math": formulas}), warnings.catch_warnings():
            warnings.simplefilter("ignore", ExperimentalWarning)  # Optuna says so of all its images
            warnings.simplefilter("ignore", UserWarning)  # an axis on which all trials agree
            yield
    finally:
        plt.switch_backend(backend)
