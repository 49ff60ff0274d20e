"""The cosines of positive and negative pairs, drawn: as lines of text, and as a picture."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from hncse_ray.errors import counted
from hncse_ray.storage import replacing

_LEVELS = " ▁▂▃▄▅▆▇█"


@dataclass(frozen=True)
class Similarities:
    """Counts of pairs by cosine: ``bins`` are the edges, one more than there are counts."""

    bins: Sequence[float]
    positive: Sequence[int]
    negative: Sequence[int]


def similarity_lines(found: Similarities) -> list[str]:
    """Return the two histograms as lines of text, each as high as its own fullest bin, empty ends cut off."""
    counts = [p + n for p, n in zip(found.positive, found.negative, strict=True)]
    used = [i for i, count in enumerate(counts) if count]
    if not used:
        return ["no pairs"]
    first, last = used[0], used[-1] + 1
    low, high = f"{found.bins[first]:.2f}", f"{found.bins[last]:.2f}"
    width = max(last - first, len(low) + 1 + len(high))
    lines = []
    for name, own in (("positives", found.positive), ("negatives", found.negative)):
        bars = "".join(_bar(count, max(own)) for count in own[first:last])
        lines.append(f"{name}  {bars:<{width}}  {counted(sum(own), 'pair')}")
    return [*lines, f"cosine     {low}{high:>{width - len(low)}}"]


def plot_similarities(path: Path, by_model: Mapping[str, Similarities]) -> None:
    """Write a picture with one panel a model, below each other on one scale.

    Raises:
        StorageError: it cannot be written.
    """
    from matplotlib.figure import Figure  # slow to import; without pyplot it needs no screen

    figure = Figure(figsize=(7, 0.6 + 2.2 * len(by_model)), layout="constrained")
    panels = figure.subplots(len(by_model), 1, sharex=True, squeeze=False)[:, 0]
    for panel, (model, found) in zip(panels, by_model.items(), strict=True):
        for name, counts in (("positives", found.positive), ("negatives", found.negative)):
            shares = [count / max(1, sum(counts)) for count in counts]
            panel.stairs(shares, list(found.bins), fill=True, alpha=0.55, label=f"{name} ({sum(counts):,})")
        panel.set_title(model, fontsize="medium", loc="left", parse_math=False)
        panel.set_ylabel("share of pairs")
        panel.legend(frameon=False, fontsize="small")
    panels[-1].set_xlabel("cosine (STS-Benchmark dev)")
    with replacing(path) as partial:
        figure.savefig(partial, format="png", dpi=120)


def _bar(count: int, highest: int) -> str:
    """A block as high as the count; a bin that holds anything shows."""
    if count == 0:
        return _LEVELS[0]
    return _LEVELS[max(1, round(count / highest * (len(_LEVELS) - 1)))]
