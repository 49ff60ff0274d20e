"""The look-up of one batch: search, selection, and what the hits say of the batch itself."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import compress
from typing import Any

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
    WordQuery,
    rows_too_close,
    score_limit,
    select,
)
from hncse_ray.training.teacher import teacher_scores
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
        teacher_BL: what the index scores the columns of each anchor, see `distillation`; None if it is not asked.
    """

    ids_Bm: Int64
    mask_Bm: Bool
    columns_mask: Bool | None
    vectors_BmD: NDArray[np.float32] | None
    version: IndexVersion | None
    ranks_B: Int64
    dropped_B: Bool | None
    apart_n2: Int64
    teacher_BL: NDArray[np.float32] | None = None


@dataclass(frozen=True)
class LookedUp:
    """The outcome of a look-up, and what it took.

    Attributes:
        number: of the batch.
        row_ids_B: its rows.
        negatives: for the step.
        selection: which they were selected in.
        asked_B: which rows were searched by anchors.
        hits: that it was made in.
        target_ids_B: the row that each anchor belongs to.
        search_s: seconds of the search.
    """

    number: int
    row_ids_B: Int64
    negatives: BatchNegatives
    selection: Selection
    asked_B: Bool
    hits: Hits
    target_ids_B: Int64
    search_s: float


@dataclass(frozen=True)
class _Found:
    hits: Hits
    words: WordQuery | None
    target_ids_B: Int64
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
        taught: whether the objective asks what the index scores the columns.
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
        taught: bool = False,
    ) -> None:
        s = settings.negatives
        self._settings, self._corpus, self._plan = settings, corpus, plan
        self._dimension, self._source, self._views = dimension, source, views
        self._stored, self._taught = s.use == "stored", taught
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
        positive_B = self._positive_scores(found, positive_similarity)
        selection = select(
            hits.ids_Bk,
            hits.scores_Bk,
            row_ids_B=ids_B,
            contents=self._corpus.contents,
            documents=self._corpus.kept_apart(self._settings.corpus),
            positive_score=positive_B,
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
            apart_n2=self._apart(hits, found.target_ids_B, positive_B),
            teacher_BL=self._teacher(found, selection) if self._taught else None,
        )
        return LookedUp(number, ids_B, negatives, selection, found.asked_B, hits, found.target_ids_B, seconds)

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
        words = self._words(lambda: self._corpus.texts(ids_B) if by_anchors else self._corpus.target_texts(ids_B))
        anchors = self._corpus.token_rows(ids_B) if by_anchors else None
        hits = self._source.search(ids_B, k=self._k, anchors=anchors, words=words)
        ranks_B = self._own_ranks(hits, ids_B)
        if not by_anchors:
            ranks_B = np.full_like(ranks_B, -1)
        return _Found(hits, words, ids_B, np.full(len(ids_B), by_anchors), ranks_B, None)

    def _search_views(self, number: int, ids_B: Int64, views: Views) -> _Found:
        """Search with the anchors of pairs, and by the rows themselves where there is none, or none that is kept."""
        answers: list[tuple[Bool, Hits]] = []

        def ask(part_B: Bool, anchors: Sequence[TokenRow] | None, texts: Sequence[str]) -> None:
            if part_B.any():
                words = self._words(lambda: list(compress(texts, part_B)))
                rows = None if anchors is None else list(compress(anchors, part_B))
                hits = self._source.search(ids_B[part_B], k=self._k, anchors=rows, words=words)
                answers.append((part_B, hits))

        r, ranks_B = self._agreement(number), np.full(len(ids_B), -1)
        asked_B = views.paired_B & (r is not None or not self._smoothing)
        ask(asked_B, views.anchors, views.texts)
        for part_B, hits in answers:
            ranks_B[part_B] = self._own_ranks(hits, views.target_ids_B[part_B])
        dropped_B = None
        if r is not None:
            dropped_B = asked_B & ((ranks_B < 0) | (ranks_B >= r))
            if not all(hits.complete for _, hits in answers):  # what a lost shard holds cannot be found
                dropped_B &= ranks_B >= 0
        by_row_B = ~asked_B if dropped_B is None else ~asked_B | dropped_B
        own_texts = self._corpus.texts(ids_B)
        ask(by_row_B | self._smoothing, None, own_texts)
        if len({hits.version for _, hits in answers}) > 1:
            raise SourceUnavailable("the version has given way to the next")
        texts = [own_texts[i] if by_row else views.texts[i] for i, by_row in enumerate(by_row_B)]
        paired_B = views.paired_B if dropped_B is None else views.paired_B & ~dropped_B
        target_ids_B = np.where(paired_B, views.target_ids_B, ids_B)
        return _Found(_joined(answers), self._words(lambda: texts), target_ids_B, asked_B, ranks_B, dropped_B)

    def _words(self, texts: Callable[[], Sequence[str]]) -> WordQuery | None:
        return WordQuery.of(self._settings.negatives, texts)

    def _own_ranks(self, hits: Hits, target_ids_B: Int64) -> Int64:
        return own_ranks(hits.ids_Bk, hits.scores_Bk, self._corpus.target_hashes, target_ids_B)

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

    def _teacher(self, found: _Found, selection: Selection) -> NDArray[np.float32]:
        return teacher_scores(
            self._source, found.hits, words=found.words, target_ids_B=found.target_ids_B, selection=selection
        )

    def _positive_scores(self, found: _Found, positive_similarity: float) -> NDArray[np.float32]:
        """Return the cosine of each anchor and its target: in the index where it was asked by anchors, else the mean.

        A target that is not among the hits is no nearer than the last of them.
        """
        hits, positive_B = found.hits, np.full(len(found.asked_B), positive_similarity, dtype=np.float32)
        asked_B = found.asked_B if found.dropped_B is None else found.asked_B & ~found.dropped_B
        if asked_B.any():
            own_B, last_B = own_scores(hits.ids_Bk, hits.scores_Bk, self._corpus.target_hashes, found.target_ids_B)
            positive_B[asked_B] = np.where(np.isfinite(own_B), own_B, last_B)[asked_B]
        return positive_B

    def _apart(self, hits: Hits, target_ids_B: Int64, positive_B: NDArray[np.float32]) -> Int64:
        """The rows of the batch that may be right for each other's anchors."""
        s, hashes_N = self._settings.negatives, self._corpus.target_hashes
        return rows_too_close(
            hashes_N[hits.ids_Bk],
            hits.scores_Bk,
            batch_keys_B=hashes_N[target_ids_B],
            limit_B=score_limit(s.max_score, s.relative_margin, positive_B) if s.mask_batch else None,
            reciprocal=s.mask_reciprocal,
        )


def _joined(answers: Sequence[tuple[Bool, Hits]]) -> Hits:
    """Put the hits of parts of a batch together; of a row that was asked twice, the later ones count."""
    first = answers[0][1]

    def joined(name: str) -> Any:
        if getattr(first, name) is None:
            return None
        found: NDArray[Any] = np.zeros(
            (len(answers[0][0]), *getattr(first, name).shape[1:]), getattr(first, name).dtype
        )
        for part_B, hits in answers:
            found[part_B] = getattr(hits, name)
        return found

    arrays = {name: joined(name) for name in ("ids_Bk", "scores_Bk", "queries_BD", "most_words_B")}
    return replace(first, complete=all(hits.complete for _, hits in answers), **arrays)


def own_ranks(ids_Bk: Int64, scores_Bk: NDArray[np.float32], target_hashes_N: Int64, row_ids_B: Int64) -> Int64:
    """Return how many hits are nearer than each row's target, or one of equal tokens, ``[B]``; -1 if it is none.

    By their cosines: words say too much, as the target may hold the anchor.
    """
    own_B, _ = own_scores(ids_Bk, scores_Bk, target_hashes_N, row_ids_B)
    return np.where(np.isfinite(own_B), (scores_Bk > own_B[:, None]).sum(axis=1), -1)


def own_scores(
    ids_Bk: Int64, scores_Bk: NDArray[np.float32], target_hashes_N: Int64, row_ids_B: Int64
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Return the score of each row's target, -inf where it is no hit, and of its last hit, ``[B]`` each."""
    own_Bk = (ids_Bk >= 0) & (target_hashes_N[ids_Bk] == target_hashes_N[row_ids_B][:, None])
    last_B = np.where(ids_Bk >= 0, scores_Bk, np.inf).min(axis=1, initial=1)
    return np.where(own_Bk, scores_Bk, -np.inf).max(axis=1, initial=-np.inf), last_B
