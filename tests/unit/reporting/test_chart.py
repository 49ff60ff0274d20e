"""Figures as SVG: where points are, what is left out, and that text stays text."""

from __future__ import annotations

import math
import re
from typing import Any
from xml.etree import ElementTree

import plotly.graph_objects as go
import pytest

from hncse_ray.reporting.page import draw, line_figure

SVG = "{http://www.w3.org/2000/svg}"


def drawn(figure: go.Figure) -> ElementTree.Element:
    text = str(draw(figure, "it"))
    return ElementTree.fromstring(
        text[text.index("<svg") : text.index("</svg>") + 6].replace("<svg ", f'<svg xmlns="{SVG[1:-1]}" ')
    )


def circles(svg: ElementTree.Element) -> list[tuple[float, float]]:
    return [(float(c.attrib["cx"]), float(c.attrib["cy"])) for c in svg.iter(f"{SVG}circle")]


def texts(svg: ElementTree.Element) -> list[str]:
    return ["".join(text.itertext()) for text in svg.iter(f"{SVG}text")]


def test_points_are_where_their_numbers_put_them() -> None:
    svg = drawn(line_figure({"a": ([0, 5, 10], [1.0, 2.0, 3.0])}, x_title="step", y_title="loss"))
    (x0, y0), (x1, y1), (x2, y2) = circles(svg)
    assert x1 - x0 == pytest.approx(x2 - x1, abs=0.2) and x2 > x0
    assert y0 - y1 == pytest.approx(y1 - y2, abs=0.2) and y2 < y0  # up is more
    assert {"step", "loss", "0", "10", "1", "2", "3"} <= set(texts(svg))


@pytest.mark.parametrize("steps", [[7], [6, 7]])
def test_between_two_steps_there_is_none(steps: list[int]) -> None:
    svg = drawn(line_figure({"a": (steps, [0.5] * len(steps))}, x_title="step", y_title="loss"))
    assert [text for text in texts(svg) if re.fullmatch(r"[678][.\d]*", text)] == list(map(str, steps))


def test_what_is_no_number_is_a_gap() -> None:
    svg = drawn(line_figure({"a": ([0, 1, 2, 3], [1.0, 2.0, math.nan, 4.0])}, x_title="x", y_title="y"))
    (path,) = [p.attrib["d"] for p in svg.iter(f"{SVG}path")]
    assert path.count("M") == 2 and path.count("L") == 1 and len(circles(svg)) == 3


def test_a_logarithmic_axis_spaces_factors_evenly() -> None:
    figure = go.Figure(go.Scatter(x=[0.001, 0.01, 0.1, 0], y=[1, 1, 1, 1], mode="markers"))
    figure.update_xaxes(type="log")
    svg = drawn(figure)
    (a, _), (b, _), (c, _) = circles(svg)  # zero has no place
    assert b - a == pytest.approx(c - b, abs=0.2)
    assert {"0.001", "0.01", "0.1"} <= set(texts(svg))


def test_words_and_bars() -> None:
    svg = drawn(go.Figure(go.Bar(x=[0.75, 0.25], y=["one", "two"], orientation="h", text=["0.75", "0.25"])))
    first, second = (float(bar.attrib["width"]) for bar in svg.iter(f"{SVG}rect"))
    assert first == pytest.approx(3 * second, rel=0.02)
    assert {"one", "two", "0.75", "0.25"} <= set(texts(svg))


@pytest.mark.parametrize("y", [[], [math.nan], [1.0], [2.0, 2.0], [0.0, 0.0], [1e-9, 2e9], [-1e300, 1e300]])
def test_degenerate_numbers_are_drawn(y: list[float]) -> None:
    svg = drawn(line_figure({"a": (list(range(len(y))), y)}, x_title="x", y_title="y"))
    numbers = [float(n) for c in svg.iter(f"{SVG}circle") for n in (c.attrib["cx"], c.attrib["cy"])]
    assert all(math.isfinite(n) and -1 <= n <= 480 for n in numbers)


def test_text_stays_text() -> None:
    evil: Any = "</script><script>alert(1)</script>"
    text = str(draw(line_figure({evil: ([1], [2.0]), "b": ([1], [3.0])}, x_title=evil, y_title=evil), "it"))
    assert len(re.findall("<script", text)) == 1 and "<script>alert" not in text
    assert evil in texts(drawn(line_figure({evil: ([1], [2.0])}, x_title=evil, y_title="y")))
