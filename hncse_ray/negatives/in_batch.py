"""What the hits of a batch say of the batch itself: which of its rows may be right for each other's anchors.

Letters of shapes: B anchors, k hits of each.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Int64 = NDArray[np.int64]
Bool = NDArray[np.bool_]
Float32 = NDArray[np.float32]


def score_limit(max_score: float | None, relative_margin: float | None, positive_B: Float32) -> Float32 | None:
    """Return above which score a hit is taken for a false negative, of each anchor ``[B]``; None: none is."""
    if max_score is None and relative_margin is None:
        return None
    limit_B = np.full(len(positive_B), np.inf if max_score is None else max_score)
    if relative_margin is not None:
        limit_B = np.minimum(limit_B, positive_B * (1 - relative_margin))
    return limit_B.astype(np.float32)


@dataclass(frozen=True)
class NearHits:
    """Hits of B anchors that may be the targets of other rows of their batch.

    Attributes:
        keys_Bk: what the targets of the hits are known by.
        above_Bk: which of them are too close to the anchor by their score.
        nearest_Bk: which of them are among its nearest.
        own_B: what the anchors' own targets are known by.
    """

    keys_Bk: Int64
    above_Bk: Bool
    nearest_Bk: Bool
    own_B: Int64


def near_hits(
    keys_Bk: Int64,
    scores_Bk: Float32,
    *,
    own_B: Int64,
    limit_B: Float32 | None,
    reciprocal: int | None,
) -> NearHits:
    """Return what anchors must tell each other of their hits.

    Two of them are kept apart if the target of one is a hit of the other above the limit, or if the target of each is
    among the nearest of the other (reciprocal neighbours).

    Args:
        keys_Bk: what the targets of the hits are known by, best first.
        scores_Bk: their scores; -inf where there is no hit.
        own_B: what the anchors' own targets are known by; hits of these do not count.
        limit_B: of each anchor, scores above it are too close; None: scores do not count.
        reciprocal: how many of the nearest count; None: none does.
    """
    other_Bk = np.isfinite(scores_Bk) & (keys_Bk != own_B[:, None])
    nobody_Bk = np.zeros_like(other_Bk)
    return NearHits(
        keys_Bk,
        nobody_Bk if limit_B is None else other_Bk & (scores_Bk > limit_B[:, None]),
        nobody_Bk if reciprocal is None else other_Bk & (np.cumsum(other_Bk, axis=1) <= reciprocal),
        own_B,
    )
