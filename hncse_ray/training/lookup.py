"""The look-up of a rank's part of a batch: search, selection, and what the hits say of the batch itself.

Shape letters: b anchors of this rank, B of the whole batch, k hits, m negatives.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import compress
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hncse_ray.config import Settings
from hncse_ray.corpus import BatchPlan, Corpus, rank_slice
from hncse_ray.negatives import (
    Hits,
    IndexVersion,
    NearHits,
    NegativeSource,
    Selection,
    SelectionRules,
    SourceUnavailable,
    TokenRow,
    WordQuery,
    near_hits,
    score_limit,
    select,
)
from hncse_ray.training.distributed import Swap, rank, world_size
from hncse_ray.training.teacher import teacher_scores
from hncse_ray.training.views import BatchViews, Views

Int64 = NDArray[np.int64]
Bool = NDArray[np.bool_]


@dataclass(frozen=True)
class BatchNegatives:
    """What the index knows of this rank's part of a batch; where it knows nothing, the masks say so.

    Attributes:
        ids_bm: row ids of the selected neighbours, int64, -1 where not usable.
        mask_bm: which are usable.
        vectors_bmD: of ``stored`` negatives, float32, zero where not usable; None for ``fresh`` ones.
        version: what they come from; None if there are none.
        ranks_b: how many hits of an anchor are nearer than its own target, int64; -1 where that is not among them, or
            the anchor is the target.
        dropped_b: whose pair the index does not agree with; None where it is not asked.
        barred_bk: row ids of hits that are too close to an anchor, -1 elsewhere.
        near: what the ranks tell each other to know which rows of the batch the index keeps apart; None if it is not
            asked.
        teacher_bL: what the index scores the columns of each anchor, see `distillation`; None if it is not asked.
    """

    ids_bm: Int64
    mask_bm: Bool
    vectors_bmD: NDArray[np.float32] | None
    version: IndexVersion | None
    ranks_b: Int64
    dropped_b: Bool | None
    barred_bk: Int64
    near: NearHits | None = None
    teacher_bL: NDArray[np.float32] | None = None


@dataclass(frozen=True)
class LookedUp:
    """The outcome of a look-up, and what it took.

    Attributes:
        number: of the batch.
        row_ids_b: its rows.
        negatives: for the step.
        selection: which they were selected in.
        asked_b: which rows were searched by anchors.
        hits: that it was made in.
        target_ids_b: the row that each anchor belongs to.
        search_s: seconds of the search.
    """

    number: int
    row_ids_b: Int64
    negatives: BatchNegatives
    selection: Selection
    asked_b: Bool
    hits: Hits
    target_ids_b: Int64
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
    """Looks up this rank's part of batches; from any thread.

    Args:
        settings: of the run.
        corpus: its rows.
        plan: its batches.
        dimension: width D of the embeddings.
        source: where neighbours come from.
        views: the anchors of this rank's rows, where they are made of passages.
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
        )

    def __call__(
        self, number: int, *, version: IndexVersion, positive_similarity: float, swap: Swap | None
    ) -> LookedUp:
        """Search, select and fetch for one batch, all in one version.

        Args:
            number: of the batch.
            version: what all ranks ask.
            positive_similarity: the mean cosine of positives when its weights were handed over.
            swap: tells the other ranks what a teacher must know of this one's part, and learns of theirs; None: nobody
                teaches.

        Raises:
            SourceUnavailable: the source does not answer, or the version has given way to the next.
        """
        try:
            try:
                found, selection, vectors_bmD, seconds = self._searched(number, version, positive_similarity)
            except SourceUnavailable:  # a shard may just have been lost: the others answer
                found, selection, vectors_bmD, seconds = self._searched(number, version, positive_similarity)
        except BaseException:
            if self._taught and swap is not None:
                swap.give_up()
            raise
        hits, positive_b = found.hits, self._positive_scores(found, positive_similarity)
        negatives = BatchNegatives(
            ids_bm=selection.ids_Bm,
            mask_bm=selection.mask_Bm,
            vectors_bmD=vectors_bmD,
            version=version,
            ranks_b=found.ranks_B,
            dropped_b=found.dropped_B,
            barred_bk=selection.barred_Bk,
            near=self._near(hits, found.target_ids_B, positive_b),
            teacher_bL=self._teacher(found, selection, swap) if self._taught and swap is not None else None,
        )
        ids_b = rank_slice(self._plan.batch(number), rank(), world_size())
        return LookedUp(number, ids_b, negatives, selection, found.asked_B, hits, found.target_ids_B, seconds)

    def _searched(
        self, number: int, version: IndexVersion, positive_similarity: float
    ) -> tuple[_Found, Selection, NDArray[np.float32] | None, float]:
        started = time.perf_counter()
        ids_B = self._plan.batch(number)
        own_b = rank_slice(np.arange(len(ids_B)), rank(), world_size())
        ids_b = ids_B[own_b]
        views = None if self._views is None else self._views.of(number)
        if views is None:
            found = self._search(number, ids_b, version)
        else:
            found = self._search_views(number, ids_b, views, version)
        seconds = time.perf_counter() - started
        selection = select(
            found.hits.ids_Bk,
            found.hits.scores_Bk,
            row_ids_B=ids_b,
            batch_ids=ids_B,
            first=int(own_b[0]),
            contents=self._corpus.contents,
            documents=self._corpus.kept_apart(self._settings.corpus),
            positive_score=self._positive_scores(found, positive_similarity),
            rules=self._rules,
            seed=(self._settings.run.seed, number),
        )
        return found, selection, self._vectors(selection, version) if self._stored else None, seconds

    def nothing(self, number: int) -> BatchNegatives:
        """Return what is known of a batch without an answer."""
        b, m = len(rank_slice(self._plan.batch(number), rank(), world_size())), self._rules.per_anchor
        nobody_bk = np.zeros((b, self._k), dtype=bool)
        near = NearHits(np.full((b, self._k), -1), nobody_bk, nobody_bk, np.full(b, -1))
        return BatchNegatives(
            ids_bm=np.full((b, m), -1, dtype=np.int64),
            mask_bm=np.zeros((b, m), dtype=bool),
            vectors_bmD=np.zeros((b, m, self._dimension), dtype=np.float32) if self._stored else None,
            version=None,
            ranks_b=np.full(b, -1, dtype=np.int64),
            dropped_b=None,
            barred_bk=np.full((b, self._k), -1, dtype=np.int64),
            near=near if self._keeps_apart else None,
        )

    @property
    def _keeps_apart(self) -> bool:
        return self._settings.negatives.mask_batch or self._settings.negatives.mask_reciprocal is not None

    @property
    def _k(self) -> int:
        return self._settings.negatives.candidates + 1  # the row itself may be one

    def _search(self, number: int, ids_B: Int64, version: IndexVersion) -> _Found:
        """Search by the rows of sentences, and by the anchors of pairs, not by their targets."""
        by_anchors = self._corpus.has_pairs and not self._smoothing
        words = self._words(lambda: self._corpus.texts(ids_B) if by_anchors else self._corpus.target_texts(ids_B))
        anchors = self._corpus.token_rows(ids_B) if by_anchors else None
        ahead = None if by_anchors else rank_slice(self._plan.batch(number + 1), rank(), world_size())
        hits = self._source.search(ids_B, k=self._k, version=version, anchors=anchors, words=words, ahead=ahead)
        ranks_B = self._own_ranks(hits, ids_B)
        if not by_anchors:
            ranks_B = np.full_like(ranks_B, -1)
        return _Found(hits, words, ids_B, np.full(len(ids_B), by_anchors), ranks_B, None)

    def _search_views(self, number: int, ids_B: Int64, views: Views, version: IndexVersion) -> _Found:
        """Search with the anchors of pairs, and by the rows themselves where there is none, or none that is kept."""
        answers: list[tuple[Bool, Hits]] = []

        def ask(part_B: Bool, anchors: Sequence[TokenRow] | None, texts: Sequence[str]) -> None:
            if part_B.any():
                words = self._words(lambda: list(compress(texts, part_B)))
                rows = None if anchors is None else list(compress(anchors, part_B))
                hits = self._source.search(ids_B[part_B], k=self._k, version=version, anchors=rows, words=words)
                answers.append((part_B, hits))

        r, ranks_B = self._agreement(number), np.full(len(ids_B), -1)
        asked_B = views.paired_b & (r is not None or not self._smoothing)
        ask(asked_B, views.anchors, views.texts)
        for part_B, hits in answers:
            ranks_B[part_B] = self._own_ranks(hits, views.target_ids_b[part_B])
        dropped_B = None
        if r is not None:
            dropped_B = asked_B & ((ranks_B < 0) | (ranks_B >= r))
            if not all(hits.complete for _, hits in answers):  # what a lost shard holds cannot be found
                dropped_B &= ranks_B >= 0
        by_row_B = ~asked_B if dropped_B is None else ~asked_B | dropped_B
        own_texts = self._corpus.texts(ids_B)
        ask(by_row_B | self._smoothing, None, own_texts)
        texts = [own_texts[i] if by_row else views.texts[i] for i, by_row in enumerate(by_row_B)]
        paired_B = views.paired_b if dropped_B is None else views.paired_b & ~dropped_B
        target_ids_B = np.where(paired_B, views.target_ids_b, ids_B)
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

    def _teacher(self, found: _Found, selection: Selection, swap: Swap) -> NDArray[np.float32]:
        """Ask for the scores of the columns, which other ranks have a part of."""
        everyone = self._settings.negatives.columns == "all"
        try:
            parts = swap((found.target_ids_B, selection.ids_Bm if everyone else selection.ids_Bm[:0]))
        except TimeoutError as error:
            raise SourceUnavailable(str(error)) from None
        columns = np.concatenate([*(targets_b for targets_b, _ in parts), *(ids_bm.ravel() for _, ids_bm in parts)])
        own_bm = None if everyone else selection.ids_Bm
        return teacher_scores(self._source, found.hits, words=found.words, columns=columns, own_bm=own_bm)

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

    def _near(self, hits: Hits, target_ids_B: Int64, positive_B: NDArray[np.float32]) -> NearHits | None:
        """What decides which rows of the batch may be right for each other's anchors."""
        if not self._keeps_apart:
            return None
        s, hashes_N = self._settings.negatives, self._corpus.target_hashes
        return near_hits(
            hashes_N[hits.ids_Bk],
            hits.scores_Bk,
            own_B=hashes_N[target_ids_B],
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
