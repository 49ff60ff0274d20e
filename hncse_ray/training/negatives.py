"""Global negatives in training: when to publish weights, what to look up ahead, which neighbours to use.

The first rank decides which batches are looked up and in which version, and whether the answers are used; each rank
looks its own anchors up. Before a step they tell each other twice, in some hundred bytes and by the process group's
store: the first rank what is to be done, then each rank how that went. No rank is ever left in a collective by a shard
that is lost or slow: a batch has neighbours on all ranks or on none.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import asdict
from functools import partial
from typing import NamedTuple

from hncse_ray.config import Settings
from hncse_ray.corpus import BatchPlan, Corpus
from hncse_ray.errors import DataError, HncseError, TrainingError, counted
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
from hncse_ray.training.distributed import Swap, decide_together, from_first, rank, world_size
from hncse_ray.training.host_copy import HostCopy
from hncse_ray.training.lookup import BatchNegatives, LookedUp, LookUp
from hncse_ray.training.prefetch import Prefetch
from hncse_ray.training.publish import Publisher, to_arrays
from hncse_ray.training.views import BatchViews
from hncse_ray.training.window import Window, window_facts

_UNUSED_BATCHES = 50


def check_candidates(settings: Settings, corpus: Corpus) -> None:
    """See that every anchor has as many neighbours as it is to be given.

    Raises:
        DataError: the corpus is too small.
    """
    rows, least = len(corpus), settings.neighbours_per_anchor + settings.negatives.skip_hardest
    if settings.negatives.source != "none" and least >= rows:
        wanted = "objective.group_size" if settings.objective.name == "instance_smoothing" else "negatives.per_anchor"
        raise DataError(
            f"has {counted(rows, corpus.rows_are.removesuffix('s'))}, so an anchor has {counted(rows - 1, 'neighbour')}"
            f", fewer than the {least} that it is to be given",
            f"corpus {settings.corpus.place}",
            f"Lower {wanted} or give a larger corpus",
        )


class _Order(NamedTuple):
    """What the first rank has all do before a step; small, as it is told at each.

    Attributes:
        begin: batches to look up from now on, in this order.
        forget: whether what has been looked up is not to be used.
        version: what look-ups ask, and the positive similarity that goes with it; None: as before.
        publish: the version that ranks with a source of their own make now; None: they do not.
    """

    begin: tuple[int, ...]
    forget: bool
    version: tuple[IndexVersion, float] | None
    publish: IndexVersion | None


# Of one batch on one rank: whether it is answered, and with anything usable; else why not, or the run's end.
_Outcome = tuple[bool, bool, str | HncseError]
_Verdict = tuple[tuple[bool, ...], _Order]  # which batches of a step are used, and what is to be looked up again


class GlobalNegatives:
    """What a rank's loop knows of the world outside its batch.

    Args:
        settings: of the run.
        corpus: its sentences.
        plan: its batches.
        dimension: width D of the embeddings.
        source: where neighbours come from.
        notify: takes one line for the user; called on the first rank.
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
        notify: Callable[[str], None],
        views: BatchViews | None = None,
        taught: bool = False,
    ) -> None:
        s = settings.negatives
        self._settings, self._source, self._notify = settings, source, notify
        self._refresh_rules = RefreshRules(s.refresh_every_steps, s.refresh, s.max_staleness_steps)
        self._sync = s.refresh == "sync"
        self._ask = LookUp(
            settings, corpus=corpus, plan=plan, dimension=dimension, source=source, views=views, taught=taught
        )
        self._prefetch: Prefetch[LookedUp] = Prefetch(s.timeout_s)
        self._publisher = Publisher(source)
        self._weights: dict[int, Weights] = {}  # in ``sync`` mode, by step: what versions in use were made from
        self._used_step: int | None = None
        self._positive_similarity = 1.0
        self._served: IndexVersion | None = None
        self._told: tuple[IndexVersion, float] | None = None  # what look-ups ask from now on
        self._asked: dict[int, IndexVersion] = {}
        self._publishes: IndexVersion | None = None
        self._begun = self._void = 0  # look-ups begun so far; the first of them that still counts
        self._forget, self._in_reach = False, True
        self._failed_builds = self._shards_alive = 0
        self._unused_batches = 0
        self._window = Window()

    def resume(self, state: TrainState, index_weights: Weights | None) -> None:
        """Resume with the version that a checkpoint used: in ``sync`` mode the steps after it must see the same.

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
        key = str(state.index_version.get("key", step))
        if rank() == 0:
            self._publish(lambda: index_weights, step, key=key, wait=True)
        elif not self._source.builds_elsewhere:
            self._source.publish(to_arrays(index_weights), step=step, key=key)

    def take(
        self, numbers: Sequence[int], state: TrainState, copy_weights: Callable[[], HostCopy]
    ) -> tuple[list[BatchNegatives], float]:
        """Return the neighbours of the batches of this step, and look up those of the next.

        Before that the present weights are published if they are due, and training waits if it must.

        Args:
            numbers: of the batches.
            state: of the run.
            copy_weights: begins to copy the present weights.

        Returns:
            What is known of this rank's part of each batch; and how many seconds training has waited for an index to
            be made.

        Raises:
            TrainingError: selection has left nothing for many batches in a row.
        """
        waited_s = 0.0

        def order() -> _Order:
            nonlocal waited_s
            waited_s = self._refresh(state, copy_weights)
            return self._order(numbers)

        self._obey(from_first(order), copy_weights)
        found = [self._outcome(number) for number in numbers]
        for again in (False, True):
            outcomes = [outcome for _, _, outcome in found]
            used, more = decide_together(outcomes, partial(self._decide, numbers, again=again))
            self._obey(more, copy_weights)
            if not more.begin:
                break
            for i, number in enumerate(numbers):
                if number in more.begin:
                    found[i] = self._outcome(number)
        taken = []
        for number, is_used, (looked_up, waited, _) in zip(numbers, used, found, strict=True):
            self._asked.pop(number, None)
            if is_used and looked_up is not None:
                self._window.add(looked_up, waited)
                taken.append(looked_up.negatives)
            else:
                self._window.missed += 1
                taken.append(self._ask.nothing(number))
        if (version := taken[-1].version) is not None:
            self._used_step = version.step
            state.index_version = asdict(version) | {"positive_similarity": self._positive_similarity}
        return taken, waited_s

    def begun(self, number: int) -> Future[LookedUp] | None:
        """Return this rank's answer to come for a batch; None if it is not looked up yet."""
        return self._prefetch.begun(number)

    def nothing(self, number: int) -> BatchNegatives:
        """Return what is known of a batch without an answer."""
        return self._ask.nothing(number)

    def window(self) -> Window:
        """Return what has happened on this rank since the last call."""
        window, self._window = self._window, Window()
        return window

    def metrics(self, step: int, windows: Sequence[Window]) -> dict[str, float]:
        """Return the means of all ranks' windows, by name; on the first rank."""
        known = self._status()
        status = known or SourceStatus()
        facts = window_facts(windows)
        version = windows[0].version or status.version
        if version is not None:
            facts |= {"index_step": float(version.step), "index_age_steps": float(step - version.step)}
        facts["failed_builds"] = float(status.failed_builds)
        if known is None or known.version is not None:  # before the first version no shard serves one
            facts |= {
                "shards_alive": float(status.shards_alive),
                "build_seconds": status.build_seconds,
                "build_rows_per_s": status.rows_per_s,
            }
        return {f"negatives/{name}": value for name, value in facts.items()}

    def look_up_again(self, number: int) -> LookedUp | None:
        """Look this rank's rows of a batch up in what the index holds now; None if it does not answer."""
        self._status()
        if self._served is None:
            return None
        try:
            return self._ask(number, version=self._served, positive_similarity=self._positive_similarity, swap=None)
        except SourceUnavailable:
            return None

    @property
    def index_weights(self) -> Weights | None:
        """What the version in use was made from, if a checkpoint must keep it: in ``sync`` mode."""
        return None if self._used_step is None else self._weights.get(self._used_step)

    def close(self) -> None:
        """Stop looking ahead and let go of the source."""
        self._void = self._begun
        self._publisher.close()
        self._prefetch.close()
        self._source.close()

    # ---- what the first rank decides

    def _refresh(self, state: TrainState, copy_weights: Callable[[], HostCopy]) -> float:
        """Publish the present weights if they are due, and wait if training must; return the seconds of the wait."""
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

    def _order(self, numbers: Sequence[int]) -> _Order:
        """Say which batches to look up now."""
        ahead = numbers[-1] + 1 + self._settings.negatives.prefetch_batches
        if self._sync and (every := self._refresh_rules.every_steps) is not None:
            # What is looked up ahead must not be older than what a resumed run would find.
            per_step = self._settings.train.accumulation_steps
            ahead = min(ahead, (numbers[0] // per_step // every + 1) * every * per_step)
        if self._forget:
            self._prefetch.forget()
        wanted = self._prefetch.wanted(range(numbers[0], ahead)) if self._served is not None else ()
        return self._told_as(wanted, forget=self._forget)

    def _told_as(self, begin: tuple[int, ...], *, forget: bool) -> _Order:
        """Put an order, with the version if it is another than before."""
        version = None
        if self._served is not None and begin and self._told != (self._served, self._positive_similarity):
            version = (self._served, self._positive_similarity)
        order = _Order(begin, forget, version, self._publishes)
        self._forget, self._publishes = False, None
        return order

    def _decide(self, numbers: Sequence[int], ranks: Sequence[Sequence[_Outcome]], *, again: bool) -> _Verdict:
        """Say which batches are used, from what all ranks have found; or what they are to look up once more.

        Raises:
            HncseError: a look-up has met one, or selection has left nothing for many batches in a row.
        """
        for _, _, why in (outcome for of_rank in ranks for outcome in of_rank):
            if isinstance(why, HncseError):
                raise why
        of_batches = list(zip(*ranks, strict=True))
        failed = [n for n, outcomes in zip(numbers, of_batches, strict=True) if any(why for _, _, why in outcomes)]
        if failed and not again:
            self._status()
            gone = tuple(n for n in failed if self._asked.get(n) != self._served)
            if gone and self._served is not None:  # the version has given way to the next
                return (), self._told_as(gone, forget=False)
        forget = False
        for number in failed:
            why = next(why for _, _, why in of_batches[numbers.index(number)] if why)
            if self._prefetch.pause():
                self._notify(f"no global negatives for now: {why}; training goes on with those of the batch")
            forget = True
        used = []
        for number, outcomes in zip(numbers, of_batches, strict=True):
            answered = not failed and all(is_answered for is_answered, _, _ in outcomes)
            if answered and self._prefetch.returned():
                self._notify("the negative pool answers again")
            used.append(answered and self._is_recent(number))
            if used[-1]:
                self._unused_batches = 0 if any(usable for _, usable, _ in outcomes) else self._unused_batches + 1
        if self._unused_batches >= _UNUSED_BATCHES:
            raise TrainingError(
                f"the selection rules have left no global negative in {self._unused_batches} batches in a row",
                "negatives",
                "Raise negatives.max_score, lower negatives.skip_hardest, or set negatives.source=none",
            )
        return tuple(used), _Order((), forget, None, None)

    def _is_recent(self, number: int) -> bool:
        """Whether the version is not older than allowed: if waiting did not help, rather none than older ones."""
        limit, step = self._refresh_rules.max_staleness_steps, number // self._settings.train.accumulation_steps
        return limit is None or step - self._asked[number].step <= limit

    # ---- what every rank does

    def _obey(self, order: _Order, copy_weights: Callable[[], HostCopy]) -> None:
        """Do what the first rank has said."""
        if order.forget:
            self._prefetch.forget()
            self._void = self._begun
        if order.version is not None:
            self._told = order.version
        if order.publish is not None and rank() != 0:
            weights = to_arrays(copy_weights().wait())
            self._source.publish(weights, step=order.publish.step, key=order.publish.key)
        for number in order.begin:
            assert self._told is not None
            self._asked[number] = self._told[0]
            self._prefetch.start(number, partial(self._look_up, *self._told, serial=self._begun))
            self._begun += 1

    def _outcome(self, number: int) -> tuple[LookedUp | None, bool, _Outcome]:
        """Wait for this rank's answer; return it, whether it was waited for, and what to tell the others."""
        try:
            looked_up, waited = self._prefetch.take(number)
        except SourceUnavailable as error:
            return None, True, (False, False, str(error) or "it does not answer")
        except HncseError as error:
            return None, True, (False, False, error)
        return looked_up, waited, (looked_up is not None, looked_up is not None and _any_usable(looked_up), "")

    def _look_up(self, version: IndexVersion, positive_similarity: float, number: int, *, serial: int) -> LookedUp:
        """Look one batch up, in the prefetching thread."""
        swap = Swap(f"{serial}", timeout_s=self._settings.negatives.timeout_s, over=lambda: serial < self._void)
        return self._ask(number, version=version, positive_similarity=positive_similarity, swap=swap)

    def _status(self) -> SourceStatus | None:
        """Ask how the source stands; None if it cannot say. What it last served may still be searched."""
        try:
            status = self._source.status()
        except SourceUnavailable as error:
            self._out_of_reach(error)
            return None
        self._served = status.version
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
            if self._sync:  # those in use are kept too: the build may fail
                in_use = {self._used_step, None if self._served is None else self._served.step}
                self._weights = {s: kept for s, kept in self._weights.items() if s in in_use} | {step: weights()}
            self._wait()

    def _hear(self, *, wait: bool) -> bool | None:
        """Hear whether weights were taken, once that is known; None if it is not, or the source is out of reach."""
        try:
            taken = self._publisher.hear(wait=wait)
        except SourceUnavailable as error:
            self._out_of_reach(error)
            return None
        self._in_reach |= bool(taken)
        if taken and not self._source.builds_elsewhere and world_size() > 1:  # the others make it as well
            self._publishes = self._source.status().version
        return taken

    def _wait(self) -> None:
        """Wait for the version that is being made; what was looked up in the one before is forgotten."""
        self._hear(wait=True)
        try:
            self._source.wait(self._settings.negatives.build_timeout_s)
        except SourceUnavailable as error:
            self._out_of_reach(error)
        self._forget = True
        self._status()

    def _out_of_reach(self, error: SourceUnavailable) -> None:
        if self._in_reach:
            self._notify(f"the index cannot be renewed for now: {error}")
        self._in_reach = False


def _any_usable(looked_up: LookedUp) -> bool:
    return bool(looked_up.selection.mask_Bm.any())
