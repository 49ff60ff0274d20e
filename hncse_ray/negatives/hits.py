"""The hits of searches: scores and ids, best first, and their merge over the shards."""

from __future__ import annotations

from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

Hits: TypeAlias = tuple[NDArray[np.float32], NDArray[np.int64]]  # scores and ids


def merge_hits(scores_SQk: NDArray[np.floating[Any]], ids_SQk: NDArray[np.integer[Any]], *, k: int) -> Hits:
    """Merge the answers of S shards: best first, ties by the smaller id.

    Args:
        scores_SQk: of each shard, in any order.
        ids_SQk: global ids; -1 = no hit.
        k: hits wanted of each query.

    Returns:
        float32 scores [Q, k] and int64 ids [Q, k], padded with -inf and -1.
    """
    shards, queries, width = scores_SQk.shape
    if ids_SQk.shape != scores_SQk.shape:
        raise ValueError(f"scores {scores_SQk.shape} and ids {ids_SQk.shape} differ in shape")
    scores_QK = np.moveaxis(scores_SQk, 0, 1).reshape(queries, shards * width).astype(np.float32)
    ids_QK = np.moveaxis(ids_SQk, 0, 1).reshape(queries, shards * width).astype(np.int64)
    scores_QK[ids_QK < 0] = -np.inf
    merged = no_hits(queries, k)
    keep = min(k, shards * width)
    merged[0][:, :keep], merged[1][:, :keep] = ordered(scores_QK, ids_QK, keep)
    merged[1][np.isneginf(merged[0])] = -1
    return merged


def no_hits(queries: int, k: int) -> Hits:
    """Return padding: scores [Q, k] of -inf and ids [Q, k] of -1."""
    return np.full((queries, k), -np.inf, dtype=np.float32), np.full((queries, k), -1, dtype=np.int64)


def ordered(scores_QK: NDArray[np.float32], rows_QK: NDArray[np.int64], keep: int) -> Hits:
    """Return the first `keep` by falling score, then rising row."""
    order_Qk = np.lexsort((rows_QK, -scores_QK), axis=-1)[:, :keep]
    return np.take_along_axis(scores_QK, order_Qk, 1), np.take_along_axis(rows_QK, order_Qk, 1)
