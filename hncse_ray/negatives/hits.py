"""The hits of searches: scores and ids, best first, and their merge over the shards; by cosine, or by words too.

Shape letters: Q queries, k hits, K hits of all shards.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from hncse_ray.config import NegativesSettings

Ranked: TypeAlias = tuple[NDArray[np.float32], NDArray[np.int64]]  # scores and ids, best first


def merge_hits(
    scores: Sequence[NDArray[np.floating[Any]]], ids: Sequence[NDArray[np.integer[Any]]], *, k: int
) -> Ranked:
    """Merge the answers of shards: best first, ties by the smaller id.

    Args:
        scores: of each shard ``[Q, any number]``, in any order.
        ids: global ids, the same; -1 = no hit.
        k: hits wanted of each query.

    Returns:
        float32 scores [Q, k] and int64 ids [Q, k], padded with -inf and -1.
    """
    scores_QK = np.concatenate([np.asarray(part, np.float32) for part in scores], axis=1)
    ids_QK = np.concatenate([np.asarray(part, np.int64) for part in ids], axis=1)
    if scores_QK.shape != ids_QK.shape:
        raise ValueError(f"scores {scores_QK.shape} and ids {ids_QK.shape} differ in shape")
    scores_QK[ids_QK < 0] = -np.inf
    merged = no_hits(len(scores_QK), k)
    keep = min(k, scores_QK.shape[1])
    merged[0][:, :keep], merged[1][:, :keep] = ordered(scores_QK, ids_QK, keep)
    merged[1][np.isneginf(merged[0])] = -1
    return merged


def no_hits(queries: int, k: int) -> Ranked:
    """Return padding: scores [Q, k] of -inf and ids [Q, k] of -1."""
    return np.full((queries, k), -np.inf, dtype=np.float32), np.full((queries, k), -1, dtype=np.int64)


def ordered(scores_QK: NDArray[np.float32], rows_QK: NDArray[np.int64], keep: int) -> Ranked:
    """Return the first `keep` by falling score, then rising row."""
    order_Qk = first_places(scores_QK, rows_QK, keep)
    return np.take_along_axis(scores_QK, order_Qk, 1), np.take_along_axis(rows_QK, order_Qk, 1)


def first_places(scores_QK: NDArray[np.float32], rows_QK: NDArray[np.int64], keep: int) -> NDArray[np.int64]:
    """Return the positions of the first `keep` by falling score, then rising row ``[Q, keep]``.

    Only those that score as high as the last of them are sorted, so that many shards cost little more than one.
    """
    Q, K = scores_QK.shape
    if 0 < keep < K:
        last_Q1 = -np.partition(-scores_QK, keep - 1, axis=1)[:, keep - 1 : keep]
        high_QK = scores_QK >= last_Q1
        width = int(high_QK.sum(axis=1).max(initial=keep))  # above `keep` where scores are equal
        if width < K:
            queries, positions = np.nonzero(high_QK)
            counts_Q = np.bincount(queries, minlength=Q)
            slots = np.arange(len(queries)) - np.repeat(np.cumsum(counts_Q) - counts_Q, counts_Q)
            positions_QK = np.full((Q, width), -1, dtype=np.int64)
            positions_QK[queries, slots] = positions
            nobody_QK = positions_QK < 0
            keys = [np.take_along_axis(keys_QK, np.maximum(positions_QK, 0), 1) for keys_QK in (rows_QK, -scores_QK)]
            order_Qk = np.lexsort((*keys, nobody_QK), axis=-1)[:, :keep]
            return np.take_along_axis(positions_QK, order_Qk, 1)
    return np.lexsort((rows_QK, -scores_QK), axis=-1)[:, :keep]


@dataclass(frozen=True)
class WordQuery:
    """What makes a row near beside its cosine: the words that it shares with the text of an anchor.

    A row's score is ``cosine + weight * min(1, w / most)``, with w its BM25 and ``most`` the best of a row that is not
    the anchor's own: does not hold the same, and is not of its document. An own row may hold the anchor itself.

    Attributes:
        texts: of the anchors [Q].
        weight: of words.
        alone: leave the cosine out.
    """

    texts: Sequence[str]
    weight: float
    alone: bool = False

    @classmethod
    def of(cls, settings: NegativesSettings, texts: Callable[[], Sequence[str]]) -> WordQuery | None:
        """Return what the settings of a run ask for; None if words do not count."""
        if settings.score == "cosine":
            return None
        return cls(texts(), settings.lexical_weight, alone=settings.score == "lexical")

    def scores(
        self, cosines: NDArray[np.float32], words: NDArray[np.float32], most_Q: NDArray[np.float32]
    ) -> NDArray[np.float32]:
        """Return the scores of rows ``[Q, ...]``, of any number of them."""
        most = np.expand_dims(most_Q, tuple(range(1, cosines.ndim)))
        share = np.divide(words, most, out=np.zeros_like(words), where=most > 0)
        by_words = np.float32(self.weight) * np.minimum(share, np.float32(1))
        return by_words if self.alone else cosines + by_words


@dataclass(frozen=True)
class Offers:
    """What a shard has for each query: its k best by cosine, and behind them its k best by words that are not own.

    Attributes:
        ids_Q2k: row ids, int64; -1 where there are fewer. A row may be there twice.
        cosines_Q2k: float32, -inf where the id is -1.
        words_Q2k: BM25, float32, 0 where the id is -1.
    """

    ids_Q2k: NDArray[np.int64]
    cosines_Q2k: NDArray[np.float32]
    words_Q2k: NDArray[np.float32]


def merge_offers(offers: Sequence[Offers], *, words: WordQuery) -> tuple[Ranked, NDArray[np.float32]]:
    """Merge what the shards offer to the k best by cosine and words together: best first, ties by the smaller id.

    They are the best among the k best of all shards by cosine and the k best by words, and so do not depend on the
    number of shards. A row that is neither has a score of at most that of the last of these two taken together: what
    scores more is exact.

    Args:
        offers: of the shards.
        words: how a score is made.

    Returns:
        Float32 *cosines* [Q, k] and int64 ids [Q, k], padded with -inf and -1; and of each query the best BM25 of a row
        that is not its own ``[Q]``.
    """
    k, union = offers[0].ids_Q2k.shape[1] // 2, []
    for half, by in ((slice(0, k), 1), (slice(k, 2 * k), 2)):
        columns = zip(
            *((o.ids_Q2k[:, half], o.cosines_Q2k[:, half], o.words_Q2k[:, half]) for o in offers), strict=True
        )
        parts = [np.concatenate(of_shards, axis=1) for of_shards in columns]
        keys_QK = np.where(parts[0] < 0, np.float32(-np.inf), parts[by])
        order_Qk = first_places(keys_QK, parts[0], k)
        union.append([np.take_along_axis(x, order_Qk, 1) for x in parts])
    ids_QK, cosines_QK, words_QK = (np.concatenate(parts, axis=1) for parts in zip(*union, strict=True))
    most_Q = words_QK[:, k:].max(axis=1, initial=0)
    scores_QK = np.where(ids_QK < 0, -np.inf, words.scores(cosines_QK, words_QK, most_Q))
    order_QK = np.lexsort((ids_QK, -scores_QK), axis=-1)
    ids_QK, cosines_QK = (np.take_along_axis(x, order_QK, 1) for x in (ids_QK, cosines_QK))
    left_out_QK = ids_QK < 0
    left_out_QK[:, 1:] |= ids_QK[:, 1:] == ids_QK[:, :-1]  # found by both: equal scores, so neighbours
    first_Qk = np.argsort(left_out_QK, axis=1, kind="stable")[:, :k]
    out_Qk, ids_Qk, cosines_Qk = (np.take_along_axis(x, first_Qk, 1) for x in (left_out_QK, ids_QK, cosines_QK))
    return (np.where(out_Qk, np.float32(-np.inf), cosines_Qk), np.where(out_Qk, -1, ids_Qk)), most_Q
