"""Global negatives in training: when to publish weights, what to look up ahead, which neighbours to use.

All of it is the first rank's: it talks to the source and selects, and the loop hands the outcome to the others, so
that all ranks see the same neighbours of the same version.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass

import numpy as np
from numpy.typing import NDArray

from hncse_ray.config import Settings
from hncse_ray.corpus import BatchPlan, Corpus
from hncse_ray.errors import DataError, TrainingError
from hncse_ray.negatives import (
    IndexVersion,
    NegativeSource,
    RefreshFacts,
    RefreshRules,
    Selection,
    SelectionRules,
    SourceStatus,
    SourceUnavailable,
    decide,
    select,
)
from hncse_ray.training.checkpoint import TrainState, Weights
from hncse_ray.training.prefetch import Prefetch

_UNUSED_BATCHES = 50

Int64 = NDArray[np.int64]


@dataclass(frozen=True)
class BatchNegatives:
    """The neighbours selected for one global batch; where there are none, the masks say so.

    Attributes:
        ids_Bm: row ids, int64, -1 where not usable.
        mask_Bm: which are usable.
        columns_mask: ``[B, B * m]``, see the objectives; None unless ``negatives.columns`` is ``all``.
        vectors_BmD: of ``stored`` negatives, float32, zero where not usable; None for ``fresh`` ones.
        version: what they come from; None if there are none.
        ranks_B: how many hits of an anchor are nearer than its own target, int64; -1 where that is not among them.
    """

    ids_Bm: NDArray[np.int64]
    mask_Bm: NDArray[np.bool_]
    columns_mask: NDArray[np.bool_] | None
    vectors_BmD: NDArray[np.float32] | None
    version: IndexVersion | None
    ranks_B: NDArray[np.int64]


def check_candidates(settings: Settings, corpus: Corpus) -> None:
    """See that every anchor has as many neighbours as are to be looked up.

    Raises:
        DataError: the corpus is too small.
    """
    if settings.negatives.source != "none" and settings.negatives.candidates >= len(corpus):
        raise DataError(
            f"has {len(corpus)} sentences, so an anchor has {len(corpus) - 1} neighbours, fewer than"
            f" negatives.candidates = {settings.negatives.candidates}",
            f"corpus {settings.corpus.place}",
            "Lower negatives.candidates or give a larger corpus",
        )


@dataclass(frozen=True)
class _LookedUp:
    negatives: BatchNegatives
    selection: Selection
    complete: bool
    search_s: float
    by_anchors: bool


class _Window:
    """What has happened since the last log."""

    def __init__(self) -> None:
        self.missed = 0
        self.version: IndexVersion | None = None
        self._waited = 0
        self._partial = 0
        self._search_s: list[float] = []
        self._removed: Counter[str] = Counter()
        self._slots = 0
        self._scores: list[NDArray[np.float32]] = []
        self._ranks: list[NDArray[np.int64]] = []

    def add(self, looked_up: _LookedUp, waited: bool) -> None:
        """Count one batch that was answered."""
        selection = looked_up.selection
        self.version = looked_up.negatives.version
        self._waited += waited
        self._partial += not looked_up.complete
        self._search_s.append(looked_up.search_s)
        self._removed.update(selection.removed)
        self._slots += selection.mask_Bm.size
        self._scores.append(selection.scores_Bm[selection.mask_Bm])
        if looked_up.by_anchors:
            self._ranks.append(looked_up.negatives.ranks_B)

    def facts(self) -> dict[str, float]:
        """Return shares of batches, counts a batch, milliseconds and cosines, by name."""
        answered = len(self._search_s)
        facts = {"missing": self.missed / max(1, self.missed + answered)}
        if not answered:
            return facts
        scores = np.concatenate(self._scores)
        p50, p99 = np.percentile(self._search_s, [50, 99])
        facts |= {
            "waited": self._waited / answered,
            "partial": self._partial / answered,
            "search_ms_p50": float(p50) * 1e3,
            "search_ms_p99": float(p99) * 1e3,
            "usable": scores.size / self._slots,
            "index_similarity": float(scores.mean()) if scores.size else 0.0,
        }
        if self._ranks:
            ranks = np.concatenate(self._ranks)
            facts |= {"own_found": float((ranks >= 0).mean()), "own_first": float((ranks == 0).mean())}
        return facts | {f"removed_{rule}": count / answered for rule, count in self._removed.items()}


class GlobalNegatives:
    """What the first rank's loop knows of the world outside its batch.

    Args:
        settings: of the run.
        corpus: its sentences.
        plan: its batches.
        dimension: width D of the embeddings.
        source: where neighbours come from.
        notify: takes one line for the user.
    """

    def __init__(
        self,
        settings: Settings,
        *,
        corpus: Corpus,
        plan: BatchPlan,
        dimension: int,
        source: NegativeSource,
        notify: Callable[[str], None],
    ) -> None:
        s = settings.negatives
        self._settings, self._corpus, self._plan, self._notify = settings, corpus, plan, notify
        self._dimension, self._source = dimension, source
        self._per_anchor, self._stored = settings.neighbours_per_anchor, s.use == "stored"
        smoothing = settings.objective.name == "instance_smoothing"
        self._selection_rules = SelectionRules.of(
            s,
            per_anchor=self._per_anchor,
            exclude_batch=not smoothing,  # a smoothing group is not repelled: a sentence of the batch may be in it
            unique=s.columns == "all" and not smoothing,
        )
        self._refresh_rules = RefreshRules(s.refresh_every_steps, s.refresh, s.max_staleness_steps)
        self._sync = s.refresh == "sync"
        check_candidates(settings, corpus)
        self._prefetch: Prefetch[_LookedUp] = Prefetch(s.timeout_s)
        self._published_step: int | None = None
        self._published: Weights | None = None
        self._positive_similarity = 1.0
        self._served, self._in_reach = False, True
        self._failed_builds = self._shards_alive = 0
        self._unused_batches = 0
        self._window = _Window()

    def resume(self, state: TrainState, index_weights: Weights | None) -> None:
        """Take up the version that a checkpoint used: in ``sync`` mode the steps after it must see the same.

        Args:
            state: of the checkpoint.
            index_weights: what that version was made from; None if the checkpoint has none.
        """
        if not self._sync or state.index_version is None or index_weights is None:
            return
        every = self._refresh_rules.every_steps
        if every is not None and state.step % every == 0:
            return  # the next step begins with a new version
        step = int(state.index_version["step"])
        self._positive_similarity = float(state.index_version["positive_similarity"])
        self._publish(index_weights, step, wait=True)

    def refresh(self, state: TrainState, copy_weights: Callable[[], Weights]) -> None:
        """Publish the present weights if they are due, and wait if training must. Before each step."""
        status = self._status()
        facts = RefreshFacts(
            step=state.step,
            published_step=self._published_step,
            served_step=None if status is None or status.version is None else status.version.step,
            building=status is not None and status.building,
            available=status is not None,
        )
        decision = decide(facts, rules=self._refresh_rules)
        if decision.notice:
            self._notify(decision.notice)
        if decision.publish and (decision.wait or not facts.building):
            self._positive_similarity = state.positive_similarity
            self._publish(copy_weights(), state.step, wait=decision.wait)
        elif decision.wait:
            self._wait()

    def take(self, numbers: Sequence[int], state: TrainState) -> list[BatchNegatives]:
        """Return the neighbours of the batches of this step, and look up those of the next.

        Raises:
            TrainingError: selection has left nothing for many batches in a row.
        """
        ahead = numbers[-1] + 1 + self._settings.negatives.prefetch_batches
        if self._sync and (every := self._refresh_rules.every_steps) is not None:
            # What is looked up ahead must not be older than what a resumed run would find.
            per_step = self._settings.train.accumulation_steps
            ahead = min(ahead, (numbers[0] // per_step // every + 1) * every * per_step)
        for number in range(numbers[0], ahead if self._served else 0):
            self._prefetch.start(number, self._look_up)
        taken = [self._take(number) for number in numbers]
        version = taken[-1].version
        if version is not None:
            state.index_version = asdict(version) | {"positive_similarity": self._positive_similarity}
        self._check_used(taken)
        return taken

    def metrics(self, step: int) -> dict[str, float]:
        """Return the means since the last call, by name."""
        status = self._status() or SourceStatus()
        window, self._window = self._window, _Window()
        facts = window.facts()
        version = window.version or status.version
        if version is not None:
            facts |= {"index_step": float(version.step), "index_age_steps": float(step - version.step)}
        facts |= {
            "shards_alive": float(status.shards_alive),
            "build_seconds": status.build_seconds,
            "build_rows_per_s": status.rows_per_s,
            "failed_builds": float(status.failed_builds),
        }
        return {f"negatives/{name}": value for name, value in facts.items()}

    @property
    def index_weights(self) -> Weights | None:
        """What the served version was made from, if a checkpoint must keep it: in ``sync`` mode."""
        return self._published if self._sync else None

    def close(self) -> None:
        """Stop looking ahead and let go of the source."""
        self._prefetch.close()
        self._source.close()

    def _check_used(self, negatives: Sequence[BatchNegatives]) -> None:
        for batch in negatives:
            if batch.version is not None:
                self._unused_batches = 0 if batch.mask_Bm.any() else self._unused_batches + 1
        if self._unused_batches >= _UNUSED_BATCHES:
            raise TrainingError(
                f"the selection rules have left no global negative in {self._unused_batches} batches in a row",
                "negatives",
                "Raise negatives.max_score, lower negatives.skip_hardest, or set negatives.source=none",
            )

    def _status(self) -> SourceStatus | None:
        """Ask how the source stands; None if it cannot say. What it last served may still be searched."""
        try:
            status = self._source.status()
        except SourceUnavailable as error:
            self._out_of_reach(error)
            return None
        self._served = status.version is not None
        if status.shards_alive > self._shards_alive:
            self._prefetch.try_again()
        self._shards_alive = status.shards_alive
        if status.failed_builds > self._failed_builds:
            self._notify(f"a build of the index was given up ({status.last_failure}); the one before stays in use")
        self._failed_builds = status.failed_builds
        return status

    def _publish(self, weights: Weights, step: int, *, wait: bool) -> None:
        arrays = {name: tensor.numpy() for name, tensor in weights.items()}
        try:
            if not self._source.publish(arrays, step=step):
                if not wait:
                    return
                self._wait()
                self._source.publish(arrays, step=step)
        except SourceUnavailable as error:
            self._out_of_reach(error)
            return
        self._in_reach = True
        self._published_step, self._published = step, weights if self._sync else None
        if wait:
            self._wait()

    def _wait(self) -> None:
        """Wait for the version that is being made; what was looked up in the one before is forgotten."""
        try:
            self._source.wait(self._settings.negatives.build_timeout_s)
        except SourceUnavailable as error:
            self._out_of_reach(error)
        self._prefetch.forget()
        self._status()

    def _out_of_reach(self, error: SourceUnavailable) -> None:
        if self._in_reach:
            self._notify(f"the index cannot be renewed for now: {error}")
        self._in_reach = False

    def _take(self, number: int) -> BatchNegatives:
        try:
            looked_up, waited = self._prefetch.take(number)
        except SourceUnavailable as error:
            if self._prefetch.pause():
                self._notify(f"no global negatives for now: {error}; training goes on with those of the batch")
            looked_up, waited = None, True
        if looked_up is None:
            self._window.missed += 1
            return self._nothing(len(self._plan.batch(number)))
        if self._prefetch.returned():
            self._notify("the negative pool answers again")
        limit, version = self._refresh_rules.max_staleness_steps, looked_up.negatives.version
        step = number // self._settings.train.accumulation_steps
        if limit is not None and version is not None and step - version.step > limit:
            self._window.missed += 1  # waiting did not help: rather none than older ones
            return self._nothing(len(looked_up.negatives.ids_Bm))
        self._window.add(looked_up, waited)
        return looked_up.negatives

    def _look_up(self, number: int) -> _LookedUp:
        """Search, select and fetch for one batch, all in one version; in the prefetching thread."""
        try:
            return self._look_up_once(number)
        except SourceUnavailable:  # the version may just have given way to the next
            return self._look_up_once(number)

    def _look_up_once(self, number: int) -> _LookedUp:
        started = time.perf_counter()
        row_ids_B, positive_similarity = self._plan.batch(number), self._positive_similarity
        # Pairs: what is near the anchor, not what is near its target.
        anchors = self._corpus.token_rows(row_ids_B) if self._corpus.has_pairs else None
        k = self._settings.negatives.candidates + 1  # the row itself may be one
        hits = self._source.search(row_ids_B, k=k, anchors=anchors)
        seconds = time.perf_counter() - started
        selection = select(
            hits.ids_Bk,
            hits.scores_Bk,
            row_ids_B=row_ids_B,
            contents=self._corpus.contents,
            documents=self._corpus.kept_apart(self._settings.corpus),
            positive_score=positive_similarity,
            rules=self._selection_rules,
            seed=(self._settings.run.seed, number),
        )
        vectors_BmD = None
        if self._stored:
            vectors_BmD = np.zeros((*selection.ids_Bm.shape, self._dimension), dtype=np.float32)
            if selection.mask_Bm.any():
                ids = selection.ids_Bm[selection.mask_Bm]
                vectors_BmD[selection.mask_Bm] = self._source.vectors(ids, version=hits.version)
        negatives = BatchNegatives(
            selection.ids_Bm,
            selection.mask_Bm,
            selection.columns_mask,
            vectors_BmD,
            hits.version,
            own_ranks(hits.ids_Bk, self._corpus.target_hashes, row_ids_B),
        )
        return _LookedUp(negatives, selection, hits.complete, seconds, anchors is not None)

    def _nothing(self, B: int) -> BatchNegatives:
        m = self._per_anchor
        return BatchNegatives(
            ids_Bm=np.full((B, m), -1, dtype=np.int64),
            mask_Bm=np.zeros((B, m), dtype=bool),
            columns_mask=np.zeros((B, B * m), dtype=bool) if self._selection_rules.unique else None,
            vectors_BmD=np.zeros((B, m, self._dimension), dtype=np.float32) if self._stored else None,
            version=None,
            ranks_B=np.full(B, -1, dtype=np.int64),
        )


def own_ranks(ids_Bk: Int64, target_hashes_N: Int64, row_ids_B: Int64) -> Int64:
    """Return where each row's target, or one of equal tokens, stands among its hits ``[B]``; -1 if it does not."""
    own_Bk = (ids_Bk >= 0) & (target_hashes_N[ids_Bk] == target_hashes_N[row_ids_B][:, None])
    return np.where(own_Bk.any(axis=1), own_Bk.argmax(axis=1), -1)
