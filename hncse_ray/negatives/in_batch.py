"""What the hits of a batch say of the batch itself: which of its rows may be right for each other's anchors.

Letters of shapes: B anchors, k hits of each, G different targets among those of the batch.
"""

from __future__ import annotations

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


def rows_too_close(
    keys_Bk: Int64,
    scores_Bk: NDArray[np.float32],
    *,
    batch_keys_B: Int64,
    limit_B: Float32 | None,
    reciprocal: int | None,
) -> Int64:
    """Return the places of a batch that should not repel each other.

    Two anchors are kept apart if the target of one is a hit of the other above the limit, or if the target of each is
    among the nearest of the other (reciprocal neighbours).

    Args:
        keys_Bk: what the targets of the hits are known by, best first.
        scores_Bk: their scores; -inf where there is no hit.
        batch_keys_B: what the anchors' own targets are known by.
        limit_B: of each anchor, scores above it are too close; None: scores do not count.
        reciprocal: how many of the nearest count, an anchor's own target not among them; None: none does.

    Returns:
        Int64 ``[n, 2]``, i < j; of rows with different targets.
    """
    if limit_B is None and reciprocal is None:
        return np.zeros((0, 2), dtype=np.int64)
    targets_G, group_B = np.unique(batch_keys_B, return_inverse=True)
    B, group_Bk = len(batch_keys_B), np.minimum(np.searchsorted(targets_G, keys_Bk), len(targets_G) - 1)
    other_Bk = np.isfinite(scores_Bk) & (keys_Bk != batch_keys_B[:, None])
    here_Bk = other_Bk & (targets_G[group_Bk] == keys_Bk)

    def of_batch(hit_Bk: Bool) -> Bool:
        """Which rows [B, B] the targets of hits are the targets of."""
        found_BG = np.zeros((B, len(targets_G)), dtype=np.bool_)
        anchors, places = np.nonzero(here_Bk & hit_Bk)
        found_BG[anchors, group_Bk[anchors, places]] = True
        found_BB: Bool = found_BG[:, group_B]
        return found_BB

    apart_BB = np.zeros((B, B), dtype=np.bool_)
    if limit_B is not None:
        above_BB = of_batch(scores_Bk > limit_B[:, None])
        apart_BB |= above_BB | above_BB.T
    if reciprocal is not None:
        nearest_BB = of_batch(np.cumsum(other_Bk, axis=1) <= reciprocal)
        apart_BB |= nearest_BB & nearest_BB.T
    return np.argwhere(np.triu(apart_BB, 1))
