"""What is counted of look-ups between two logs: by each rank of its own part of batches, then of all."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from hncse_ray.negatives import IndexVersion
from hncse_ray.training.lookup import LookedUp


@dataclass
class Window:
    """What has happened to this rank's part of batches since the last log."""

    missed: int = 0
    answered: int = 0
    version: IndexVersion | None = None
    waited: int = 0
    partial: int = 0
    search_s: list[float] = field(default_factory=list)
    removed: Counter[str] = field(default_factory=Counter)
    slots: int = 0
    chosen: int = 0
    scores: float = 0.0
    asked: int = 0
    own_found: int = 0
    own_first: int = 0

    def add(self, looked_up: LookedUp, waited: bool) -> None:
        """Count one batch that was answered."""
        selection, ranks_b = looked_up.selection, looked_up.negatives.ranks_b[looked_up.asked_b]
        self.answered += 1
        self.version = looked_up.negatives.version
        self.waited += waited
        self.partial += not looked_up.hits.complete
        self.search_s.append(looked_up.search_s)
        self.removed.update(selection.removed)
        self.slots += selection.mask_Bm.size
        self.chosen += int(selection.mask_Bm.sum())
        self.scores += float(selection.scores_Bm.sum(dtype=np.float64))
        self.asked += len(ranks_b)
        self.own_found += int((ranks_b >= 0).sum())
        self.own_first += int((ranks_b == 0).sum())


def window_facts(windows: Sequence[Window]) -> dict[str, float]:
    """Return shares of batches, counts a batch, milliseconds and cosines, by name, of all ranks' parts."""
    first = windows[0]  # all have missed and used the same batches
    found = {"missing": first.missed / max(1, first.missed + first.answered)}
    if not first.answered:
        return found

    def total(name: str) -> float:
        return float(sum(getattr(window, name) for window in windows))

    removed = sum((window.removed for window in windows), Counter[str]())
    p50, p99 = np.percentile([s for window in windows for s in window.search_s], [50, 99])
    found |= {
        "waited": total("waited") / (len(windows) * first.answered),
        "partial": total("partial") / (len(windows) * first.answered),
        "search_ms_p50": float(p50) * 1e3,
        "search_ms_p99": float(p99) * 1e3,
        "usable": total("chosen") / total("slots"),
        "index_similarity": total("scores") / max(1.0, total("chosen")),
    }
    if asked := total("asked"):
        found |= {"own_found": total("own_found") / asked, "own_first": total("own_first") / asked}
    return found | {f"removed_{rule}": removed[rule] / first.answered for rule in first.removed}
