"""A negative source inside the training process: for single-process runs, and the reference for the pool."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from hncse_ray.negatives.hits import WordQuery, merge_offers
from hncse_ray.negatives.shard import IndexShard
from hncse_ray.negatives.source import (
    Float32,
    Hits,
    IndexVersion,
    Int64,
    SourceStatus,
    SourceUnavailable,
    TokenRow,
    Weights,
    share_anchors,
)


class InProcessSource:
    """One shard with all rows; publishing builds at once, in the calling thread. See NegativeSource.

    Args:
        shard: the only shard.
        corpus_digest: of the corpus behind it.
        rows: its rows, N.
    """

    def __init__(self, shard: IndexShard, *, corpus_digest: str, rows: int) -> None:
        self._shard, self._corpus_digest, self._rows = shard, corpus_digest, rows
        self._status = SourceStatus()

    @property
    def builds_elsewhere(self) -> bool:
        """It makes its versions here."""
        return False

    def publish(self, weights: Weights, *, step: int, key: str) -> bool:
        """Make and serve the version of these weights."""
        version = IndexVersion(step, key, self._corpus_digest, self._rows)
        report = self._shard.build(version, weights)
        self._shard.retire([version])
        self._status = replace(self._status, version=version, shards_alive=1)
        if report.encode_seconds:
            rate = report.rows / report.encode_seconds
            self._status = replace(self._status, build_seconds=report.seconds, rows_per_s=rate)
        return True

    def wait(self, timeout_s: float) -> None:
        """Nothing is ever under way."""

    def search(
        self,
        row_ids: Int64,
        *,
        k: int,
        version: IndexVersion | None = None,
        anchors: Sequence[TokenRow] | None = None,
        words: WordQuery | None = None,
        ahead: Int64 | None = None,
    ) -> Hits:
        """Find the k nearest rows of each of B rows, or of their anchors."""
        version = version or self._status.version
        if version is None:
            raise SourceUnavailable("nothing has been published yet")
        if anchors is None:
            queries_BD = self._shard.vectors(version, row_ids)
        else:
            (blocks,) = share_anchors(len(anchors), 1)
            queries_BD = self._shard.embed([[anchors[i] for i in block] for block in blocks])
        if words is None:
            scores_Bk, ids_Bk = self._shard.search(version, queries_BD, k=k)
            return Hits(ids_Bk, scores_Bk, version, queries_BD=queries_BD)
        offers = self._shard.offers(version, queries_BD, k=k, row_ids=row_ids, texts=words.texts)
        (cosines_Bk, ids_Bk), most_B = merge_offers([offers], words=words)
        return Hits(ids_Bk, cosines_Bk, version, queries_BD=queries_BD, most_words_B=most_B)

    def scores(self, hits: Hits, ids: Int64, *, words: WordQuery | None = None) -> Float32:
        """Return the scores of a search's queries with rows."""
        return self._shard.scores(hits, ids, words)

    def vectors(self, ids: Int64, *, version: IndexVersion) -> Float32:
        """Return the vectors of rows."""
        return self._shard.vectors(version, ids)

    def status(self) -> SourceStatus:
        """Return how the source stands."""
        return self._status

    def close(self) -> None:
        """Nothing to let go of."""
