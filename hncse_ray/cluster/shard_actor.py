"""The actor of one shard; a plain class that becomes an actor in :mod:`hncse_ray.cluster.pool`.

Whoever looks an actor up by its name imports its class: the coordinator does, which has to be up soon and encodes
nothing. So what a shard computes with is imported where it begins.
"""

from __future__ import annotations

import threading
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from hncse_ray.config import EncoderSettings, NegativesSettings
from hncse_ray.errors import HncseError
from hncse_ray.negatives import BuildReport, Hits, IndexPlan, IndexVersion, Offers, TokenRow, Weights, WordQuery

if TYPE_CHECKING:
    from hncse_ray.cluster.node_corpus import NodeCorpus
    from hncse_ray.negatives.shard import IndexShard


Found = tuple[np.ndarray, np.ndarray] | Offers  # scores and ids; or by words too


# What a shard's index is made by; whom it serves how many of its rows is not its affair.
_OF_A_SHARD = ("encode_batch_size", "gpus_per_shard", "index", "index_dir", "nprobe")


def of_a_shard(negatives: NegativesSettings) -> NegativesSettings:
    """Return the settings that a shard is made from, all others at their defaults."""
    return NegativesSettings().model_copy(update={name: getattr(negatives, name) for name in _OF_A_SHARD})


@dataclass(frozen=True)
class ShardSpec:
    """What a shard actor is made from, again after every restart."""

    negatives: NegativesSettings
    encoder: EncoderSettings
    corpus: NodeCorpus
    plan: IndexPlan
    number: int
    count: int
    threads: int
    use_gpu: bool


class ShardActor:
    """An IndexShard in a process of its own.

    It begins with the corpus, which may have to be prepared on its node; encoder and index follow when they are asked
    for. Concurrency groups: ``search`` (vectors, embed, search, scores), ``build``, ``control`` (the others).
    """

    def __init__(self, spec: ShardSpec) -> None:
        import torch

        torch.set_num_threads(spec.threads)
        self._spec, self._loading = spec, threading.Lock()
        self._loaded: IndexShard | None = None
        self._failure: HncseError | None = None
        try:
            self._corpus = spec.corpus.open()
        except HncseError as error:  # asked for by the driver, which says it; a restart would fail the same way
            self._failure = error

    def corpus_failure(self) -> HncseError | None:
        """Return why this node cannot have the corpus, or None; answers when it is there, whenever that is."""
        return self._failure

    def ready(self) -> HncseError | None:
        """Return why this shard cannot work, or None."""
        try:
            self._shard()
        except HncseError as error:
            return error
        return None

    def _shard(self) -> IndexShard:
        with self._loading:
            if self._failure is not None:
                raise self._failure
            if self._loaded is None:
                import torch

                from hncse_ray.training.shard import build_shard

                spec = self._spec
                try:
                    self._loaded = build_shard(
                        spec.negatives,
                        spec.encoder,
                        self._corpus,
                        plan=spec.plan,
                        number=spec.number,
                        count=spec.count,
                        threads=spec.threads,
                        device=torch.device("cuda", 0) if spec.use_gpu else None,
                        cache_dir=spec.corpus.settings.cache_dir,
                    )
                except HncseError as error:
                    self._failure = error
                    raise
            return self._loaded

    def versions(self) -> list[IndexVersion]:
        """Return the complete versions."""
        return self._shard().versions()

    def build(self, version: IndexVersion, weights: Weights) -> BuildReport:
        """Make a version; see IndexShard."""
        return self._shard().build(version, weights)

    def retire(self, keep: Collection[IndexVersion]) -> None:
        """Drop every version but these."""
        self._shard().retire(keep)

    def rest(self) -> None:
        """Drop every version but those of untouched weights; called behind a build that is under way."""
        if self._loaded is not None:
            self._loaded.retire([version for version in self._loaded.versions() if version.step == 0])

    def vectors(self, version: IndexVersion, ids: np.ndarray) -> np.ndarray:
        """Return the vectors of rows that this shard owns."""
        return self._shard().vectors(version, ids)

    def embed(self, blocks: Sequence[Sequence[TokenRow]]) -> np.ndarray:
        """Embed anchors; see IndexShard."""
        return self._shard().embed(blocks)

    def scores(self, hits: Hits, ids: np.ndarray, words: WordQuery | None) -> np.ndarray:
        """Score rows that this shard owns."""
        return self._shard().scores(hits, ids, words)

    def search(
        self,
        version: IndexVersion,
        queries_QD: np.ndarray,
        k: int,
        words: tuple[np.ndarray, Sequence[str]] | None,
        ahead: np.ndarray,
    ) -> tuple[Found, np.ndarray]:
        """Search this shard's rows, and give vectors that are asked for next in the same answer.

        Args:
            version: of the index.
            queries_QD: what to search with.
            k: hits of each.
            words: rows and texts of the queries, to search by words too.
            ahead: rows that this shard owns.

        Returns:
            The hits, or what is offered by cosine and by words; and the vectors of ``ahead``.
        """
        shard = self._shard()
        found: Found
        if words is None:
            found = shard.search(version, queries_QD, k=k)
        else:
            found = shard.offers(version, queries_QD, k=k, row_ids=words[0], texts=words[1])
        return found, shard.vectors(version, ahead)
