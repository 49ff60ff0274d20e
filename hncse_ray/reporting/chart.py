"""Figures as inline SVG: no script is needed to see one, and a page of twenty weighs less than a photograph.

Figures are described by plotly's objects, which Optuna gives too; of these, what our pages use is drawn: lines, points,
horizontal bars, axes that are linear, logarithmic or of words, notes and lines across.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from markupsafe import Markup, escape

COLOURS = ("#2f6fd6", "#d97b29", "#2e9e6b", "#8a63c9", "#cf4d4d", "#1f9aa8", "#8a94a3")
_MOST_POINTS = 600  # of a line; more could not be told apart
_DASHES = {"dash": "6 4", "dot": "2 3"}
_CHARACTER, _LINE = 6.2, 14.0  # width and height of a letter, in the units of the picture
_TICKS = 6

Trace = dict[str, Any]


@dataclass(frozen=True)
class _Axis:
    """From values to positions between 0 and 1, and the ticks in between."""

    low: float
    high: float
    log: bool
    words: tuple[Any, ...]
    ticks: tuple[tuple[float, tuple[str, ...]], ...]

    def at(self, value: Any) -> float | None:
        """The place of a value; None where it has none."""
        number = self.number(value)
        return None if number is None else (number - self.low) / (self.high - self.low)

    def number(self, value: Any) -> float | None:
        if self.words:
            return float(self.words.index(value)) if value in self.words else None
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
            return None
        return (math.log10(value) if value > 0 else None) if self.log else float(value)


def draw_svg(spec: dict[str, Any], name: str, *, width: int, height: int) -> Markup:
    """Return a figure as SVG with its legend, what a reader who does not see it is told, and its numbers as JSON.

    Args:
        spec: plotly's JSON of a figure, without a template.
        name: unique in the page.
        width: of the picture's own units; on the page it is as wide as the column.
        height: the same.
    """
    layout, traces = dict(spec.get("layout", {})), [_thinned(trace) for trace in spec.get("data", [])]
    layout.pop("template", None)
    bars = any(trace.get("type") == "bar" for trace in traces)
    x = _axis(layout.get("xaxis", {}), [v for t in traces for v in t["x"]], bars=bars, most=width // 80)
    y = _axis(layout.get("yaxis", {}), [v for t in traces for v in t["y"]], bars=False, most=_TICKS)
    box = _box(layout, x, y, width, height)
    parts = [*_grid(layout, x, y, box), *_shapes(layout, x, y, box)]
    for i, trace in enumerate(traces):
        trace["colour"] = _colour(trace, i)
        parts.append(_bars(trace, x, y, box) if trace.get("type") == "bar" else _scatter(trace, x, y, box))
    parts += _notes(layout, x, y, box)
    place = {"left": box.left, "right": box.right, "width": width, "low": x.low, "high": x.high, "log": x.log}
    data = json.dumps({"traces": traces, "layout": layout, "place": place}).replace("<", "\\u003c")
    legend = _legend(traces) if layout.get("showlegend") else ""
    return Markup(
        f'{legend}<svg id="figure-{escape(name)}" viewBox="0 0 {width} {height}" role="img" tabindex="0"'
        f' aria-label="{escape(describe(traces, layout))}">{"".join(parts)}</svg>'
        f'<p class="readout" aria-live="polite"></p>'
        f'<script type="application/json" class="figure" data-name="{escape(name)}">{data}</script>'
    )


def describe(traces: Sequence[Trace], layout: dict[str, Any]) -> str:
    """Tell the figure in a sentence for each of its first lines: where it begins and ends, its least and its most."""
    told = []
    for trace in traces[:8]:
        points = [(a, b) for a, b in zip(trace["x"], trace["y"], strict=True) if isinstance(b, (int, float))]
        if not points or trace.get("type") == "bar":
            told += [f"{b}: {a:.3g}" for a, b in zip(trace["x"], trace["y"], strict=True) if trace.get("type") == "bar"]
            continue
        values = [b for _, b in points]
        told.append(f"{trace.get('name') or 'values'}: {values[0]:.4g} at {_plain(points[0][0])}, {values[-1]:.4g} at"
                    f" {_plain(points[-1][0])}, least {min(values):.4g}, most {max(values):.4g}")  # fmt: skip
    more = f"; and {len(traces) - 8} more" if len(traces) > 8 else ""
    axis = (layout.get("xaxis", {}).get("title") or {}).get("text")
    return f"{'by ' + axis + '. ' if axis else ''}{'; '.join(told)}{more}"


@dataclass(frozen=True)
class _Box:
    left: float
    right: float
    top: float
    bottom: float

    def x(self, place: float) -> float:
        return round(self.left + place * (self.right - self.left), 1)

    def y(self, place: float) -> float:
        return round(self.bottom - place * (self.bottom - self.top), 1)


def _thinned(trace: Trace) -> Trace:
    """Return a trace with at most so many points as can be seen: of neighbours the least and the most."""
    x, y = list(trace.get("x") or ()), list(trace.get("y") or ())
    if len(x) > _MOST_POINTS and trace.get("mode", "lines").startswith("lines"):
        size = math.ceil(2 * len(x) / _MOST_POINTS)
        kept: list[int] = []
        for start in range(0, len(x), size):
            numbers = [i for i in range(start, min(start + size, len(x))) if isinstance(y[i], (int, float))]
            if numbers:
                kept += sorted({min(numbers, key=y.__getitem__), max(numbers, key=y.__getitem__)})
        kept = sorted({0, *kept, len(x) - 1})
        x, y = [x[i] for i in kept], [y[i] for i in kept]
    return {**trace, "x": x, "y": y}


def _axis(layout: dict[str, Any], values: Sequence[Any], *, bars: bool, most: int) -> _Axis:
    words = tuple(layout.get("categoryarray") or ())
    if not words and (layout.get("type") == "category" or any(isinstance(value, str) for value in values)):
        words = tuple(dict.fromkeys(values))
    if words:
        texts = dict(zip(layout.get("tickvals") or (), layout.get("ticktext") or (), strict=False))
        ticks = tuple((float(i), _lines(texts.get(word, word))) for i, word in enumerate(words))
        return _Axis(-0.5, len(words) - 0.5, False, words, ticks)
    log = layout.get("type") == "log"
    scale = _Axis(0, 1, log, (), ())
    numbers = [n for value in values if (n := scale.number(value)) is not None]
    low, high = (min(numbers), max(numbers)) if numbers else (0.0, 1.0)
    if bars or layout.get("rangemode") == "tozero":
        low = min(low, 0.0)
    if layout.get("range") and None not in layout["range"]:
        low, high = sorted(layout["range"])
    else:
        margin = 0.05 * (high - low) or abs(high) * 0.05 or 0.5
        low, high = low - margin, high + margin
    if positions := layout.get("tickvals"):
        texts = layout.get("ticktext") or positions
        ticks = tuple((float(at), _lines(text)) for at, text in zip(positions, texts, strict=False))
    else:
        places = _nice(low, high, log, max(most, 2))
        if not log and all(number.is_integer() for number in numbers):  # such as steps: there is nothing between two
            places = [at for at in places if math.isclose(at, round(at))] or places
        ticks = tuple((at, (_plain(10**at if log else at),)) for at in places)
    return _Axis(low, high, log, (), ticks)


def _nice(low: float, high: float, log: bool, most: int) -> list[float]:
    """Round numbers between two, at most so many."""
    if log:
        steps = (1, 2, 5) if high - low < 2 else (1,)
        found = [math.log10(m) + e for e in range(math.floor(low), math.ceil(high) + 1) for m in steps]
        found = [at for at in found if low <= at <= high]
        return found[:: math.ceil(len(found) / most) or 1]
    raw = (high - low) / most
    magnitude = 10 ** math.floor(math.log10(raw))
    step = next(m * magnitude for m in (1, 2, 5, 10) if m * magnitude >= raw)
    first, last = math.ceil(low / step), math.floor(high / step)
    return [i * step for i in range(first, last + 1)]


def _plain(value: Any) -> str:
    if not isinstance(value, (int, float)):
        return str(value)
    if value and (abs(value) >= 1e6 or abs(value) < 1e-3):
        return f"{value:.3g}".replace("e-0", "e-").replace("e+0", "e")
    return f"{value:,.6g}"


def _lines(text: Any) -> tuple[str, ...]:
    return tuple(Markup(line).unescape() for line in str(text).split("<br>"))


def _box(layout: dict[str, Any], x: _Axis, y: _Axis, width: int, height: int) -> _Box:
    hidden = layout.get("yaxis", {}).get("visible") is False or layout.get("yaxis", {}).get("showticklabels") is False
    widest = 0 if hidden else max((len(line) for _, lines in y.ticks for line in lines), default=0)
    deepest = max((len(lines) for _, lines in x.ticks), default=1)
    above = layout.get("xaxis", {}).get("side") == "top"
    margin = layout.get("margin") or {}
    left = max(14 + widest * _CHARACTER, margin.get("l", 0)) + (16 if _title(layout, "yaxis") else 0)
    names = deepest * _LINE + 8
    bottom = (0 if above else names) + (16 if _title(layout, "xaxis") else 0) + 4
    return _Box(left, width - max(16, margin.get("r", 0)), (names if above else 0) + 8, height - bottom)


def _title(layout: dict[str, Any], axis: str) -> str:
    return str((layout.get(axis, {}).get("title") or {}).get("text") or "")


def _text(x: float, y: float, lines: Sequence[str], *, anchor: str = "middle", kind: str = "") -> str:
    spans = "".join(
        f'<tspan x="{x}" dy="{0 if i == 0 else _LINE}">{escape(line)}</tspan>' for i, line in enumerate(lines)
    )
    return f'<text x="{x}" y="{y}" text-anchor="{anchor}"{f" class={kind!r}" if kind else ""}>{spans}</text>'


def _grid(layout: dict[str, Any], x: _Axis, y: _Axis, box: _Box) -> list[str]:
    parts = []
    above = layout.get("xaxis", {}).get("side") == "top"
    for number, lines in x.ticks:
        place = (number - x.low) / (x.high - x.low)
        if 0 <= place <= 1:
            at = box.x(place)
            parts.append(f'<line class="grid" x1="{at}" x2="{at}" y1="{box.top}" y2="{box.bottom}"/>')
            parts.append(_text(at, 12 if above else box.bottom + 16, lines))
    for number, lines in y.ticks:
        place = (number - y.low) / (y.high - y.low)
        if 0 <= place <= 1 and layout.get("yaxis", {}).get("visible") is not False:
            at = box.y(place)
            parts.append(f'<line class="grid" x1="{box.left}" x2="{box.right}" y1="{at}" y2="{at}"/>')
            if layout.get("yaxis", {}).get("showticklabels") is not False:
                parts.append(_text(box.left - 6, at + 4 - (len(lines) - 1) * _LINE / 2, lines, anchor="end"))
    if title := _title(layout, "xaxis"):
        deepest = max((len(lines) for _, lines in x.ticks), default=1)
        parts.append(_text((box.left + box.right) / 2, box.bottom + 8 + (deepest + 1) * _LINE, [title], kind="title"))
    if title := _title(layout, "yaxis"):
        middle = (box.top + box.bottom) / 2
        text = _text(0, 0, [title], kind="title")
        parts.append(f'<g transform="translate(12 {middle}) rotate(-90)">{text}</g>')
    return parts


def _shapes(layout: dict[str, Any], x: _Axis, y: _Axis, box: _Box) -> list[str]:
    parts = []
    for shape in layout.get("shapes", ()):
        positions = [shape[end] if shape.get(f"{end[0]}ref") == "paper" else axis.at(shape[end])
                  for end, axis in (("x0", x), ("x1", x), ("y0", y), ("y1", y))]  # fmt: skip
        if shape.get("type") == "line" and None not in positions:
            x0, x1, y0, y1 = (float(place or 0) for place in positions)
            parts.append(f'<line class="grid" x1="{box.x(x0)}" x2="{box.x(x1)}" y1="{box.y(y0)}" y2="{box.y(y1)}"/>')
    return parts


def _notes(layout: dict[str, Any], x: _Axis, y: _Axis, box: _Box) -> list[str]:
    parts = []
    for note in layout.get("annotations", ()):
        across, up = x.at(note.get("x")), y.at(note.get("y"))
        if across is not None and up is not None:
            anchor = {"right": "end", "left": "start"}.get(str(note.get("xanchor")), "middle")
            shift = note.get("xshift", 0) or 0
            parts.append(_text(box.x(across) + shift, box.y(up) + 4, _lines(note.get("text", "")), anchor=anchor,
                               kind="note"))  # fmt: skip
    return parts


def _colour(trace: Trace, number: int) -> str:
    for part in ("line", "marker"):
        if isinstance(colour := (trace.get(part) or {}).get("color"), str):
            return colour
    return COLOURS[number % len(COLOURS)]


def _shade(values: Sequence[Any], scale: Sequence[Any]) -> list[str]:
    """Colours from low to high, between the ends of a scale."""
    ends = [scale[0][1], scale[-1][1]] if isinstance(scale[0], (list, tuple)) else [scale[0], scale[-1]]
    low, high = min(values), max(values)
    rgb = [[int(end[i : i + 2], 16) for i in (1, 3, 5)] for end in ends]
    shares = [(value - low) / ((high - low) or 1) for value in values]
    return ["#" + "".join(f"{round(a + s * (b - a)):02x}" for a, b in zip(*rgb, strict=True)) for s in shares]


def _scatter(trace: Trace, x: _Axis, y: _Axis, box: _Box) -> str:
    positions = [(x.at(a), y.at(b)) for a, b in zip(trace["x"], trace["y"], strict=True)]
    points = [None if a is None or b is None else (box.x(a), box.y(b)) for a, b in positions]
    mode, line, marker = trace.get("mode", "lines"), trace.get("line") or {}, trace.get("marker") or {}
    parts = []
    if "lines" in mode:
        path, pen = "", "M"
        for point in points:
            path += f"{pen}{point[0]} {point[1]}" if point else ""
            pen = "L" if point else "M"
        dash = f' stroke-dasharray="{_DASHES[line["dash"]]}"' if line.get("dash") in _DASHES else ""
        parts.append(
            f'<path d="{path}" fill="none" stroke="{trace["colour"]}" stroke-width="{line.get("width", 2)}"{dash}/>'
        )
    if "markers" in mode:
        sizes, symbols, colours = marker.get("size", 5), marker.get("symbol", "circle"), marker.get("color")
        shades = (
            _shade(colours, marker.get("colorscale") or ("#aeb7c3", COLOURS[0]))
            if isinstance(colours, list) and colours
            else None
        )
        edge = (
            (marker.get("line") or {}).get("width") if isinstance(symbols, str) and symbols.endswith("open") else None
        )
        for i, point in enumerate(points):
            if point is None:
                continue
            size = (sizes[i] if isinstance(sizes, list) else sizes) / 2
            symbol = symbols[i] if isinstance(symbols, list) else symbols
            colour = shades[i] if shades else trace["colour"]
            a, b = point
            if symbol == "x":
                cross = f"M{a - size} {b - size}L{a + size} {b + size}M{a - size} {b + size}L{a + size} {b - size}"
                parts.append(f'<path d="{cross}" stroke="{colour}" stroke-width="2"/>')
            else:
                look = f'fill="none" stroke="{colour}" stroke-width="{edge}"' if edge else f'fill="{colour}"'
                parts.append(f'<circle cx="{a}" cy="{b}" r="{size}" {look}/>')
    return f'<g opacity="{trace.get("opacity", 1)}">{"".join(parts)}</g>'


def _bars(trace: Trace, x: _Axis, y: _Axis, box: _Box) -> str:
    parts = []
    thick = 0.6 * (box.bottom - box.top) / max(len(y.words), 1)
    zero = box.x(min(max(x.at(0) or 0, 0), 1))
    texts = trace.get("text") or [""] * len(trace["x"])
    for value, word, text in zip(trace["x"], trace["y"], texts, strict=True):
        across, up = x.at(value), y.at(word)
        if across is None or up is None:
            continue
        end, middle = box.x(across), box.y(up)
        parts.append(f'<rect x="{min(zero, end)}" y="{middle - thick / 2:.1f}" width="{abs(end - zero):.1f}"'
                     f' height="{thick:.1f}" fill="{trace["colour"]}"/>')  # fmt: skip
        parts.append(_text(end + 5, middle + 4, [str(text)], anchor="start"))
    return "".join(parts)


def _legend(traces: Sequence[Trace]) -> str:
    items = []
    for trace in traces:
        if trace.get("showlegend") is not False and trace.get("name"):
            dash = (trace.get("line") or {}).get("dash")
            style = {"dash": "dashed", "dot": "dotted"}.get(str(dash), "solid")
            line = f"border-top: 3px {style} {trace['colour']}"
            ring = f"width: 10px; height: 10px; border: 2px solid {trace['colour']}; border-radius: 50%"
            swatch = f'<i style="{escape(ring if trace.get("mode") == "markers" else line)}"></i>'
            items.append(f"<li>{swatch}{escape(trace['name'])}</li>")
    return f'<ul class="legend">{"".join(items)}</ul>'
