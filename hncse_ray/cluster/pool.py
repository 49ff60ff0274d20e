"""The negative pool as training and mining use it: launched before them, asked by a client, gone after them."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import ray
from ray.exceptions import RayError, RayTaskError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from hncse_ray.cluster.coordinator import PoolCoordinator, PoolState
from hncse_ray.cluster.resources import PoolPlan
from hncse_ray.cluster.shards import KeptShards, shard_actors
from hncse_ray.config import Settings
from hncse_ray.corpus import Corpus
from hncse_ray.errors import ClusterError, first_line
from hncse_ray.negatives import (
    Hits,
    IndexVersion,
    SourceStatus,
    SourceUnavailable,
    TokenRow,
    Weights,
    WordQuery,
    merge_hits,
    merge_offers,
    share_anchors,
)

logger = logging.getLogger(__name__)

_START_TIMEOUT_S = 300.0  # to load an encoder, once the corpus is there
POLL_S, LONGEST_POLL_S = 0.25, 2.0  # of the rank that decides, and the longest of any other
_LONG_START_S = 30.0
_CONTROL_TIMEOUT_S = 10.0
_PUBLISH_TIMEOUT_S = 120.0


@dataclass(frozen=True)
class PoolHandles:
    """Where the pool's actors are; travels to whoever asks it."""

    coordinator: Any
    shards: tuple[Any, ...]

    def wait_until_ready(self, notify: Callable[[str], None] = logger.info) -> None:
        """Wait until all shards have the corpus, which may have to be prepared, and then until they can be asked.

        Args:
            notify: told what is waited for, if it takes long.

        Raises:
            ClusterError: the actors do not come up.
            HncseError: why a shard cannot work.
        """
        shards = self.shards
        try:
            calls = [s.corpus_failure.options(concurrency_group="control").remote() for s in shards]
            if ray.wait(calls, num_returns=len(calls), timeout=_LONG_START_S)[1]:
                notify("waiting for the index's shards: they start, and prepare the corpus where their node lacks it")
            failures = ray.get(calls)
            if not any(failures):
                calls = [s.ready.options(concurrency_group="control").remote() for s in shards]
                failures = ray.get(calls, timeout=_START_TIMEOUT_S)
        except RayError as error:
            raise ClusterError(f"the shards of the negative pool did not come up ({first_line(error)})",
                               "negatives") from error  # fmt: skip
        for failure in failures:
            if failure is not None:
                raise failure


@contextmanager
def negative_pool(
    settings: Settings, plan: PoolPlan, corpus: Corpus, folder: Path, *, kept: KeptShards | None = None
) -> Iterator[PoolHandles]:
    """Reserve the pool's resources, start its actors and yield their handles; on leaving all of it is gone.

    The actors come up meanwhile; see :meth:`PoolHandles.wait_until_ready`.

    Args:
        settings: of the run.
        plan: how many shards there are and what each gets; see :func:`plan_pool`.
        corpus: the rows.
        folder: where published weights are kept.
        kept: has shards of a run before, perhaps, and gets those of this one; default: they end with it.

    Raises:
        ClusterError: the resources are not free.
    """
    with shard_actors(settings, plan, corpus, kept) as shards:
        # By name: handles among its arguments might be gone from the object store when it has to be restarted.
        here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
        options = {"num_cpus": 0, "max_restarts": -1, "scheduling_strategy": here}
        coordinator = ray.remote(PoolCoordinator).options(**options).remote(
            shards.names,
            folder=str(folder.absolute()),
            corpus_digest=corpus.digest,
            rows=len(corpus),
            build_timeout_s=settings.negatives.build_timeout_s,
        )  # fmt: skip
        try:
            yield PoolHandles(coordinator, shards.actors)
        finally:
            ray.kill(coordinator, no_restart=True)


class PoolClient:
    """Asks the pool: owners give the rows' vectors, all shards search, the answers are merged. See NegativeSource.

    A shard is called once a search where the search before has said which rows come next: it gives their vectors with
    its hits. Else it is called twice: first for vectors, or to embed its share of anchors. The vectors of selected
    neighbours are a call of their own: they are selected from the hits of all shards, and would come with these only if
    each shard sent those of all its k hits, k times the shards for every one that is selected.

    A thread keeps the pool's state at hand, so that asking costs nothing.

    Args:
        handles: the pool's actors.
        timeout_s: a shard that has not answered by then is left out.
        poll_s: seconds between two looks at the pool's state.
    """

    def __init__(self, handles: PoolHandles, *, timeout_s: float, poll_s: float = POLL_S) -> None:
        self._coordinator, self._shards, self._timeout_s = handles.coordinator, handles.shards, timeout_s
        self._state = PoolState(SourceStatus(shards=len(handles.shards)), ())
        self._unreachable, self._poll_s = "", poll_s
        self._closed = threading.Event()
        self._ahead: tuple[IndexVersion, np.ndarray, np.ndarray] | None = None  # rows and vectors, all of them known
        self._poll()
        self._polling = threading.Thread(target=self._keep_polling, name="pool-state", daemon=True)
        self._polling.start()

    @property
    def builds_elsewhere(self) -> bool:
        """The shards make the versions."""
        return True

    def publish(self, weights: Weights, *, step: int, key: str) -> bool:
        """Put weights into the object store of this node, from where the shards fetch them; returns when that is done.

        The coordinator gets a reference to them.
        """

        def call() -> Any:
            return self._coordinator.publish.remote([ray.put(dict(weights))], step, key)

        accepted = self._control(call, _PUBLISH_TIMEOUT_S)
        self._poll()
        return bool(accepted)

    def wait(self, timeout_s: float) -> None:
        """Wait until no version is being made."""
        deadline = time.monotonic() + timeout_s
        while (left := deadline - time.monotonic()) > 0:
            slice_s = min(left, _CONTROL_TIMEOUT_S)
            if self._control(partial(self._coordinator.wait.remote, slice_s), 2 * _CONTROL_TIMEOUT_S):
                break
        self._poll()

    def search(
        self,
        row_ids: np.ndarray,
        *,
        k: int,
        version: IndexVersion | None = None,
        anchors: Sequence[TokenRow] | None = None,
        words: WordQuery | None = None,
        ahead: np.ndarray | None = None,
    ) -> Hits:
        """Find the k nearest rows of each of B rows, or of their anchors."""
        if version is not None and version != self._state.status.version:
            self._poll()  # who asks may have heard of the version before this client has
        state = self._state
        version = version or state.status.version
        if version is None or not state.serving:
            self._poll()  # whoever asks again should find what there is then
            raise SourceUnavailable(self._unreachable or "no shard serves an index")
        if anchors is None:
            queries_BD, known_B, failed = self._row_vectors(row_ids, version, state.serving)
        else:
            queries_BD, known_B, failed = self._embed(anchors, state.serving)
        asked = [s for s in state.serving if s not in failed]
        shared: list[Any] = [queries_BD[known_B], None]
        if words is not None:
            shared[1] = row_ids[known_B], [text for text, known in zip(words.texts, known_B, strict=True) if known]
        queries, of_words = (ray.put(x) if len(asked) > 1 and x is not None else x for x in shared)
        next_ids = np.zeros(0, dtype=np.int64) if ahead is None else ahead
        owned = self._owned(next_ids, asked)
        answers = self._ask(
            {s: self._searching(s, "search").remote(version, queries, k, of_words, next_ids[owned[s]]) for s in asked}
        )
        if ahead is not None:
            self._keep_ahead(version, next_ids, owned, {s: vectors_nD for s, (_, vectors_nD) in answers.items()})
        found, most_B = [found for found, _ in answers.values()], None
        ids_Bk = np.full((len(row_ids), k), -1, dtype=np.int64)
        scores_Bk = np.full((len(row_ids), k), -np.inf, dtype=np.float32)
        if words is None:
            scores_Bk[known_B], ids_Bk[known_B] = merge_hits(*zip(*found, strict=True), k=k)
        else:
            most_B = np.zeros(len(row_ids), dtype=np.float32)
            hits, most_B[known_B] = merge_offers(found, words=words)
            scores_Bk[known_B], ids_Bk[known_B] = hits
        complete = len(answers) == len(self._shards) and bool(known_B.all())
        return Hits(ids_Bk, scores_Bk, version, complete, queries_BD, most_B)

    def scores(self, hits: Hits, ids: np.ndarray, *, words: WordQuery | None = None) -> np.ndarray:
        """Return the scores of a search's queries with rows, from the shards that own these."""
        serving = self._state.serving
        owned = self._owned(ids, serving)
        given = [ray.put(x) if len(serving) > 1 else x for x in (hits, words)]
        calls = {
            s: self._searching(s, "scores").remote(given[0], ids[at], given[1]) for s, at in owned.items() if len(at)
        }
        scores_Bn = np.full((len(hits.ids_Bk), len(ids)), -np.inf, dtype=np.float32)
        for s, part_Bn in self._ask(calls).items():
            scores_Bn[:, owned[s]] = part_Bn
        assert hits.queries_BD is not None
        scores_Bn[~hits.queries_BD.any(axis=1)] = -np.inf
        return scores_Bn

    def vectors(self, ids: np.ndarray, *, version: IndexVersion) -> np.ndarray:
        """Return the vectors of rows; all of them or none."""
        vectors_nD, known_n, _ = self._gather_vectors(ids, version, self._state.serving)
        if not known_n.all():
            raise SourceUnavailable("a shard was lost before its vectors were fetched")
        return vectors_nD

    def status(self) -> SourceStatus:
        """Return how the pool stood a moment ago."""
        if self._unreachable:
            raise SourceUnavailable(self._unreachable)
        return self._state.status

    def close(self) -> None:
        """Stop following the pool's state; once Ray is gone, asking would start another."""
        self._closed.set()
        self._polling.join()

    def _row_vectors(
        self, ids: np.ndarray, version: IndexVersion, serving: Sequence[int]
    ) -> tuple[np.ndarray, np.ndarray, set[int]]:
        """As `_gather_vectors`, of those that came with the last answer without a call."""
        ahead = self._ahead
        if ahead is not None and ahead[0] == version and np.array_equal(ahead[1], ids):
            return ahead[2], np.ones(len(ids), dtype=bool), set()
        return self._gather_vectors(ids, version, serving)

    def _keep_ahead(
        self, version: IndexVersion, ids: np.ndarray, owned: dict[int, np.ndarray], parts: dict[int, np.ndarray]
    ) -> None:
        """Keep vectors that came with an answer, unless one is missing: then its shard is asked for it again."""
        vectors_nD, known_n = _joined(parts, owned, len(ids))
        self._ahead = (version, ids, vectors_nD) if known_n.all() else None

    def _owned(self, ids: np.ndarray, serving: Sequence[int]) -> dict[int, np.ndarray]:
        """Positions of the rows that each shard owns."""
        owners = ids % len(self._shards)
        return {s: np.flatnonzero(owners == s) for s in serving}

    def _gather_vectors(
        self, ids: np.ndarray, version: IndexVersion, serving: Sequence[int]
    ) -> tuple[np.ndarray, np.ndarray, set[int]]:
        """Vectors ``[n, D]`` from the shards that own the rows, which of them are there ``[n]``, and who failed."""
        owned = self._owned(ids, serving)
        calls = {
            s: self._searching(s, "vectors").remote(version, ids[index]) for s, index in owned.items() if len(index)
        }
        return self._gather(calls, owned, len(ids))

    def _embed(self, anchors: Sequence[TokenRow], serving: Sequence[int]) -> tuple[np.ndarray, np.ndarray, set[int]]:
        """Vectors ``[n, D]`` of anchors, each shard having embedded some blocks; else as `_gather_vectors`."""
        positions, calls = {}, {}
        for s, blocks in zip(serving, share_anchors(len(anchors), len(serving)), strict=True):
            if blocks:
                positions[s] = np.arange(blocks[0].start, blocks[-1].stop)
                rows = [[anchors[i] for i in block] for block in blocks]
                calls[s] = self._searching(s, "embed").remote(rows)
        return self._gather(calls, positions, len(anchors))

    def _gather(
        self, calls: dict[int, Any], positions: dict[int, np.ndarray], n: int
    ) -> tuple[np.ndarray, np.ndarray, set[int]]:
        answers = self._ask(calls)
        return *_joined(answers, positions, n), set(calls) - set(answers)

    def _searching(self, number: int, method: str) -> Any:
        return getattr(self._shards[number], method).options(concurrency_group="search")

    def _ask(self, calls: dict[int, Any]) -> dict[int, Any]:
        """Return the answers of those shards that answer in time.

        Raises:
            SourceUnavailable: none does, or one no longer holds the version.
        """
        ray.wait(list(calls.values()), num_returns=max(1, len(calls)), timeout=self._timeout_s, fetch_local=True)
        answers, last = {}, "no shard that serves an index owns these rows"
        for number, call in calls.items():
            try:
                answers[number] = ray.get(call, timeout=0)
            except RayTaskError as error:
                if isinstance(error.cause, SourceUnavailable):
                    self._poll()
                    raise error.cause from error
                raise
            except RayError as error:
                last = f"shard {number}: {first_line(error)}"
        if not answers:
            raise SourceUnavailable(last)
        return answers

    def _control(self, call: Callable[[], Any], timeout_s: float) -> Any:
        try:
            return ray.get(call(), timeout=timeout_s)
        except Exception as error:  # RayError; a bare Exception where Ray knows no such actor any more
            raise SourceUnavailable(f"the pool's coordinator does not answer ({first_line(error)})") from error

    def _poll(self) -> None:
        try:
            self._state = self._control(self._coordinator.state.remote, _CONTROL_TIMEOUT_S)
            self._unreachable = ""
        except SourceUnavailable as error:
            self._unreachable = str(error)

    def _keep_polling(self) -> None:
        while not self._closed.wait(self._poll_s):
            self._poll()


def _joined(parts: dict[int, np.ndarray], positions: dict[int, np.ndarray], n: int) -> tuple[np.ndarray, np.ndarray]:
    """Put the vectors of shards in their positions ``[n, D]``; and say which are there ``[n]``."""
    width = next(iter(parts.values())).shape[1]
    vectors_nD, known_n = np.zeros((n, width), dtype=np.float32), np.zeros(n, dtype=bool)
    for s, part_nD in parts.items():
        vectors_nD[positions[s]], known_n[positions[s]] = part_nD, True
    return vectors_nD, known_n
