"""The negative pool on a real Ray: the answers of one index, and what is left of them when its processes are killed."""

from __future__ import annotations

import logging
import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
import ray
from passages import documents_section, make_documents
from pool_faults import (
    POOL,
    TIMINGS,
    Searching,
    Training,
    actors,
    kill,
    nothing_is_left,
    pid_of,
    placement_groups,
)
from safetensors.numpy import load_file
from tiny import make_sentences
from waits import seconds, soon, within

from hncse_ray.cluster.node_corpus import NodeCorpus
from hncse_ray.cluster.pool import PoolClient, PoolHandles, negative_pool
from hncse_ray.cluster.resources import plan_pool
from hncse_ray.cluster.shards import KeptShards
from hncse_ray.config import Settings
from hncse_ray.corpus import Corpus
from hncse_ray.encoder import load_encoder
from hncse_ray.errors import ClusterError, ModelError
from hncse_ray.negatives import Hits, IndexVersion, SourceStatus, SourceUnavailable, Weights, WordQuery, plan_index
from hncse_ray.negatives.in_process import InProcessSource
from hncse_ray.reporting import Reporters
from hncse_ray.storage import locked
from hncse_ray.training.checks import prepare
from hncse_ray.training.shard import build_shard

pytestmark = pytest.mark.timeout(600)
ROWS, SHARDS = 901, 3  # the shards differ in size
BACK_S = 90.0  # of two quiet cores, where a process that loads torch and an encoder is up after 10 s
QUERIES, K = np.arange(5, 29), 6


@pytest.fixture(scope="module", autouse=True)
def session() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.2")
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        ray.init(address="local", num_cpus=8, include_dashboard=False, logging_level=logging.ERROR, log_to_driver=False)
        logging.getLogger("hncse_ray").setLevel(logging.INFO)  # as the command does: the run's log is looked at
        yield
        ray.shutdown()
        logging.getLogger("hncse_ray").setLevel(logging.NOTSET)


@dataclass(frozen=True)
class World:
    """A corpus, weights, and what one process makes of them."""

    settings: Settings
    corpus: Corpus
    folder: Path
    dimension: int
    weights: Weights

    def changed(self, seed: int) -> Weights:
        """Other weights, with other neighbours."""
        generator = np.random.default_rng(seed)
        return {
            name: (array + generator.normal(scale=0.1, size=array.shape)).astype(array.dtype)
            if array.dtype == np.float32
            else array
            for name, array in self.weights.items()
        }

    def in_process(self, weights: Weights, *, step: int) -> InProcessSource:
        """A source without Ray that serves these weights."""
        plan = plan_index("flat", rows=len(self.corpus), dimension=self.dimension, memory_bytes=None)
        negatives = self.settings.negatives.model_copy(update={"encode_batch_size": 64})
        source = InProcessSource(
            build_shard(negatives, self.settings.encoder, self.corpus, plan=plan),
            corpus_digest=self.corpus.digest,
            rows=len(self.corpus),
        )
        source.publish(weights, step=step, key=str(step))
        return source

    def vectors(self, weights: Weights, *, step: int) -> tuple[IndexVersion, np.ndarray]:
        source = self.in_process(weights, step=step)
        version = source.status().version
        assert version is not None
        return version, source.vectors(np.arange(len(self.corpus)), version=version)


@pytest.fixture(scope="module")
def world(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> World:
    folder = tmp_path_factory.mktemp("pool")
    (folder / "sentences.txt").write_text("\n".join(make_sentences(ROWS)) + "\n", encoding="utf-8")
    settings = Settings.model_validate(
        {
            "run": {"storage_path": str(folder / "runs")},
            "corpus": {
                "source": "text",
                "path": str(folder / "sentences.txt"),
                "cache_dir": str(folder / "cache"),
                "min_words": 1,
            },
            "encoder": {"model": str(tiny_model), "pooling": "mean", "max_length": 24, "precision": "fp32"},
            # row by row, so that a build takes seconds
            "negatives": {
                "source": "pool",
                "num_shards": SHARDS,
                "encode_batch_size": 1,
                "threads_per_shard": 1,
                "build_timeout_s": seconds(2 * BACK_S),
            },
            "cluster": {"start_timeout_s": seconds(10)},
        }
    )
    encoder = load_encoder(settings.encoder.model, settings.encoder)
    corpus = prepare(settings, encoder, Reporters([]))
    assert len(corpus) == ROWS
    weights = {name: tensor.numpy().copy() for name, tensor in encoder.state_dict().items()}
    return World(settings, corpus, folder, encoder.dimension, weights)


@contextmanager
def start_pool(world: World, name: str, kept: KeptShards | None = None, **negatives: Any) -> Iterator[PoolHandles]:
    """A pool whose shards can be asked."""
    settings = world.settings.model_copy(update={"negatives": world.settings.negatives.model_copy(update=negatives)})
    plan = plan_pool(settings.negatives, [ray.cluster_resources()], rows=len(world.corpus), dimension=world.dimension)
    with negative_pool(settings, plan, world.corpus, world.folder / name, kept=kept) as handles:
        handles.wait_until_ready()
        yield handles


def assert_exact(hits: Hits, vectors_ND: np.ndarray, *, rows: np.ndarray = QUERIES, shards: set[int]) -> None:
    """The answer is that of an exhaustive search among the rows of some shards, for the queries that they own."""
    owners = np.arange(len(vectors_ND)) % SHARDS
    known_B = np.isin(rows % SHARDS, list(shards))
    cosines_BN = vectors_ND[rows] @ vectors_ND.T
    cosines_BN[:, ~np.isin(owners, list(shards))] = -np.inf
    best_Bk = -np.sort(-cosines_BN, axis=1)[:, : hits.ids_Bk.shape[1]]
    assert (hits.ids_Bk[~known_B] == -1).all() and np.isneginf(hits.scores_Bk[~known_B]).all()
    ids_bk, scores_bk = hits.ids_Bk[known_B], hits.scores_Bk[known_B]
    np.testing.assert_allclose(scores_bk, best_Bk[known_B], atol=1e-5)
    np.testing.assert_allclose(np.take_along_axis(cosines_BN[known_B], ids_bk, 1), scores_bk, atol=1e-5)
    assert all(len(set(ids_k)) == len(ids_k) for ids_k in ids_bk.tolist())


def assert_unmixed(searching: Searching, versions: dict[IndexVersion, np.ndarray]) -> None:
    """Every answer is right for the version that it names, whoever has taken part in it."""
    assert not searching.errors and searching.answers
    for hits in searching.answers:
        V_ND = versions[hits.version]
        if hits.complete:
            assert_exact(hits, V_ND, shards=set(range(SHARDS)))
        found_Bk = hits.ids_Bk >= 0
        cosines_Bk = np.einsum("bd,bkd->bk", V_ND[QUERIES], V_ND[hits.ids_Bk])
        np.testing.assert_allclose(hits.scores_Bk[found_Bk], cosines_Bk[found_Bk], atol=1e-5)


class TestPool:
    """One pool, killed in parts again and again; each test leaves it whole, serving some version."""

    @pytest.fixture(scope="class")
    def pool(self, world: World) -> Iterator[PoolHandles]:
        with start_pool(world, "shared") as handles:
            yield handles
        assert nothing_is_left()

    @pytest.fixture(scope="class")
    def client(self, pool: PoolHandles) -> Iterator[PoolClient]:
        client = PoolClient(pool, timeout_s=seconds(10))
        yield client
        client.close()

    @pytest.fixture
    def served(self, world: World, client: PoolClient) -> tuple[IndexVersion, np.ndarray]:
        """A version that all shards serve, and its vectors."""
        assert client.publish(world.weights, step=0, key="0")
        client.wait(seconds(BACK_S))
        version, vectors_ND = world.vectors(world.weights, step=0)
        soon(lambda: client.status().version == version, within_s=5, what=client.status)
        soon(lambda: client.status().shards_alive == SHARDS, within_s=BACK_S, what=client.status)
        return version, vectors_ND

    def test_before_anything_is_published_it_says_so(self, client: PoolClient) -> None:
        assert client.status().version is None and client.status().shards_alive == 0
        with pytest.raises(SourceUnavailable):
            client.search(QUERIES, k=K)

    def test_it_answers_as_one_index_in_one_process(self, world: World, client: PoolClient) -> None:
        assert client.publish(world.weights, step=7, key="7")
        assert client.status().building
        assert not client.publish(world.changed(1), step=8, key="8")  # another is being made
        client.wait(seconds(BACK_S))
        alone = world.in_process(world.weights, step=7)
        everyone = np.arange(len(world.corpus))
        expected, hits = alone.search(everyone, k=K), client.search(everyone, k=K)
        assert hits.version == expected.version == client.status().version and hits.complete
        np.testing.assert_allclose(hits.scores_Bk, expected.scores_Bk, atol=1e-5)
        apart = hits.ids_Bk != expected.ids_Bk  # neighbours that are equally near may be swapped
        gaps_Bk = np.abs(np.diff(expected.scores_Bk, axis=1))
        tied_Bk = np.pad(gaps_Bk < 2e-5, ((0, 0), (0, 1)), constant_values=True)
        tied_Bk[:, 1:] |= gaps_Bk < 2e-5
        assert not (apart & ~tied_Bk).any() and apart.mean() < 0.05
        following, really = everyone[50:90], client._gather_vectors
        client.search(everyone, k=1, ahead=following)
        for rows, calls in ((following, 0), (everyone[60:100], 1)):  # those that were said to come next, and others
            with patch.object(client, "_gather_vectors", side_effect=really) as gathering:
                again = client.search(rows, k=K)
            assert gathering.call_count == calls
            np.testing.assert_array_equal(again.ids_Bk, hits.ids_Bk[rows])
            np.testing.assert_array_equal(again.scores_Bk, hits.scores_Bk[rows])
        ids = np.array([3, 899, 0, 450, 3])
        np.testing.assert_allclose(
            client.vectors(ids, version=hits.version), alone.vectors(ids, version=hits.version), atol=1e-5
        )
        status = client.status()
        assert (status.shards, status.shards_alive, status.failed_builds) == (SHARDS, SHARDS, 0)
        assert status.build_seconds > 0 and status.rows_per_s > 0 and not status.building

    def test_anchors_find_what_they_find_in_one_process(
        self, world: World, client: PoolClient, served: tuple[IndexVersion, np.ndarray]
    ) -> None:
        alone, asked = world.in_process(world.weights, step=0), np.arange(100, 200)
        anchors = world.corpus.token_rows(asked)
        expected, hits = (source.search(asked - 50, k=K, anchors=anchors) for source in (alone, client))
        assert hits.version == expected.version == served[0] and hits.complete
        assert_exact(hits, served[1], rows=asked, shards={0, 1, 2})
        np.testing.assert_allclose(hits.scores_Bk, expected.scores_Bk, atol=1e-5)

    def test_words_count_as_in_one_process_and_columns_of_a_lost_shard_are_not_known(
        self, world: World, pool: PoolHandles, client: PoolClient, served: tuple[IndexVersion, np.ndarray]
    ) -> None:
        alone, asked, given = world.in_process(world.weights, step=0), np.arange(100, 140), np.arange(60, 300, 7)
        anchors, words = world.corpus.token_rows(asked), WordQuery(world.corpus.texts(asked), 0.3)
        expected, hits = (source.search(asked - 50, k=K, anchors=anchors, words=words) for source in (alone, client))
        assert hits.version == expected.version == served[0] and hits.complete
        np.testing.assert_array_equal(hits.most_words_B, expected.most_words_B)
        scores, exact = client.scores(hits, given, words=words), alone.scores(expected, given, words=words)
        np.testing.assert_allclose(scores, exact, atol=1e-5)
        found, best = (
            np.take_along_axis(source.scores(of, np.arange(ROWS), words=words), of.ids_Bk, 1)
            for source, of in ((client, hits), (alone, expected))
        )
        np.testing.assert_allclose(found, best, atol=1e-5)  # neighbours that are equally near may be swapped
        here = given % SHARDS != 1

        def known() -> list[bool] | None:
            """Whether columns of the shard that is lost are known, and those of the others."""
            try:
                scores = client.scores(hits, given, words=words)
            except SourceUnavailable:  # it is back, and holds nothing yet
                return None
            found = np.isfinite(scores)
            np.testing.assert_allclose(scores[found], exact[found], atol=1e-5)
            return [bool(found[:, part].all()) for part in (~here, here)]

        kill(pool.shards[1])
        soon(lambda: known() == [False, True], within_s=30, what="scores without those of the lost shard")
        soon(lambda: known() == [True, True], within_s=BACK_S, what="all scores again")

    def test_anchors_of_a_shard_that_is_lost_are_embedded_by_the_others(
        self, world: World, pool: PoolHandles, client: PoolClient, served: tuple[IndexVersion, np.ndarray]
    ) -> None:
        version, vectors_ND = served
        anchors = world.corpus.token_rows(QUERIES)
        with Searching(client, QUERIES, k=K, anchors=anchors) as searching:
            assert searching.next().complete
            kill(pool.shards[1])
            partial = searching.since(
                lambda a: not a.complete and (a.ids_Bk >= 0).all(), within_s=30, what="an answer of the others"
            )
            cosines_BN = vectors_ND[QUERIES] @ vectors_ND.T
            cosines_BN[:, 1::SHARDS] = -2  # its rows are out of reach
            np.testing.assert_allclose(partial.scores_Bk, -np.sort(-cosines_BN, axis=1)[:, :K], atol=1e-5)
            searching.since(lambda a: a.complete, within_s=BACK_S, what="complete answers again")
            soon(lambda: client.status().shards_alive == SHARDS, within_s=10, what="all shards")
        assert_unmixed(searching, {version: vectors_ND})
        assert len(searching.unavailable) <= 2, searching.unavailable

    def test_a_version_that_has_given_way_is_not_served(
        self, world: World, client: PoolClient, served: tuple[IndexVersion, np.ndarray]
    ) -> None:
        assert client.publish(world.changed(2), step=3, key="3")
        client.wait(seconds(BACK_S))
        assert client.status().version != served[0]
        # It stays until all clients have heard of the next.
        soon(lambda: not _serves(client, served[0]), within_s=10, what="the end of the version before")

    def test_a_version_gives_way_to_the_next_without_a_gap(
        self, world: World, client: PoolClient, served: tuple[IndexVersion, np.ndarray]
    ) -> None:
        versions = dict([served])
        with Searching(client, QUERIES, k=K) as searching:
            for step in range(50, 55):
                version, versions[version] = world.vectors(world.changed(step), step=step)
                assert client.publish(world.changed(step), step=step, key=str(step))
                client.wait(seconds(BACK_S))
                assert client.status().version == version
                assert client.status().shards_alive == SHARDS
                searching.since(lambda a, v=version: a.version == v, within_s=10, what="the new version")
        assert_unmixed(searching, versions)
        assert all(answer.complete for answer in searching.answers)
        assert searching.unavailable == []

    @pytest.mark.parametrize("dead", [{1}, {0, 2}])
    def test_killed_shards_are_left_out_and_come_back(
        self, pool: PoolHandles, client: PoolClient, served: tuple[IndexVersion, np.ndarray], dead: set[int]
    ) -> None:
        version, vectors_ND = served
        with Searching(client, QUERIES, k=K) as searching:
            assert searching.next().complete
            for number in dead:
                kill(pool.shards[number])
            # A shard may die between giving its rows' vectors and searching: wait for an answer without any part in it.
            partial = searching.since(
                lambda a: (a.ids_Bk[np.isin(QUERIES % SHARDS, list(dead))] == -1).all(),
                within_s=30,
                what="an answer of the others",
            )
            assert not partial.complete
            assert_exact(partial, vectors_ND, shards={0, 1, 2} - dead)
            soon(lambda: client.status().shards_alive == SHARDS - len(dead), within_s=10, what="fewer shards")
            assert_exact(searching.next(), vectors_ND, shards={0, 1, 2} - dead)
            searching.since(lambda a: a.complete, within_s=BACK_S, what="complete answers again")
            soon(lambda: client.status().shards_alive == SHARDS, within_s=10, what="all shards")
        assert_unmixed(searching, {version: vectors_ND})
        assert len(searching.unavailable) <= 2, searching.unavailable
        assert client.status().failed_builds == 0

    def test_without_its_coordinator_it_answers_and_the_next_one_knows_the_version(
        self, world: World, pool: PoolHandles, client: PoolClient, served: tuple[IndexVersion, np.ndarray]
    ) -> None:
        version, vectors_ND = served
        before = pid_of(pool.coordinator)
        with Searching(client, QUERIES, k=K) as searching:
            kill(pool.coordinator)
            for _ in range(10):
                assert_exact(searching.next(), vectors_ND, shards={0, 1, 2})
            soon(lambda: pid_of(pool.coordinator) not in (0, before), within_s=BACK_S, what="its restart")
            soon(lambda: _reachable(client), within_s=BACK_S, what="an answer of it")
            assert client.status().version == version
            soon(lambda: client.status().shards_alive == SHARDS, within_s=10, what="all shards")
            other = world.vectors(world.changed(3), step=11)
            soon(lambda: _published(client, world.changed(3), step=11), within_s=BACK_S, what="weights taken again")
            client.wait(seconds(BACK_S))
            assert client.status().version == other[0]
            searching.since(lambda a: a.version == other[0], within_s=10, what="the new version")
        assert_unmixed(searching, dict([served, other]))
        assert all(answer.complete for answer in searching.answers)
        assert searching.unavailable == []

    def test_a_shard_killed_while_it_builds_builds_again(
        self, world: World, pool: PoolHandles, client: PoolClient, served: tuple[IndexVersion, np.ndarray]
    ) -> None:
        other = world.vectors(world.changed(4), step=20)
        with Searching(client, QUERIES, k=K) as searching:
            assert client.publish(world.changed(4), step=20, key="20")
            soon(lambda: client.status().building, within_s=5, every_s=0.01, what="the build")
            kill(pool.shards[0])
            status = ray.get(pool.coordinator.state.remote(), timeout=seconds(10)).status
            assert status.building and status.version == served[0]
            searching.since(lambda a: not a.complete, within_s=30, what="an answer of the others")
            assert client.status().building and client.status().version == served[0]
            client.wait(seconds(2 * BACK_S))
            assert client.status().version == other[0] and not client.status().building
            searching.since(lambda a: a.complete and a.version == other[0], within_s=10, what="the new version")
        assert_unmixed(searching, dict([served, other]))
        assert {answer.version for answer in searching.answers} == {served[0], other[0]}
        steps = [answer.version.step for answer in searching.answers]
        assert steps == sorted(steps)
        assert client.status().failed_builds == 0

    def test_a_build_that_fails_leaves_the_version_before(
        self, world: World, client: PoolClient, served: tuple[IndexVersion, np.ndarray]
    ) -> None:
        failed = client.status().failed_builds
        broken = {n: np.full_like(a, np.nan) if a.dtype == np.float32 else a for n, a in world.weights.items()}
        assert client.publish(broken, step=30, key="30")
        client.wait(seconds(BACK_S))
        status = client.status()
        assert status.version == served[0] and status.failed_builds == failed + 1 and not status.building
        assert "ModelError" in status.last_failure and "not numbers" in status.last_failure
        (kept,) = (world.folder / "shared").glob("*.safetensors*")  # those of the failed one are gone
        held = load_file(kept)
        assert all(np.array_equal(held[name], array) for name, array in world.weights.items())
        hits = client.search(QUERIES, k=K)
        assert hits.complete and hits.version == served[0]
        assert_exact(hits, served[1], shards={0, 1, 2})
        version, vectors_ND = world.vectors(world.changed(5), step=40)
        assert client.publish(world.changed(5), step=40, key="40")
        client.wait(seconds(BACK_S))
        assert client.status().version == version and client.status().failed_builds == failed + 1
        assert_exact(client.search(QUERIES, k=K), vectors_ND, shards={0, 1, 2})


def _serves(client: PoolClient, version: IndexVersion) -> bool:
    try:
        client.vectors(np.arange(6), version=version)
    except SourceUnavailable:
        return False
    return True


def _published(client: PoolClient, weights: Weights, *, step: int) -> bool:
    try:
        return client.publish(weights, step=step, key=str(step))
    except SourceUnavailable:  # the new coordinator is not up yet
        return False


def _reachable(client: PoolClient) -> bool:
    try:
        client.status()
    except SourceUnavailable:
        return False
    return True


@pytest.mark.slow
def test_a_build_that_hangs_is_given_up_and_an_error_in_the_body_leaves_nothing(world: World) -> None:
    """The hanging shard is stopped by a signal; the pool has CPUs of its own, so a placement group holds them."""
    with pytest.raises(ZeroDivisionError):
        limit_s = round(seconds(15))  # the other shard's build, too, must be done by then
        with start_pool(world, "hanging", num_shards=2, cpus_per_shard=1, build_timeout_s=limit_s) as pool:
            assert len(placement_groups()) == 1 and ray.available_resources()["CPU"] == 6
            (each,) = {tuple(sorted(bundle.items())) for bundle in placement_groups()[0]["bundles"].values()}
            rows = -(-ROWS // 2)
            assert dict(each) == {"CPU": 1, "memory": rows * world.dimension * 4 * 2 + rows}  # two versions, and flags
            client = PoolClient(pool, timeout_s=seconds(3))
            assert client.publish(world.weights, step=0, key="0")
            client.wait(seconds(BACK_S))
            version = client.status().version
            assert version is not None
            soon(lambda: client.status().shards_alive == 2, within_s=10, what=client.status)
            hanging = pid_of(pool.shards[1])
            os.kill(hanging, signal.SIGSTOP)
            started = time.monotonic()
            with within(45, "giving the build up"):
                assert client.publish(world.changed(1), step=1, key="1")
                client.wait(seconds(BACK_S))
            assert time.monotonic() - started > limit_s
            status = client.status()
            assert status.version == version and status.failed_builds == 1 and not status.building
            assert status.last_failure == f"TimeoutError: shard 1 was not ready after {limit_s} s"
            hits = client.search(np.arange(12), k=3)
            assert hits.version == version and not hits.complete and (hits.ids_Bk[::2] % 2 == 0).all()
            soon(lambda: client.status().shards_alive == 2, within_s=BACK_S, what="its restart and build")
            assert pid_of(pool.shards[1]) != hanging
            hits = client.search(np.arange(12), k=3)
            assert hits.version == version and hits.complete and (hits.ids_Bk[:, 0] == np.arange(12)).all()
            client.close()
            1 / 0  # noqa: B018
    assert nothing_is_left()
    soon(lambda: ray.available_resources().get("CPU") == 8, within_s=20, what="all CPUs")


def test_shards_are_kept_for_a_run_like_the_last_with_the_index_of_untouched_weights(world: World) -> None:
    kept = KeptShards()

    def use(name: str, *, steps: tuple[int, ...], **negatives: Any) -> tuple[int, SourceStatus]:
        with start_pool(world, name, kept, num_shards=1, **negatives) as pool:
            client = PoolClient(pool, timeout_s=60)
            for step in steps:
                weights = world.changed(step) if step else world.weights
                assert client.publish(weights, step=step, key=str(step))
                client.wait(seconds(BACK_S))
                if name == "second" and not step:
                    assert client.status().rows_per_s == 0  # there was nothing to encode
            found = pid_of(pool.shards[0]), client.status()
            assert not steps or client.search(QUERIES, k=K).complete
            client.close()
            return found

    pid, status = use("first", steps=(0,), per_anchor=2)
    assert status.rows_per_s > 0
    again, status = use("second", steps=(0, 7), per_anchor=1, max_score=0.9)  # of which a shard knows nothing
    assert again == pid and status.version is not None and status.version.step == 7
    assert use("batches of 2", steps=(), encode_batch_size=2)[0] != pid
    with pytest.raises(ZeroDivisionError), start_pool(world, "failed", kept, num_shards=1, encode_batch_size=2):
        1 / 0  # noqa: B018
    assert nothing_is_left()


@pytest.mark.slow
def test_a_pool_that_cannot_come_up_says_why_and_leaves_nothing(world: World) -> None:
    settings = world.settings.model_copy(
        update={"encoder": world.settings.encoder.model_copy(update={"model": str(world.folder / "none")})}
    )
    plan = plan_pool(settings.negatives, [ray.cluster_resources()], rows=ROWS, dimension=world.dimension)
    with negative_pool(settings, plan, world.corpus, world.folder / "x") as handles:
        with pytest.raises(ModelError, match="none"):
            handles.wait_until_ready()
    assert nothing_is_left()


def test_a_corpus_that_must_be_prepared_first_takes_as_long_as_it_does(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Other processes of the node hold the corpus up for longer than a shard may take to come up."""
    clock_s = seconds(15.0)
    monkeypatch.setattr("hncse_ray.cluster.pool._START_TIMEOUT_S", clock_s)
    really, cache = NodeCorpus.of, world.folder / "another node"
    (cache / "corpora").mkdir(parents=True)

    def elsewhere(corpus: Corpus, settings: Settings) -> NodeCorpus:
        here = really(corpus, settings)
        asked = here.settings.model_copy(update={"cache_dir": str(cache)})
        return replace(here, path=str(cache / "none"), settings=asked)

    monkeypatch.setattr(NodeCorpus, "of", elsewhere)
    preparing, over = cache / "corpora" / f".{world.corpus.digest}.lock", threading.Event()

    def hold() -> None:
        with locked(preparing, hint="", wait=True):
            over.wait(clock_s + 10)

    holder = threading.Thread(target=hold)
    holder.start()
    soon(preparing.exists, within_s=10, what="the lock")
    try:
        with start_pool(world, "elsewhere", num_shards=1) as pool:
            assert not holder.is_alive()  # it was waited for
            assert ray.get(pool.shards[0].versions.remote()) == []
    finally:
        over.set()
        holder.join()
    assert len(list((cache / "corpora").glob("[!.]*"))) == 1 and nothing_is_left()


def test_cpus_that_are_taken_are_said(world: World) -> None:
    holder = ray.util.placement_group([{"CPU": 6}])
    assert holder.wait(seconds(10))
    try:
        patience = f"{world.settings.cluster.start_timeout_s:g} s"
        with pytest.raises(ClusterError, match=f"3 shards x .* could not be placed on the cluster within {patience}"):
            with start_pool(world, "x", cpus_per_shard=1):
                pytest.fail("it came up")
        assert len(placement_groups()) == 1 and not actors(*POOL)
    finally:
        ray.util.remove_placement_group(holder)
    assert nothing_is_left()


# ---- training with the pool


def run_settings(small_run: dict[str, Any], **sections: dict[str, Any]) -> Settings:
    tree = {name: dict(section) for name, section in small_run.items()}
    tree["corpus"]["min_words"] = 1
    tree["negatives"] = {
        "source": "pool",
        "num_shards": 2,
        "threads_per_shard": 1,
        "candidates": 16,
        "max_score": None,
        "refresh_every_steps": 20,
    }
    tree["train"] |= {"log_every_steps": 5, "evaluate_every_steps": 5000, "checkpoint_every_steps": 5000}
    for name, section in sections.items():
        tree[name] = tree.get(name, {}) | section
    return Settings.model_validate(tree)


@pytest.mark.slow
def test_training_survives_the_loss_of_shards_and_coordinator(small_run: dict[str, Any]) -> None:
    steps = 600
    training = Training(
        run_settings(small_run, train={"max_steps": steps}, negatives={"build_timeout_s": seconds(2 * BACK_S)})
    )
    whole = "all shards again"

    def is_whole(line: dict[str, Any]) -> bool:
        return (
            line.get("negatives/shards_alive") == 2
            and line["negatives/missing"] == 0
            and line.get("negatives/partial") == 0
        )

    with training.slowly():
        training.line(is_whole, within_s=120, what="an index")
        # one shard
        actors("ShardActor")[0].kill()
        training.line(
            lambda row: row.get("negatives/partial", 0) > 0 and row["negatives/shards_alive"] == 1,
            within_s=40,
            what="partial answers, of the shard that is left",
        )
        training.line(is_whole, within_s=BACK_S, what=whole)
        # both
        for shard in actors("ShardActor"):
            shard.kill()
        training.line(
            lambda row: row["negatives/missing"] == 1 and row["negatives/shards_alive"] == 0,
            within_s=40,
            what="steps without global negatives, and no shard left",
        )
        training.line(is_whole, within_s=2 * BACK_S, what=whole)
        # the coordinator

        def is_missed() -> bool:
            for coordinator in actors("PoolCoordinator"):  # the next one too: it is back before anybody asks
                coordinator.kill()
            return "cannot be renewed for now" in training.log()

        soon(is_missed, within_s=30, what="a notice of it")
        line = training.line(lambda row: True, within_s=10, what="a step")
        assert line["negatives/missing"] == 0 and line["negatives/partial"] == 0
        renewed = line["step"]
        training.line(
            lambda row: is_whole(row) and row["negatives/index_step"] > renewed, within_s=BACK_S, what="a newer index"
        )
    result = training.finish(within_s=150)
    assert result.steps == steps
    lines, log = training.lines(), training.log()
    assert [line["step"] for line in lines] == list(range(5, steps + 1, 5))
    assert all(np.isfinite(line["loss"]) for line in lines)
    assert any(is_whole(line) for line in lines[-20:])
    assert all(line["negatives/failed_builds"] == 0 for line in lines)
    assert "no global negatives for now" in log and "the negative pool answers again" in log
    assert log.count("the index cannot be renewed for now") == 1
    assert "resumes at step" not in log  # no trainer was restarted for the sake of the pool
    assert nothing_is_left()


@pytest.mark.slow
def test_a_trainer_that_is_killed_comes_back_to_the_same_pool(small_run: dict[str, Any]) -> None:
    steps = 120
    settings = run_settings(
        small_run,
        train={"max_steps": steps, "checkpoint_every_steps": 20},
        cluster={"num_workers": 2, "max_failures": 3},
    )
    training = Training(settings)
    with training.slowly():
        training.line(lambda row: row["step"] >= 25 and row["negatives/missing"] == 0, within_s=180, what="an index")
        shards = {process.pid for process in actors("ShardActor")}
        workers = actors("RayTrainWorker")
        assert len(shards) == len(workers) == 2
        workers[0].kill()
        soon(lambda: not workers[0].is_running(), within_s=10, what="its end")
    assert training.finish(within_s=200).steps == steps
    lines, log = training.lines(), training.log()
    assert [line["step"] for line in lines] == list(range(5, steps + 1, 5))
    assert log.count("resumes at step") == 1
    after = [line for line in lines if line["step"] > 80]
    assert all(line["negatives/missing"] == 0 and line["negatives/shards_alive"] == 2 for line in after)
    assert lines[-1]["negatives/index_step"] >= 80 and lines[-1]["negatives/failed_builds"] == 0
    assert nothing_is_left()


@pytest.mark.slow
@pytest.mark.parametrize("by", ["rows", "anchors"])
def test_sync_runs_are_the_same_with_shards_and_without(small_run: dict[str, Any], tmp_path: Path, by: str) -> None:
    courses, sections = {}, {}
    if by == "anchors":
        small_run["corpus"] = documents_section(tmp_path, make_documents(200), str(tmp_path / "cache"))
        sections = {"views": {"mix": {"title": 1, "cloze": 1, "dropout": 1}, "agreement": 12}}
    for name, pool in {
        "two": {"num_shards": 2},
        "two again": {"num_shards": 2},
        "one process": {"source": "in_process", "num_shards": 1},
    }.items():
        settings = run_settings(
            small_run,
            run={"name": name.replace(" ", "-")},
            train={"max_steps": 30},
            negatives={"refresh": "sync", "refresh_every_steps": 6} | pool,
            **sections,
        )
        training = Training(settings)
        assert training.finish(within_s=200).steps == 30
        courses[name] = [{k: v for k, v in line.items() if k not in TIMINGS} for line in training.lines()]
    two, again, alone = courses.values()
    assert [line["step"] for line in two] == [5, 10, 15, 20, 25, 30]
    assert [line["negatives/index_step"] for line in two] == [0, 6, 12, 18, 24, 24]
    assert all(line["negatives/missing"] == 0 and line["negatives/usable"] == 1 for line in two)
    assert two == again
    for with_shards, without in zip(two, alone, strict=True):
        assert with_shards.pop("negatives/shards_alive") == 2 and without.pop("negatives/shards_alive") == 1
        assert with_shards == pytest.approx(without, rel=1e-3, abs=1e-5)
    if by == "anchors":
        assert all(line["views/cloze_kept"] > 0 for line in two)
        assert any(line["views/title_dropped"] > 0 for line in two)
    assert nothing_is_left()
