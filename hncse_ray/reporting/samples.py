"""What a run kept to be looked at (``samples.jsonl``), as the page of the run shows it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import plotly.graph_objects as go

from hncse_ray.errors import StorageError
from hncse_ray.reporting.page import SCALE, draw, line_figure
from hncse_ray.reporting.projection import Projection, by_umap, turned

Row = Mapping[str, Any]
Figure = dict[str, Any]

_MOVED, _SHOWN = 8, 3  # sentences that moved most; neighbours of each
_FATES = {
    "left": "left over",
    "same_content": "dropped: the same text",
    "same_document": "dropped: the same document",
    "max_score": "dropped: max_score",
    "relative_margin": "dropped: relative_margin",
    "skip_hardest": "dropped: skip_hardest",
}


@dataclass(frozen=True)
class Words:
    """How to call what an objective compares an anchor with, and what it does with a hit of the index."""

    positive: str = "positive"
    nearest: str = "hardest negative of the batch"
    found: str = "global negatives"
    taken: str = "taken as a negative"
    in_batch: str = "dropped: in the batch"
    own: str = "its own"


_WORDS = {
    "distillation": Words(
        positive="own document",
        nearest="nearest other of the batch",
        found="neighbours",
        taken="on the list",
        in_batch="on the list: in the batch",
        own="its own: not on the list",
    ),
    "instance_smoothing": Words(found="neighbours", taken="in the group"),
}


def words_of(objective: str) -> Words:
    """Return the words for an objective; those for a user's own say nothing of what it does."""
    return _WORDS.get(objective, Words(found="neighbours", taken="taken") if ":" in objective else Words())


@dataclass(frozen=True)
class Neighbour:
    """A sentence near another; ``mark`` says what is to be said of it."""

    text: str
    cosine: float
    mark: str


@dataclass(frozen=True)
class Compared:
    """A sentence or query with its nearest before training and after."""

    text: str
    before: Sequence[Neighbour]
    after: Sequence[Neighbour]


@dataclass(frozen=True)
class Anchor:
    """A row of the last batch, what belongs to it, and what the index found: text, cosine, fate, is it taken."""

    text: str
    target: str | None
    hits: Sequence[tuple[str, float, str, bool]]


@dataclass(frozen=True)
class Samples:
    """What there is to look at; nothing where the run has kept nothing."""

    queries: Sequence[Compared] = ()
    moved: Sequence[Compared] = ()
    kept: float | None = None
    anchors: Sequence[Anchor] = ()
    index_step: int | None = None
    histograms: Sequence[Figure] = ()
    maps: Sequence[Figure] = field(default_factory=tuple)
    projection: Projection = "pca"

    @property
    def has_sentences(self) -> bool:
        """Whether the run came to its end and kept its sentences."""
        return self.kept is not None


def show_samples(rows: Sequence[Row], path: Path, *, words: Words, projection: Projection = "pca") -> Samples:
    """Return what the page shows of the rows of ``samples.jsonl``.

    Args:
        rows: of the file.
        path: its name.
        words: for the objective.
        projection: of the map.

    Raises:
        StorageError: they are of another version.
        SettingsError: the projection's package is not installed.
    """
    latest = {kind: row[kind] for row in rows for kind in ("sentences", "negatives") if kind in row}
    try:
        recorded = [(row["step"], row["similarities"]) for row in rows if "similarities" in row]
        pairs = {"positive": f"{words.positive}s", "in batch": "in the batch", "global": words.found}
        histograms = _histograms(recorded, pairs)
        fates = _FATES | {"taken": words.taken, "in_batch": words.in_batch}
        sentences, negatives = latest.get("sentences"), latest.get("negatives")
        found = Samples(histograms=histograms)
        if sentences is not None:
            found = _compared(sentences, histograms, projection)
        if negatives is None:
            return found
        anchors = [
            Anchor(each["anchor"], each["target"],
                   [(hit["text"], hit["cosine"], words.own if hit["is_target"] else fates[hit["fate"]],
                     hit["fate"] == "taken" and not hit["is_target"]) for hit in each["hits"]])
            for each in negatives["anchors"]
        ]  # fmt: skip
        return Samples(**{**vars(found), "anchors": anchors, "index_step": int(negatives["index_step"])})
    except (KeyError, IndexError, TypeError, ValueError, AttributeError) as error:
        problem = f"holds samples of another version ({type(error).__name__}: {error})"
        raise StorageError(problem, str(path), "Delete it: the page does without") from error


def _compared(sentences: Row, histograms: Sequence[Figure], projection: Projection) -> Samples:
    texts, right = sentences["texts"], sentences["right"]
    before, after = sentences["before"], sentences["after"]
    pairs = list(zip(before["neighbours"], after["neighbours"], strict=True))
    shared = [_shared(old, new) for old, new in pairs]
    by_change = [i for i in np.argsort(shared, kind="stable").tolist() if shared[i] < 1][:_MOVED]
    moved = [_both(texts[i], pairs[i], texts, ()) for i in by_change]
    query_pairs = zip(before["query_neighbours"], after["query_neighbours"], strict=True)
    queries = [
        _both(query, both, texts, positions)
        for query, both, positions in zip(sentences["queries"], query_pairs, right, strict=True)
    ]
    kept = float(np.mean(shared)) if shared else 1.0
    maps = _maps(before, after, projection)
    return Samples(queries, moved, kept, histograms=histograms, maps=maps, projection=projection)


def _shared(old: Sequence[Any], new: Sequence[Any]) -> float:
    """The share of the nearest that are the same."""
    return len({i for i, _ in old} & {i for i, _ in new}) / max(len(old), 1)


def _both(text: str, both: tuple[Any, Any], texts: Sequence[str], right: Sequence[int]) -> Compared:
    old, new = both

    def shown(own: Sequence[Any], other: Sequence[Any], only_here: str) -> list[Neighbour]:
        there = {i for i, _ in other[:_SHOWN]}
        return [
            Neighbour(texts[i], cosine, "right" if i in right else only_here if i not in there else "")
            for i, cosine in own[:_SHOWN]
        ]

    return Compared(text, shown(old, new, ""), shown(new, old, "new"))


def _histograms(recorded: Sequence[tuple[int, Row]], pairs: Mapping[str, str]) -> list[Figure]:
    """Draw the cosines of kinds of pairs, called so, the first recorded, the middle ones and the last, on one scale."""
    chosen = [recorded[i] for i in sorted({0, len(recorded) // 2, len(recorded) - 1})] if recorded else []
    used = [
        i
        for _, found in chosen
        for counts in (found[name] for name in pairs if name in found)
        for i, count in enumerate(counts)
        if count
    ]
    figures = []
    for step, found in chosen:
        low, high = max(min(used) - 1, 0), max(used) + 2
        edges = np.array(found["bins"])
        centres = np.round((edges[:-1] + edges[1:]) / 2, 3).tolist()[low:high]
        series = {
            label: (centres, [round(count / max(sum(found[name]), 1), 4) for count in found[name]][low:high])
            for name, label in pairs.items()
            if name in found
        }
        figure = line_figure(series, x_title="cosine", y_title="share of the pairs")
        figure.update_traces(mode="lines")
        figures.append({"caption": f"Step {step}", "figure": draw(figure, f"cosines-{step}", height=230, width=340)})
    return figures


def _maps(before: Row, after: Row, projection: Projection) -> list[Figure]:
    """Draw the sample before and after, the latter turned onto the former."""
    old_n2, new_n2 = np.array(before["map"]), np.array(after["map"])
    if len(old_n2) < 3:
        return []
    is_umap = projection == "umap"
    if is_umap:
        start_n2 = np.round(turned(new_n2, old_n2), 3)  # as the other: what has not changed gets the same map
        old_n2, new_n2 = by_umap(before["neighbours"], old_n2), by_umap(after["neighbours"], start_n2)
    shades = np.round(old_n2[:, 0], 3).tolist()
    new_n2 = turned(new_n2, old_n2)
    both = np.concatenate([old_n2, new_n2])  # one scale, so that what spreads or collapses is seen
    margins = 0.05 * np.ptp(both, axis=0) + 1e-3
    x_range, y_range = np.round([both.min(axis=0) - margins, both.max(axis=0) + margins], 3).T.tolist()
    figures = []
    for caption, facts, positions_n2 in (("Before", before, old_n2), ("After", after, new_n2)):
        marker = {"size": 7, "color": shades, "colorscale": SCALE}
        x, y = np.round(positions_n2, 3).T.tolist()
        name = "UMAP" if is_umap else "component"
        figure = go.Figure(go.Scatter(x=x, y=y, mode="markers", marker=marker, name=f"second {name}"))
        figure.update_xaxes(title=f"first {name}", range=x_range)
        figure.update_yaxes(title=f"second {name}", range=y_range)
        figure.update_layout(showlegend=False)
        note = "" if is_umap else f"{facts['explained']:.0%} of the variance"
        figures.append({"caption": caption, "note": note, "figure": draw(figure, f"map-{caption.lower()}", height=320)})
    return figures


def plane_figure(rows: Sequence[Row]) -> dict[str, Figure]:
    """Draw alignment against uniformity over the run (Wang & Isola 2020); nothing without these."""
    points = [
        (row["step"], row["uniformity"], 2 - 2 * row["positive_similarity"])
        for row in rows
        if isinstance(row.get("uniformity"), float) and isinstance(row.get("positive_similarity"), float)
    ]
    if len(points) < 2:
        return {}
    points = [points[i] for i in np.unique(np.linspace(0, len(points) - 1, 200).astype(int)).tolist()]
    steps, x, y = (list(column) for column in zip(*points, strict=True))
    figure = go.Figure(
        go.Scatter(x=x, y=y, mode="lines", line={"width": 1}, opacity=0.5, name="", hoverinfo="skip"),
    )
    figure.add_scatter(
        x=x, y=y, mode="markers", marker={"size": 7, "color": steps, "colorscale": SCALE}, name="batches"
    )
    for i, place in ((0, "start"), (-1, "end")):
        figure.add_annotation(x=x[i], y=y[i], text=place, xanchor="left", xshift=7)
    figure.update_layout(xaxis_title="uniformity (lower is more spread out)", yaxis_title="alignment", showlegend=False)
    caption = "Alignment against uniformity"
    return {"plane": {"caption": caption, "figure": draw(figure, "plane", height=280)}}
