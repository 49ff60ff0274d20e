"""A shard and the source inside the process: which rows, in which order, in which versions, also while one is built."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
import torch
from waits import seconds

from hncse_ray.errors import DataError
from hncse_ray.negatives import (
    IndexVersion,
    NegativeSource,
    SourceStatus,
    SourceUnavailable,
    merge_hits,
    plan_index,
    share_anchors,
    weights_digest,
)
from hncse_ray.negatives.in_process import InProcessSource
from hncse_ray.negatives.shard import IndexShard

ROWS, D = 61, 8
BASE_ND = np.random.default_rng(0).standard_normal((ROWS, D))
LENGTHS = np.random.default_rng(1).integers(3, 12, ROWS)
OnEncode = Callable[[np.ndarray], None]


def weights(seed: int) -> dict[str, np.ndarray]:
    return {"matrix": np.random.default_rng(seed).standard_normal((D, D)).astype(np.float32)}


def vectors_of(seed: int, ids: Any = slice(None)) -> np.ndarray:
    raw = BASE_ND[ids] @ weights(seed)["matrix"]
    return (raw / np.linalg.norm(raw, axis=1, keepdims=True)).astype(np.float32)


def version(step: int) -> IndexVersion:
    return IndexVersion(step, f"weights {step}", "corpus", ROWS)


class Encoder:
    """Turns rows by a published matrix, and keeps what it was asked for."""

    def __init__(self, before: OnEncode = lambda ids: None) -> None:
        self.before, self.calls = before, []
        self.loaded: Mapping[str, np.ndarray] = {}

    def load(self, weights: Mapping[str, np.ndarray]) -> None:
        self.loaded = weights

    def __call__(self, ids: np.ndarray) -> np.ndarray:
        self.calls.append(ids.copy())
        self.before(ids)
        raw = BASE_ND[ids] @ self.loaded["matrix"]
        return (raw / np.linalg.norm(raw, axis=1, keepdims=True)).astype(np.float32)

    def anchors(self, rows: Any) -> np.ndarray:
        """Anchors are token rows that begin with the id of a row."""
        return self(np.array([row[0] for row in rows]))


def make_shard(
    encoder: Encoder, number: int = 0, count: int = 1, batch_size: int = 7, encode_ahead: int = 1
) -> IndexShard:
    rows = len(range(number, ROWS, count))
    return IndexShard(
        number=number,
        count=count,
        lengths=LENGTHS,
        encode=encoder,
        load_weights=encoder.load,
        plan=plan_index("flat", rows=rows, dimension=D, memory_bytes=None),
        device=torch.device("cpu"),
        batch_size=batch_size,
        threads=1,
        encode_ahead=encode_ahead,
        encode_anchors=encoder.anchors,
    )


def assert_close(found: np.ndarray, expected: np.ndarray) -> None:
    """Batches of other sizes may round otherwise."""
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-6)


def best(scores_QN: np.ndarray, k: int) -> np.ndarray:
    return np.argsort(-scores_QN, axis=1, kind="stable")[:, :k]


# ------------------------------------------------------------------------------------------------ rows


@pytest.mark.parametrize("count", [1, 2, 3, 7])
def test_the_shards_share_out_the_rows_and_encode_each_once(count: int) -> None:
    encoder = Encoder()
    for number in range(count):
        before = len(encoder.calls)
        report = make_shard(encoder, number, count).build(version(0), weights(0))
        mine = np.concatenate(encoder.calls[before:])
        assert report.rows == len(mine)
        assert set((mine % count).tolist()) == {number}
    assert sorted(np.concatenate(encoder.calls).tolist()) == list(range(ROWS))


@pytest.mark.parametrize(("number", "count"), [(0, 1), (2, 3)])
def test_rows_are_encoded_from_the_longest_to_the_shortest_in_batches(number: int, count: int) -> None:
    encoder = Encoder()
    report = make_shard(encoder, number, count, batch_size=7).build(version(0), weights(0))
    lengths = LENGTHS[np.concatenate(encoder.calls)]
    assert (np.diff(lengths) <= 0).all() and lengths[0] > lengths[-1]
    assert [len(ids) for ids in encoder.calls[:-1]] == [7] * (len(encoder.calls) - 1)
    assert 0 < report.encode_seconds <= report.seconds


def test_batches_encoded_side_by_side_are_those_encoded_in_turn_and_no_more_than_asked_for() -> None:
    in_turn, together, most = make_shard(Encoder()), [0], [0]

    def before(ids: np.ndarray) -> None:
        together[0] += 1
        most[0] = max(most[0], together[0])
        time.sleep(0.002)
        together[0] -= 1

    aside = make_shard(Encoder(before), encode_ahead=3)
    for shard in (in_turn, aside):
        assert shard.build(version(0), weights(0)).rows == ROWS
    everyone = np.arange(ROWS)
    np.testing.assert_array_equal(aside.vectors(version(0), everyone), in_turn.vectors(version(0), everyone))
    assert 1 < most[0] <= 3


def test_an_encoder_that_fails_ahead_fails_the_build() -> None:
    encoder = Encoder(lambda ids: 1 / 0 if 3 in ids else None)
    shard = make_shard(encoder, encode_ahead=2)
    with pytest.raises(ZeroDivisionError):
        shard.build(version(0), weights(0))
    assert shard.versions() == []


@pytest.mark.parametrize("count", [1, 3])
def test_shards_know_their_rows_by_the_ids_of_the_corpus(count: int) -> None:
    shards = [make_shard(Encoder(), number, count) for number in range(count)]
    for number, shard in enumerate(shards):
        shard.build(version(0), weights(5))
        ids = np.arange(number, ROWS, count)[::-1]
        assert_close(shard.vectors(version(0), ids), vectors_of(5, ids))
    queries = vectors_of(5)
    answers = [shard.search(version(0), queries, k=9) for shard in shards]
    scores, ids = merge_hits(np.stack([a[0] for a in answers]), np.stack([a[1] for a in answers]), k=9)
    exact = queries.astype(np.float64) @ queries.astype(np.float64).T
    np.testing.assert_array_equal(ids, best(exact, 9))
    np.testing.assert_allclose(scores, np.take_along_axis(exact, ids, 1), atol=1e-6)


def test_more_hits_than_rows_are_filled_up_with_no_row_and_not_with_another_shards() -> None:
    shard = make_shard(Encoder(), number=3, count=20)  # rows 3, 23, 43
    shard.build(version(0), weights(0))
    scores, ids = shard.search(version(0), vectors_of(0)[:2], k=5)
    assert all(sorted(found[:3]) == [3, 23, 43] for found in ids.tolist())
    assert (ids[:, 3:] == -1).all() and (scores[:, 3:] == -np.inf).all()


# ------------------------------------------------------------------------------------------------ versions


def test_versions_stand_beside_each_other_until_they_are_retired() -> None:
    shard = make_shard(Encoder())
    assert shard.versions() == []
    for step in (0, 5, 9):
        shard.build(version(step), weights(step))
    assert shard.versions() == [version(0), version(5), version(9)]
    for step in (0, 5, 9):
        assert_close(shard.vectors(version(step), np.arange(ROWS)), vectors_of(step))
    shard.retire([version(9), version(0), version(77)])
    assert shard.versions() == [version(0), version(9)]
    assert_close(shard.vectors(version(9), np.arange(4)), vectors_of(9, np.arange(4)))
    with pytest.raises(SourceUnavailable, match="step 5"):
        shard.search(version(5), vectors_of(5)[:1], k=1)


def test_a_version_that_is_not_held_is_no_answer() -> None:
    shard = make_shard(Encoder(), number=1, count=2)
    with pytest.raises(SourceUnavailable, match="shard 1 .* step 3"):
        shard.search(version(3), vectors_of(0)[:1], k=1)
    shard.build(version(0), weights(0))
    with pytest.raises(SourceUnavailable, match="shard 1 .* step 3"):
        shard.vectors(version(3), np.array([1]))
    other_weights = IndexVersion(0, "others", "corpus", ROWS)
    with pytest.raises(SourceUnavailable):
        shard.vectors(other_weights, np.array([1]))


def test_a_version_that_is_held_is_not_made_again() -> None:
    encoder = Encoder()
    shard = make_shard(encoder)
    shard.build(version(0), weights(0))
    calls = len(encoder.calls)
    report = shard.build(version(0), weights(1))
    assert (report.rows, report.seconds) == (ROWS, 0.0)
    assert len(encoder.calls) == calls
    np.testing.assert_array_equal(encoder.loaded["matrix"], weights(0)["matrix"])
    assert_close(shard.vectors(version(0), np.arange(ROWS)), vectors_of(0))


def test_searches_during_a_build_are_answered_from_the_version_before() -> None:
    half_way, go_on = threading.Event(), threading.Event()

    def hold(ids: np.ndarray) -> None:
        if len(encoder.calls) > 13:  # in the middle of the second build, of 9 batches
            half_way.set()
            assert go_on.wait(seconds(30))

    encoder = Encoder(hold)
    shard = make_shard(encoder)
    shard.build(version(0), weights(0))
    queries, expected = vectors_of(0), best(vectors_of(0) @ vectors_of(0).T, 4)
    with ThreadPoolExecutor(1) as builder:
        build = builder.submit(shard.build, version(1), weights(1))
        try:
            assert half_way.wait(seconds(30))
            assert shard.versions() == [version(0)]
            np.testing.assert_array_equal(shard.search(version(0), queries, k=4)[1], expected)
            assert_close(shard.vectors(version(0), np.arange(ROWS)), queries)
            with pytest.raises(SourceUnavailable):
                shard.search(version(1), queries, k=4)
            assert not build.done()
        finally:
            go_on.set()
        build.result(30)
    assert shard.versions() == [version(0), version(1)]
    assert_close(shard.vectors(version(1), np.arange(ROWS)), vectors_of(1))
    np.testing.assert_array_equal(shard.search(version(0), queries, k=4)[1], expected)


def test_a_build_that_fails_leaves_the_version_before_and_no_half_one() -> None:
    def fail(ids: np.ndarray) -> None:
        if len(encoder.calls) == 13:
            raise RuntimeError("out of memory")

    encoder = Encoder(fail)
    shard = make_shard(encoder)
    shard.build(version(0), weights(0))
    with pytest.raises(RuntimeError, match="out of memory"):
        shard.build(version(1), weights(1))
    assert shard.versions() == [version(0)]
    assert_close(shard.vectors(version(0), np.arange(ROWS)), vectors_of(0))
    shard.build(version(1), weights(1))  # nothing of the first attempt is in the way
    assert_close(shard.vectors(version(1), np.arange(ROWS)), vectors_of(1))


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_vectors_that_are_no_numbers_are_refused(bad: float) -> None:
    shard = make_shard(Encoder())
    shard.build(version(0), weights(0))
    broken = weights(1)["matrix"].copy()
    broken[0, 0] = bad
    with np.errstate(invalid="ignore"), pytest.raises(DataError, match="not finite"):
        shard.build(version(1), {"matrix": broken})
    assert shard.versions() == [version(0)]


def test_a_version_built_while_others_are_dropped_is_kept() -> None:
    """The end of its build falls between what the retirement reads and what it writes."""
    shard = make_shard(Encoder())
    shard.build(version(0), weights(0))

    class Keep(list[IndexVersion]):
        def __contains__(self, asked: object) -> bool:
            building.start()
            building.join(timeout=1)
            return super().__contains__(asked)

    building = threading.Thread(target=shard.build, args=(version(1), weights(1)))
    shard.retire(Keep([version(0)]))
    building.join()
    assert shard.versions() == [version(0), version(1)]


def test_two_builds_at_once_do_not_mix_their_weights() -> None:
    shard = make_shard(Encoder(lambda ids: time.sleep(0.0005)), batch_size=2)
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda step: shard.build(version(step), weights(step)), range(4)))
    for step in range(4):
        assert_close(shard.vectors(version(step), np.arange(ROWS)), vectors_of(step))


# ------------------------------------------------------------------------------------------------ anchors


def anchors_of(ids: Any) -> list[np.ndarray]:
    return [np.array([i, 7, 7], np.int32) for i in ids]


@pytest.mark.parametrize("count", [1, 15, 16, 17, 64, 100, 256, 1000])
def test_the_blocks_of_anchors_know_nothing_of_the_number_of_shards(count: int) -> None:
    (alone,) = share_anchors(count, 1)
    assert [place for block in alone for place in block] == list(range(count))
    assert len(alone) <= 16 and max(map(len, alone)) <= max(16, -(-count // 16))
    for shards in (2, 3, 5, 40):
        shares = share_anchors(count, shards)
        assert len(shares) == shards and [block for share in shares for block in share] == alone
        assert max(map(len, shares)) - min(map(len, shares)) <= 1


def test_anchors_are_embedded_by_the_newest_weights_block_by_block() -> None:
    encoder = Encoder()
    shard = make_shard(encoder)
    with pytest.raises(SourceUnavailable, match="built nothing"):
        shard.embed([anchors_of([1])])
    for step in (0, 5):
        shard.build(version(step), weights(step))
        before = len(encoder.calls)
        assert_close(shard.embed([anchors_of([4, 60]), anchors_of([9])]), vectors_of(step, [4, 60, 9]))
        assert [ids.tolist() for ids in encoder.calls[before:]] == [[4, 60], [9]]


def test_a_version_that_is_published_again_embeds_anchors_by_its_own_weights() -> None:
    shard = make_shard(Encoder())
    for step in (0, 1, 0):
        shard.build(version(step), weights(step))
    assert_close(shard.embed([anchors_of([4, 60])]), vectors_of(0, [4, 60]))


def test_a_failed_build_leaves_weights_that_anchors_can_be_embedded_by() -> None:
    shard = make_shard(Encoder())
    shard.build(version(0), weights(0))
    with np.errstate(invalid="ignore"), pytest.raises(DataError):
        shard.build(version(1), {"matrix": np.full((D, D), np.nan)})
    assert_close(shard.embed([anchors_of([4, 60])]), vectors_of(0, [4, 60]))


def test_no_anchor_is_embedded_by_weights_that_are_half_replaced() -> None:
    """The matrix is replaced row by row; whoever embeds meanwhile has the old one or the new one."""

    class Slow(Encoder):
        def load(self, weights: Mapping[str, np.ndarray]) -> None:
            matrix = self.loaded["matrix"] if self.loaded else weights["matrix"].copy()
            self.loaded = {"matrix": matrix}
            for row in range(D):
                matrix[row] = weights["matrix"][row]
                time.sleep(0.002)

    shard = make_shard(Slow())
    shard.build(version(0), weights(0))
    found: list[np.ndarray] = []
    with ThreadPoolExecutor(1) as builder:
        builds = [builder.submit(shard.build, version(step), weights(step % 2)) for step in range(1, 9)]
        while not all(build.done() for build in builds):
            found.append(shard.embed([anchors_of([4, 60])]))
    expected = [vectors_of(seed, [4, 60]) for seed in (0, 1)]
    assert found and all(min(np.abs(vectors - e).max() for e in expected) < 1e-6 for vectors in found)


# ------------------------------------------------------------------------------------------------ in the process


def make_source(encoder: Encoder | None = None) -> InProcessSource:
    return InProcessSource(make_shard(encoder or Encoder()), corpus_digest="corpus", rows=ROWS)


def test_nothing_is_found_before_something_is_published() -> None:
    source: NegativeSource = make_source()
    assert source.status() == SourceStatus() and source.status().version is None
    with pytest.raises(SourceUnavailable, match="published"):
        source.search(np.arange(3), k=2)
    source.wait(0.0)
    source.close()


def test_publishing_serves_neighbours_of_these_weights() -> None:
    source: NegativeSource = make_source()
    for step in (0, 7):
        assert source.publish(weights(step), step=step, key=str(step))
        source.wait(1.0)
        status = source.status()
        assert status.version == IndexVersion(step, str(step), "corpus", ROWS)
        assert (status.building, status.shards, status.shards_alive, status.failed_builds) == (False, 1, 1, 0)
        assert status.build_seconds > 0 and status.rows_per_s >= ROWS / status.build_seconds
        row_ids = np.array([4, 60, 0])
        hits = source.search(row_ids, k=6)
        vectors = vectors_of(step).astype(np.float64)
        np.testing.assert_array_equal(hits.ids_Bk, best(vectors[row_ids] @ vectors.T, 6))
        np.testing.assert_array_equal(hits.ids_Bk[:, 0], row_ids)
        np.testing.assert_allclose(hits.scores_Bk[:, 0], 1, atol=1e-6)
        assert hits.version == status.version and hits.complete
        assert_close(source.vectors(row_ids, version=hits.version), vectors_of(step, row_ids))


def test_anchors_are_searched_with_in_place_of_the_rows() -> None:
    source: NegativeSource = make_source()
    source.publish(weights(2), step=2, key="c")
    row_ids, asked = np.arange(40), np.arange(40)[::-1]
    hits = source.search(row_ids, k=6, anchors=anchors_of(asked))
    vectors = vectors_of(2).astype(np.float64)
    np.testing.assert_array_equal(hits.ids_Bk, best(vectors[asked] @ vectors.T, 6))
    assert hits.version == source.status().version and hits.complete


def test_the_version_before_is_gone_once_the_next_is_published() -> None:
    source = make_source()
    source.publish(weights(0), step=0, key="a")
    before = source.search(np.arange(2), k=2).version
    source.publish(weights(1), step=1, key="b")
    with pytest.raises(SourceUnavailable, match="step 0"):
        source.vectors(np.arange(2), version=before)


def test_a_version_that_is_served_is_not_built_twice() -> None:
    encoder = Encoder()
    source = make_source(encoder)
    source.publish(weights(0), step=0, key="a")
    status, calls = source.status(), len(encoder.calls)
    assert source.publish(weights(0), step=0, key="a")
    assert len(encoder.calls) == calls and source.status() == status
    source.publish(weights(1), step=0, key="b")  # a key of its own makes another version, whatever the step
    assert len(encoder.calls) == 2 * calls and source.status().version != status.version
    assert_close(source.vectors(np.arange(3), version=source.status().version), vectors_of(1)[:3])


def test_a_build_that_fails_leaves_what_was_served() -> None:
    source = make_source()
    source.publish(weights(0), step=0, key="a")
    status = source.status()
    with np.errstate(invalid="ignore"), pytest.raises(DataError):
        source.publish({"matrix": np.full((D, D), np.nan)}, step=1, key="b")
    assert source.status() == status
    np.testing.assert_array_equal(source.search(np.arange(5), k=1).ids_Bk[:, 0], np.arange(5))


# ------------------------------------------------------------------------------------------------ digest

WEIGHTS = {"a": np.arange(6, dtype=np.float32).reshape(2, 3), "b": np.ones(4, np.float32)}
OTHERS: dict[str, dict[str, np.ndarray]] = {
    "a name": {"c": WEIGHTS["a"], "b": WEIGHTS["b"]},
    "a dtype": WEIGHTS | {"b": np.ones(4, np.int32).view(np.float32)},
    "a dtype of the same bytes": WEIGHTS | {"b": WEIGHTS["b"].view(np.int32)},
    "a shape": WEIGHTS | {"a": WEIGHTS["a"].reshape(3, 2)},
    "a value": WEIGHTS | {"b": np.array([1, 1, 1, np.nextafter(np.float32(1), 2, dtype=np.float32)])},
    "the order of values": WEIGHTS | {"a": WEIGHTS["a"][::-1]},
    "one array less": {"a": WEIGHTS["a"]},
    "one empty array more": WEIGHTS | {"c": np.ones(0, np.float32)},
}


@pytest.mark.parametrize("change", OTHERS)
def test_the_digest_tells_weights_apart_by(change: str) -> None:
    assert weights_digest(OTHERS[change]) != weights_digest(WEIGHTS)


def test_the_digest_hangs_on_neither_order_nor_memory_layout() -> None:
    same = {"b": np.repeat(WEIGHTS["b"], 2)[::2], "a": np.asfortranarray(WEIGHTS["a"])}
    assert list(same) != list(WEIGHTS)
    assert weights_digest(same) == weights_digest(WEIGHTS) == weights_digest(dict(WEIGHTS))
