"""What teaches a distillation: the index's scores of a batch's anchors with the documents that are columns."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from hncse_ray.negatives import Hits, NegativeSource, Selection, WordQuery

Float32 = NDArray[np.float32]
Int64 = NDArray[np.int64]


def teacher_scores(
    source: NegativeSource,
    hits: Hits,
    *,
    words: WordQuery | None,
    target_ids_B: Int64,
    selection: Selection,
) -> Float32:
    """Return the teacher's score of each anchor with each column: the targets of the batch, then its negatives.

    The columns of an anchor are the negatives of all if ``selection`` has a mask of them, else its own. Scores are
    those of the version that was searched, each exact, in one call to the shards.

    Args:
        source: that was searched.
        hits: of the anchors.
        words: as they were searched by.
        target_ids_B: rows that the anchors belong to.
        selection: the negatives.

    Returns:
        ``[B, B + B * m]`` or ``[B, B + m]``; -inf where it is not known, or there is no negative.

    Raises:
        SourceUnavailable: the version has given way to the next, or nothing answers.
    """
    ids_Bm = selection.ids_Bm
    B, m = ids_Bm.shape
    known, at = np.unique(np.concatenate([target_ids_B, ids_Bm.ravel()]), return_inverse=True)
    asked = known >= 0
    scores_BU = np.full((B, len(known)), -np.inf, dtype=np.float32)
    scores_BU[:, asked] = source.scores(hits, known[asked], words=words)
    if selection.columns_mask is not None:
        return scores_BU[:, at]
    own_Bm = np.take_along_axis(scores_BU, at[B:].reshape(B, m), 1)
    return np.concatenate([scores_BU[:, at[:B]], own_Bm], axis=1)
