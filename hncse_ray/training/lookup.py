"""The look-up of one batch: search, selection, and what the hits say of the batch itself."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from hncse_ray.config import Settings
from hncse_ray.corpus import BatchPlan, Corpus
from hncse_ray.negatives import (
    Hits,
    IndexVersion,
    NegativeSource,
    Selection,
    SelectionRules,
    SourceUnavailable,
    TokenRow,
    rows_too_close,
    score_limit,
    select,
)
from hncse_ray.training.views import BatchViews, Views

Int64 = NDArray[np.int64]
Bool = NDArray[np.bool_]


@dataclass(frozen=True)
class BatchNegatives:
    """What the index knows of one global batch; where it knows nothing, the masks say so.

    Attributes:
        ids_Bm: row ids of the selected neighbours, int64, -1 where not usable.
        mask_Bm: which are usable.
        columns_mask: ``[B, B * m]``, see the objectives; None unless ``negatives.columns`` is ``all``.
        vectors_BmD: of ``stored`` negatives, float32, zero where not usable; None for ``fresh`` ones.
        version: what they come from; None if there are none.
        ranks_B: how many hits of an anchor are nearer than its own target, int64; -1 where that is not among them, or
            the anchor is the target.
        dropped_B: whose pair the index does not agree with; None where it is not asked.
        apart_n2: places in the batch that must not repel each other, two a row.
    """

    ids_Bm: Int64
    mask_Bm: Bool
    columns_mask: Bool | None
    vectors_BmD: NDArray[np.float32] | None
    version: IndexVersion | None
    ranks_B: Int64
    dropped_B: Bool | None
    apart_n2: Int64


@dataclass(frozen=True)
class LookedUp:
    """The outcome of a look-up, and what it took.

    Attributes:
        negatives: for the step.
        selection: which they were selected in.
        asked_B: which rows were searched by anchors.
        complete: whether every shard has answered.
        search_s: seconds of the search.
    """

    negatives: BatchNegatives
    selection: Selection
    asked_B: Bool
    complete: bool
    search_s: float


@dataclass(frozen=True)
class _Found:
    hits: Hits
    asked_B: Bool
    ranks_B: Int64
    dropped_B: Bool | None


class LookUp:
    """Looks batches up; from any thread.

    Args:
        settings: of the run.
        corpus: its rows.
        plan: its batches.
        dimension: width D of the embeddings.
        source: where neighbours come from.
        views: the anchors of the batches, where they are made of passages.
    """

    def __init__(
        self,
        settings: Settings,
        *,
        corpus: Corpus,
        plan: BatchPlan,
        dimension: int,
        source: NegativeSource,
        views: BatchViews | None,
    ) -> None:
        s = settings.negatives
        self._settings, self._corpus, self._plan = settings, corpus, plan
        self._dimension, self._source, self._views = dimension, source, views
        self._stored = s.use == "stored"
        # A smoothing group is near the positive, not near the anchor.
        self._smoothing = smoothing = settings.objective.name == "instance_smoothing"
        self._rules = SelectionRules.of(
            s,
            per_anchor=settings.neighbours_per_anchor,
            exclude_batch=not smoothing,  # a smoothing group is not repelled: a sentence of the batch may be in it
            unique=s.columns == "all" and not smoothing,
        )

    def __call__(self, number: int, *, positive_similarity: float) -> LookedUp:
        """Search, select and fetch for one batch, all in one version.

        Raises:
            SourceUnavailable: the source does not answer, or its version has just given way to the next.
        """
        started = time.perf_counter()
        ids_B = self._plan.batch(number)
        views = None if self._views is None else self._views.of(number)
        found = self._search(ids_B) if views is None else self._search_views(number, ids_B, views)
        hits, seconds = found.hits, time.perf_counter() - started
        selection = select(
            hits.ids_Bk,
            hits.scores_Bk,
            row_ids_B=ids_B,
            contents=self._corpus.contents,
            documents=self._corpus.kept_apart(self._settings.corpus),
            positive_score=positive_similarity,
            rules=self._rules,
            seed=(self._settings.run.seed, number),
        )
        negatives = BatchNegatives(
            ids_Bm=selection.ids_Bm,
            mask_Bm=selection.mask_Bm,
            columns_mask=selection.columns_mask,
            vectors_BmD=self._vectors(selection, hits.version) if self._stored else None,
            version=hits.version,
            ranks_B=found.ranks_B,
            dropped_B=found.dropped_B,
            apart_n2=self._apart(hits, ids_B if views is None else views.target_ids_B, positive_similarity),
        )
        return LookedUp(negatives, selection, found.asked_B, hits.complete, seconds)

    def nothing(self, number: int) -> BatchNegatives:
        """Return what is known of a batch without an answer."""
        B, m = len(self._plan.batch(number)), self._rules.per_anchor
        return BatchNegatives(
            ids_Bm=np.full((B, m), -1, dtype=np.int64),
            mask_Bm=np.zeros((B, m), dtype=bool),
            columns_mask=np.zeros((B, B * m), dtype=bool) if self._rules.unique else None,
            vectors_BmD=np.zeros((B, m, self._dimension), dtype=np.float32) if self._stored else None,
            version=None,
            ranks_B=np.full(B, -1, dtype=np.int64),
            dropped_B=None,
            apart_n2=np.zeros((0, 2), dtype=np.int64),
        )

    @property
    def _k(self) -> int:
        return self._settings.negatives.candidates + 1  # the row itself may be one

    def _search(self, ids_B: Int64) -> _Found:
        """Search by the rows of sentences, and by the anchors of pairs, not by their targets."""
        by_anchors = self._corpus.has_pairs and not self._smoothing
        hits = self._source.search(ids_B, k=self._k, anchors=self._corpus.token_rows(ids_B) if by_anchors else None)
        ranks_B = own_ranks(hits.ids_Bk, self._corpus.target_hashes, ids_B)
        if not by_anchors:
            ranks_B = np.full_like(ranks_B, -1)
        return _Found(hits, np.full(len(ids_B), by_anchors), ranks_B, None)

    def _search_views(self, number: int, ids_B: Int64, views: Views) -> _Found:
        """Search with the anchors of pairs, and by the rows themselves where there is none, or none that is kept."""
        B, answers = len(ids_B), list[Hits]()
        ids_Bk = np.full((B, self._k), -1, dtype=np.int64)
        scores_Bk = np.full((B, self._k), -np.inf, dtype=np.float32)

        def ask(part_B: Bool, anchors: Sequence[TokenRow] | None = None) -> None:
            if part_B.any():
                hits = self._source.search(ids_B[part_B], k=self._k, anchors=anchors)
                ids_Bk[part_B], scores_Bk[part_B] = hits.ids_Bk, hits.scores_Bk
                answers.append(hits)

        r = self._agreement(number)
        asked_B = views.paired_B & (r is not None or not self._smoothing)
        ask(asked_B, [anchor for anchor, asked in zip(views.anchors, asked_B, strict=True) if asked])
        ranks_B = np.where(asked_B, own_ranks(ids_Bk, self._corpus.target_hashes, views.target_ids_B), -1)
        dropped_B = None
        if r is not None:
            dropped_B = asked_B & ((ranks_B < 0) | (ranks_B >= r))
            if not all(hits.complete for hits in answers):  # what a lost shard holds cannot be found
                dropped_B &= ranks_B >= 0
        by_row_B = ~asked_B if dropped_B is None else ~asked_B | dropped_B
        ask(by_row_B | self._smoothing)
        if len({hits.version for hits in answers}) > 1:
            raise SourceUnavailable("the version has given way to the next")
        hits = Hits(ids_Bk, scores_Bk, answers[0].version, all(hits.complete for hits in answers))
        return _Found(hits, asked_B, ranks_B, dropped_B)

    def _agreement(self, number: int) -> int | None:
        """How near the index must find a batch's passages; None: it is not asked."""
        step = number // self._settings.train.accumulation_steps
        return self._settings.views.agreement if step >= self._settings.views.agreement_after_steps else None

    def _vectors(self, selection: Selection, version: IndexVersion) -> NDArray[np.float32]:
        vectors_BmD = np.zeros((*selection.ids_Bm.shape, self._dimension), dtype=np.float32)
        if selection.mask_Bm.any():
            ids = selection.ids_Bm[selection.mask_Bm]
            vectors_BmD[selection.mask_Bm] = self._source.vectors(ids, version=version)
        return vectors_BmD

    def _apart(self, hits: Hits, target_ids_B: Int64, positive_similarity: float) -> Int64:
        """The rows of the batch that may be right for each other's anchors."""
        s, hashes_N = self._settings.negatives, self._corpus.target_hashes
        return rows_too_close(
            hashes_N[hits.ids_Bk],
            hits.scores_Bk,
            batch_keys_B=hashes_N[target_ids_B],
            limit=score_limit(s.max_score, s.relative_margin, positive_similarity) if s.mask_batch else None,
            reciprocal=s.mask_reciprocal,
        )


def own_ranks(ids_Bk: Int64, target_hashes_N: Int64, row_ids_B: Int64) -> Int64:
    """Return where each row's target, or one of equal tokens, stands among its hits ``[B]``; -1 if it does not."""
    own_Bk = (ids_Bk >= 0) & (target_hashes_N[ids_Bk] == target_hashes_N[row_ids_B][:, None])
    return np.where(own_Bk.any(axis=1), own_Bk.argmax(axis=1), -1)
