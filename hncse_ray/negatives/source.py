"""Where neighbours come from: the protocol that training speaks, and the facts that travel with an answer."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from hncse_ray.negatives.hits import WordQuery

Int64 = NDArray[np.int64]
Float32 = NDArray[np.float32]
Weights = Mapping[str, NDArray[Any]]
TokenRow = NDArray[np.integer[Any]]

_SMALL_BLOCK, _BLOCKS = 16, 16


class SourceUnavailable(Exception):
    """The source cannot answer now; training goes on without it and asks again later. Never a user's mistake."""


@dataclass(frozen=True)
class BuildReport:
    """What making one version of one shard took."""

    rows: int
    seconds: float
    encode_seconds: float


@dataclass(frozen=True)
class IndexVersion:
    """Which weights and which rows an index was made from; travels with every answer.

    Attributes:
        step: optimiser steps behind the weights.
        key: tells it from all other versions of that step.
        corpus_digest: of the prepared corpus.
        rows: rows of the corpus, N.
    """

    step: int
    key: str
    corpus_digest: str
    rows: int


@dataclass(frozen=True)
class Hits:
    """The k nearest rows of each of B rows, best first, all from one version.

    Attributes:
        ids_Bk: row ids, int64; -1 where there are fewer than k.
        scores_Bk: cosines, float32; -inf where the id is -1. Searched by words too, they do not fall from hit to hit.
        version: what they were found in.
        complete: whether every shard has answered.
        queries_BD: what was searched with, float32; zeros where that is not known, as its shard is away.
        most_words_B: searched by words too: the best BM25 of a row that is not the anchor's own, float32.
    """

    ids_Bk: Int64
    scores_Bk: Float32
    version: IndexVersion
    complete: bool = True
    queries_BD: Float32 | None = None
    most_words_B: Float32 | None = None


@dataclass(frozen=True)
class SourceStatus:
    """How a source stands.

    Attributes:
        version: the one served; None before the first is complete.
        building: whether another is being made.
        shards: how many there are.
        shards_alive: how many of them serve ``version``.
        build_seconds: of the last complete build.
        rows_per_s: rows encoded a second in it, over all shards.
        failed_builds: builds given up so far.
        last_failure: why the last of them was given up.
    """

    version: IndexVersion | None = None
    building: bool = False
    shards: int = 1
    shards_alive: int = 0
    build_seconds: float = 0.0
    rows_per_s: float = 0.0
    failed_builds: int = 0
    last_failure: str = ""


class NegativeSource(Protocol):
    """Serves neighbours of corpus rows while newer versions are made from published weights.

    Every method may be called from several threads.
    """

    @property
    def builds_elsewhere(self) -> bool:
        """Whether a version is made outside of this process, so that :meth:`publish` does not wait for it.

        Then all ranks ask the same source, and the first alone publishes; else each has one of its own.
        """
        ...

    def publish(self, weights: Weights, *, step: int, key: str) -> bool:
        """Have a version made from the weights of a step; one that is served already is not made again.

        Args:
            weights: as :func:`hncse_ray.training.publish.to_arrays` returns them; not changed afterwards.
            step: which they are of.
            key: tells the version from others of that step.

        Returns:
            False if another version is being made: then nothing is done.

        Raises:
            SourceUnavailable: it cannot be reached.
        """
        ...

    def wait(self, timeout_s: float) -> None:
        """Return when no version is being made any more, well or badly, or after ``timeout_s`` seconds.

        Raises:
            SourceUnavailable: it cannot be reached.
        """
        ...

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
        """Find the k nearest rows of each of B rows.

        Args:
            row_ids: the B rows.
            k: hits of each.
            version: in which; default: the one that is served.
            anchors: what is searched with in place of the rows' own vectors: token ids of a query for each row. They
                are embedded by the weights that the source has loaded last, which may be a little newer than the
                version that is searched, as in ANCE (Xiong et al. 2020, arXiv 2007.00808). None: each row is searched
                by its vector in that version, and is its own nearest.
            words: what makes a row near beside its cosine; None: nothing.
            ahead: rows that are searched next by their vectors, which a source may fetch with this answer.

        Raises:
            SourceUnavailable: no version is served, this one is not any more, or nothing answers.
        """
        ...

    def scores(self, hits: Hits, ids: Int64, *, words: WordQuery | None = None) -> Float32:
        """Return the score of each query of a search with given rows ``[B, n]``; -inf where a shard is away.

        Args:
            hits: of that search.
            ids: the n rows.
            words: as they were searched by; then a score is that of :class:`WordQuery`, else the cosine.

        Raises:
            SourceUnavailable: the version is not served any more, or nothing answers.
        """
        ...

    def vectors(self, ids: Int64, *, version: IndexVersion) -> Float32:
        """Return the vectors ``[n, D]`` of rows in a version.

        Raises:
            SourceUnavailable: the version is not served any more, or nothing answers.
        """
        ...

    def status(self) -> SourceStatus:
        """Return how the source stands, or stood a moment ago; cheap enough to be asked at every step.

        Raises:
            SourceUnavailable: it cannot be reached.
        """
        ...

    def close(self) -> None:
        """Let go of what this end holds."""
        ...


def share_anchors(count: int, shards: int) -> list[list[range]]:
    """Share out the positions of anchors over shards, in blocks that are embedded in one call of the encoder each.

    Last bits of a vector hang on what it is encoded with: blocks that know the number of anchors alone, not that of
    the shards, give the same vectors on any number of these.
    """
    n = max(1, min(_BLOCKS, -(-count // _SMALL_BLOCK)))
    blocks = [range(count * i // n, count * (i + 1) // n) for i in range(n)]
    return [blocks[n * s // shards : n * (s + 1) // shards] for s in range(shards)]


def weights_digest(weights: Weights) -> str:
    """Return a digest of named arrays: names, dtypes, shapes and values."""
    digest = hashlib.blake2b(digest_size=16)
    for name in sorted(weights):
        array = weights[name]
        digest.update(f"{name} {array.dtype} {array.shape}".encode())
        digest.update(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)
    return digest.hexdigest()
