"""Global negatives in training: when to publish weights, what to look up ahead, which neighbours to use.

All of it is the first rank's: it talks to the source and selects, and the loop hands the outcome to the others, so
that all ranks see the same neighbours of the same version.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict

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
    SourceStatus,
    SourceUnavailable,
    decide,
)
from hncse_ray.training.checkpoint import TrainState, Weights
from hncse_ray.training.host_copy import HostCopy
from hncse_ray.training.lookup import BatchNegatives, LookedUp, LookUp
from hncse_ray.training.prefetch import Prefetch
from hncse_ray.training.publish import Publisher
from hncse_ray.training.views import BatchViews

_UNUSED_BATCHES = 50


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
        self._apart = 0

    def add(self, looked_up: LookedUp, waited: bool) -> None:
        """Count one batch that was answered."""
        selection = looked_up.selection
        self.version = looked_up.negatives.version
        self._waited += waited
        self._partial += not looked_up.hits.complete
        self._search_s.append(looked_up.search_s)
        self._removed.update(selection.removed)
        self._slots += selection.mask_Bm.size
        self._scores.append(selection.scores_Bm[selection.mask_Bm])
        self._ranks.append(looked_up.negatives.ranks_B[looked_up.asked_B])
        self._apart += len(looked_up.negatives.apart_n2)

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
            "masked_in_batch": self._apart / answered,
        }
        if len(ranks := np.concatenate(self._ranks)):
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
        notify: Callable[[str], None],
        views: BatchViews | None = None,
        taught: bool = False,
    ) -> None:
        s = settings.negatives
        self._settings, self._source, self._notify = settings, source, notify
        self._refresh_rules = RefreshRules(s.refresh_every_steps, s.refresh, s.max_staleness_steps)
        self._sync = s.refresh == "sync"
        check_candidates(settings, corpus)
        self._ask = LookUp(
            settings, corpus=corpus, plan=plan, dimension=dimension, source=source, views=views, taught=taught
        )
        self._prefetch: Prefetch[LookedUp] = Prefetch(s.timeout_s)
        self._publisher = Publisher(source)
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
        self._publish(lambda: index_weights, step, key=state.index_version.get("key"), wait=True)

    def refresh(self, state: TrainState, copy_weights: Callable[[], HostCopy]) -> float:
        """Publish the present weights if they are due, and wait if training must. Before each step.

        Returns:
            How many seconds training has waited for an index to be made.
        """
        self._hear(wait=False)
        status = self._status()
        facts = RefreshFacts(
            step=state.step,
            published_step=self._publisher.step,
            served_step=None if status is None or status.version is None else status.version.step,
            building=self._publisher.under_way or (status is not None and status.building),
            available=status is not None,
        )
        decision = decide(facts, rules=self._refresh_rules)
        if decision.notice:
            self._notify(decision.notice)
        if decision.publish and (decision.wait or not facts.building):
            self._positive_similarity = state.positive_similarity
            copy = copy_weights()
            if decision.wait:
                copy.wait()  # for the device, so for steps that are training
            started = time.perf_counter()
            self._publish(copy.wait, state.step, wait=decision.wait)
        else:
            started = time.perf_counter()
            if decision.wait:
                self._wait()
        return time.perf_counter() - started

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

    def look_up_again(self, number: int) -> LookedUp | None:
        """Look the rows of a batch up in what the index holds now; None if it does not answer."""
        try:
            return self._look_up(number)
        except SourceUnavailable:
            return None

    @property
    def index_weights(self) -> Weights | None:
        """What the served version was made from, if a checkpoint must keep it: in ``sync`` mode."""
        return self._published if self._sync else None

    def close(self) -> None:
        """Stop looking ahead and let go of the source."""
        self._publisher.close()
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

    def _publish(self, weights: Callable[[], Weights], step: int, *, key: str | None = None, wait: bool) -> None:
        self._hear(wait=wait)  # of the last; where training does not wait, that is heard of already
        self._publisher.begin(weights, step=step, key=key)
        taken = self._hear(wait=wait)
        if not wait:
            return
        if taken is False:  # another is being made
            self._wait()
            self._publisher.begin(weights, step=step, key=key)
            taken = self._hear(wait=True)
        if taken:
            self._published = weights() if self._sync else None
            self._wait()

    def _hear(self, *, wait: bool) -> bool | None:
        """Hear whether weights were taken, once that is known; None if it is not, or the source is out of reach."""
        try:
            taken = self._publisher.hear(wait=wait)
        except SourceUnavailable as error:
            self._out_of_reach(error)
            return None
        self._in_reach |= bool(taken)
        return taken

    def _wait(self) -> None:
        """Wait for the version that is being made; what was looked up in the one before is forgotten."""
        self._hear(wait=True)
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
            return self._ask.nothing(number)
        if self._prefetch.returned():
            self._notify("the negative pool answers again")
        limit, version = self._refresh_rules.max_staleness_steps, looked_up.negatives.version
        step = number // self._settings.train.accumulation_steps
        if limit is not None and version is not None and step - version.step > limit:
            self._window.missed += 1  # waiting did not help: rather none than older ones
            return self._ask.nothing(number)
        self._window.add(looked_up, waited)
        return looked_up.negatives

    def _look_up(self, number: int) -> LookedUp:
        """Look one batch up, in the prefetching thread."""
        try:
            return self._ask(number, positive_similarity=self._positive_similarity)
        except SourceUnavailable:  # the version may just have given way to the next
            return self._ask(number, positive_similarity=self._positive_similarity)
