"""One shard: a slice of the corpus, the encoder that embeds it, and the indexes made of it, one a version."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Collection, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from hncse_ray.negatives.hits import Offers, WordQuery
from hncse_ray.negatives.index import VectorIndex, new_index
from hncse_ray.negatives.index_plan import IndexPlan
from hncse_ray.negatives.lexical import LexicalIndex
from hncse_ray.negatives.source import BuildReport, Float32, Hits, Int64, SourceUnavailable, TokenRow, Weights
from hncse_ray.negatives.source import IndexVersion as Version


class IndexShard:
    """Rows ``number, number + count, number + 2 count, ...`` of a corpus, searchable in every version it holds.

    Searches may come from several threads, also while one other thread builds. A version is complete when it
    appears in :meth:`versions`, and is never changed afterwards, so no answer can mix two.

    Args:
        number: which shard this is, 0 <= number < count.
        count: how many shards share the rows.
        lengths: tokens of each corpus row ``[N]``; rows are encoded sorted by them.
        encode: embeds rows given by their ids, ``[n] -> [n, D]``, unit norm.
        load_weights: hands published weights to the encoder behind ``encode``.
        encode_anchors: embeds token rows by the same encoder; default: nothing is searched by anchors.
        read_words: makes the index of this shard's words, when it is first asked for; default: there is none.
        keys: what rows hold and belong to, ``[n] -> [n, c]``; see LexicalIndex.
        plan: which index; the number of rows is the shard's own.
        device: where the index lives.
        batch_size: rows encoded in one call.
        encode_ahead: calls under way at a time, in threads; 2 on a GPU, where one is prepared while the other computes.
        threads: CPU threads of one search.
        folder: where index kinds that spill to disk may do so.
    """

    def __init__(
        self,
        *,
        number: int,
        count: int,
        lengths: np.ndarray,
        encode: Callable[[Int64], Float32],
        load_weights: Callable[[Weights], None],
        plan: IndexPlan,
        device: torch.device,
        batch_size: int,
        threads: int,
        encode_ahead: int = 1,
        encode_anchors: Callable[[Sequence[TokenRow]], Float32] | None = None,
        read_words: Callable[[], LexicalIndex] | None = None,
        keys: Callable[[Int64], Int64] | None = None,
        folder: Path | None = None,
    ) -> None:
        self.number, self.count = number, count
        self._ids = np.arange(number, len(lengths), count, dtype=np.int64)
        self._order = np.argsort(-np.asarray(lengths)[self._ids], kind="stable")
        self._encode, self._load_weights, self._encode_anchors = encode, load_weights, encode_anchors
        self._read_words, self._keys = read_words, keys
        self._words: LexicalIndex | None = None
        self._reading = threading.Lock()
        self._newest: tuple[Version, Weights] | None = None  # the last complete build, which anchors are embedded by
        self._plan = replace(plan, rows=len(self._ids))  # some shards have one row less than the largest
        self._device, self._folder = device, folder
        self._batch_size, self._threads, self._encode_ahead = batch_size, threads, encode_ahead
        self._indexes: dict[Version, VectorIndex] = {}
        self._building = threading.Lock()
        self._loading = threading.Lock()  # nobody embeds by weights that are half replaced
        self._changing = threading.Lock()  # the table of versions, which a build and a retirement may do at once

    def build(self, version: Version, weights: Weights) -> BuildReport:
        """Encode all rows with the weights and make ``version`` of them, beside those that are held already.

        Raises:
            DataError: the encoder made vectors that are not numbers.
        """
        with self._building:
            started = time.perf_counter()
            if version in self._indexes:
                if self._newest is None or self._newest[0] != version:
                    self._load(weights)
                    self._newest = version, weights
                return BuildReport(len(self._ids), 0.0, 0.0)
            try:
                self._load(weights)
                index = new_index(self._plan, device=self._device, threads=self._threads, folder=self._folder)
                for rows, vectors_nD in self._encoded():
                    index.put(rows, vectors_nD)
                encode_seconds = time.perf_counter() - started
                index.finish()
            except BaseException:
                if self._newest is not None:
                    self._load(self._newest[1])  # those of the failed build may be broken
                raise
            self._newest = version, weights
            with self._changing:
                self._indexes = self._indexes | {version: index}  # replaced, not changed: readers need no lock
            return BuildReport(len(self._ids), time.perf_counter() - started, encode_seconds)

    def _load(self, weights: Weights) -> None:
        with self._loading:
            self._load_weights(weights)

    def _encoded(self) -> Iterator[tuple[Int64, Float32]]:
        """Yield (positions, vectors) of all rows, longest first."""
        parts = [self._order[at : at + self._batch_size] for at in range(0, len(self._order), self._batch_size)]
        if self._encode_ahead == 1:
            yield from ((rows, self._encode(self._ids[rows])) for rows in parts)
            return
        with ThreadPoolExecutor(self._encode_ahead, thread_name_prefix="encode") as pool:
            under_way: deque[Future[Float32]] = deque()
            for number, rows in enumerate(parts):
                while len(under_way) < self._encode_ahead and number + len(under_way) < len(parts):
                    ahead = self._ids[parts[number + len(under_way)]]
                    under_way.append(pool.submit(self._encode, ahead))
                yield rows, under_way.popleft().result()

    def versions(self) -> list[Version]:
        """Return the complete versions, oldest first."""
        return list(self._indexes)

    def retire(self, keep: Collection[Version]) -> None:
        """Drop every version but these; a search that has begun ends well."""
        with self._changing:
            self._indexes = {version: index for version, index in self._indexes.items() if version in keep}

    def vectors(self, version: Version, ids: Int64) -> Float32:
        """Return the vectors ``[n, D]`` of rows that this shard owns, by their corpus ids.

        Raises:
            SourceUnavailable: the version is not held.
        """
        return self._index(version).vectors((ids - self.number) // self.count)

    def embed(self, blocks: Sequence[Sequence[TokenRow]]) -> Float32:
        """Embed anchors by the weights of the newest build, also one that is under way; ``[n, D]``, block by block.

        Raises:
            SourceUnavailable: nothing has been built yet.
        """
        assert self._encode_anchors is not None
        if self._newest is None:
            raise SourceUnavailable(f"shard {self.number} has built nothing yet")
        found = []
        for rows in blocks:
            with self._loading:
                found.append(self._encode_anchors(rows))
        return np.concatenate(found)

    def search(self, version: Version, queries_QD: Float32, *, k: int) -> tuple[Float32, Int64]:
        """Find the k nearest of this shard's rows; scores and corpus ids, ``[Q, k]`` each, best first.

        Raises:
            SourceUnavailable: the version is not held.
        """
        scores_Qk, rows_Qk = self._index(version).search(queries_QD, k, threads=self._threads)
        return scores_Qk, np.where(rows_Qk < 0, -1, rows_Qk * self.count + self.number)

    def offers(self, version: Version, queries_QD: Float32, *, k: int, row_ids: Int64, texts: Sequence[str]) -> Offers:
        """Find the k nearest of this shard's rows by cosine, and the k nearest by words.

        Args:
            version: of the index.
            queries_QD: vectors of the anchors.
            k: how many.
            row_ids: of the anchors; their own rows are not offered by words.
            texts: of the anchors.

        Raises:
            SourceUnavailable: the version is not held.
        """
        index, lexical = self._index(version), self.words()
        assert self._keys is not None
        _, near_Qk = index.search(queries_QD, k, threads=self._threads)
        rows_Q2k = np.concatenate([near_Qk, np.full_like(near_Qk, -1)], axis=1)
        words_Q2k = np.zeros(rows_Q2k.shape, dtype=np.float32)
        for rows_2k, words_2k, keys_c, text in zip(rows_Q2k, words_Q2k, self._keys(row_ids), texts, strict=True):
            scores_n = lexical.scores(text)
            best = lexical.best(scores_n, k, keys_c=keys_c)
            rows_2k[k : k + len(best)] = best
            words_2k[:] = np.where(rows_2k < 0, 0, scores_n[rows_2k])
        cosines_Q2k = index.scores(queries_QD, np.maximum(rows_Q2k, 0))
        nobody_Q2k = rows_Q2k < 0
        return Offers(
            np.where(nobody_Q2k, -1, rows_Q2k * self.count + self.number),
            np.where(nobody_Q2k, np.float32(-np.inf), cosines_Q2k),
            words_Q2k,
        )

    def scores(self, hits: Hits, ids: Int64, words: WordQuery | None) -> Float32:
        """Return the scores of a search's queries with rows that this shard owns ``[Q, n]``; see NegativeSource.

        Raises:
            SourceUnavailable: the version is not held.
        """
        index, rows = self._index(hits.version), (ids - self.number) // self.count
        assert hits.queries_BD is not None
        cosines_Qn = index.scores(hits.queries_BD, np.broadcast_to(rows, (len(hits.queries_BD), len(rows))))
        if words is None:
            return cosines_Qn
        assert hits.most_words_B is not None
        lexical = self.words()
        return words.scores(
            cosines_Qn, np.stack([lexical.scores(text)[rows] for text in words.texts]), hits.most_words_B
        )

    def words(self) -> LexicalIndex:
        """Return the index of this shard's words, which is made now if it has not been."""
        with self._reading:
            if self._words is None:
                assert self._read_words is not None
                self._words = self._read_words()
            return self._words

    def _index(self, version: Version) -> VectorIndex:
        index = self._indexes.get(version)
        if index is None:
            raise SourceUnavailable(f"shard {self.number} does not hold the version of step {version.step}")
        return index
