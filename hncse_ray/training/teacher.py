"""What teaches a distillation: the index's scores of a batch's anchors with the documents that are columns."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from hncse_ray.negatives import Hits, NegativeSource, WordQuery

Float32 = NDArray[np.float32]
Int64 = NDArray[np.int64]


def teacher_scores(
    source: NegativeSource, hits: Hits, *, words: WordQuery | None, columns: Int64, own_bm: Int64 | None
) -> Float32:
    """Return the teacher's score of each of b anchors with each column: the targets of the batch, then negatives.

    Scores are those of the version that was searched, each exact, in one call to the shards.

    Args:
        source: that was searched.
        hits: of the anchors.
        words: as they were searched by.
        columns: row ids of columns that all anchors have; -1 where there is none.
        own_bm: of those that each anchor has for itself, behind them; None: it has none.

    Returns:
        ``[b, len(columns) + m]``; -inf where it is not known, or there is no column.

    Raises:
        SourceUnavailable: the version has given way to the next, or nothing answers.
    """
    b, n = len(hits.ids_Bk), len(columns)
    asked_for = columns if own_bm is None else np.concatenate([columns, own_bm.ravel()])
    known, at = np.unique(asked_for, return_inverse=True)
    asked = known >= 0
    scores_bU = np.full((b, len(known)), -np.inf, dtype=np.float32)
    scores_bU[:, asked] = source.scores(hits, known[asked], words=words)
    if own_bm is None:
        return scores_bU[:, at]
    return np.concatenate(
        [scores_bU[:, at[:n]], np.take_along_axis(scores_bU, at[n:].reshape(own_bm.shape), 1)], axis=1
    )
