"""What the pages of runs and sweeps share: one look, figures that need no network, numbers as text.

A page is one file. It carries its pictures and its style sheet, loads nothing, and follows the reader's light or dark
mode. Templates are in ``templates/``; what they are given is plain values and figures drawn by :func:`draw`.
"""

from __future__ import annotations

import json
import math
import re
import textwrap
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jinja2
import plotly.graph_objects as go
from markupsafe import Markup, escape

from hncse_ray.config.reference import shown_value
from hncse_ray.reporting.chart import COLOURS, draw_svg
from hncse_ray.reporting.reporters import duration_text
from hncse_ray.storage import write_atomically

# All of these can be told from a white and from a nearly black ground.
BLUE, *_, RED, TEAL, GREY = COLOURS
SCALE = ("#aeb7c3", BLUE)  # from low to high


def draw(figure: go.Figure, name: str, *, height: int = 260, width: int = 460) -> Markup:
    """Return a figure as HTML in the look of the pages; see :func:`~hncse_ray.reporting.chart.draw_svg`.

    Args:
        figure: what to draw; it loses its title, which belongs above it in the page.
        name: unique in the page.
        height: in the picture's units, of which a letter is six wide.
        width: the same; on the page it takes the width that there is.
    """
    figure.update_layout(template="none", title=None)
    return draw_svg(json.loads(figure.to_json()), name, width=width, height=height)


def line_figure(
    series: Mapping[str, tuple[Sequence[float], Sequence[float]]], *, x_title: str, y_title: str
) -> go.Figure:
    """Return lines over a common axis; one line alone has no legend.

    Args:
        series: by name, the points' x and y. What is not a number leaves a gap.
        x_title: below the figure.
        y_title: beside it.
    """
    figure = go.Figure()
    for name, (x, y) in series.items():
        points = [value if math.isfinite(value) else None for value in y]
        mode = "lines" if len(points) > 40 else "lines+markers"
        figure.add_scatter(
            x=list(x),
            y=points,
            name=name,
            mode=mode,
            line={"width": 2 if len(points) <= 200 else 1.2},
            marker={"size": 8 if len(points) <= 5 else 5},
        )
    figure.update_layout(xaxis_title=x_title, yaxis_title=y_title, showlegend=len(series) > 1, hovermode="x unified")
    return figure


def axis_label(name: str, width: int = 24) -> str:
    """Return a setting's path on several short lines, so that it fits beside an axis."""
    lines = []
    for part in name.split("."):
        words = textwrap.wrap(part.replace("_", "_ "), width, max_lines=3, placeholder="…")
        lines += [str(escape(line.replace("_ ", "_"))) for line in words]
    return "<br>".join(lines)


def breakable(text: str) -> Markup:
    """Return text whose lines may be broken after its dots, slashes and underscores, and not within a number."""
    return Markup(re.sub(r"[_/]|\.(?!(?<=\d\.)\d)", r"\g<0><wbr>", str(escape(text))))


def score_text(value: float | None) -> str:
    """Return a score as the terminal shows it: four digits, two where it is out of a hundred."""
    if value is None or not math.isfinite(value):
        return "–"
    return f"{value:.{2 if abs(value) >= 2 else 4}f}"


def gain_text(after: float, before: float) -> str:
    """Return the difference of two scores in their digits."""
    return f"{after - before:+.{2 if abs(after) >= 2 else 4}f}"


def write_page(path: Path, template: str, **facts: Any) -> Path:
    """Fill a template and write it, whole or not at all.

    Raises:
        StorageError: it cannot be written.
    """
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent / "templates"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "breakable": breakable,
        "score": score_text,
        "gain": gain_text,
        "setting": partial(shown_value, digits=4),
        "duration": duration_text,
    }
    write_atomically(path, environment.get_template(template).render(**facts))
    return path
