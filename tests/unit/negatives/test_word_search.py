"""Search by cosine and words together: what is found, and that the number of shards does not show."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from hncse_ray.negatives import Hits, IndexVersion, Offers, WordQuery, merge_offers, plan_index
from hncse_ray.negatives.in_process import InProcessSource
from hncse_ray.negatives.lexical import LexicalIndex
from hncse_ray.negatives.shard import IndexShard

ROWS, D = 83, 8
RNG = np.random.default_rng(0)
VECTORS = RNG.standard_normal((ROWS, D))
VECTORS[40] = VECTORS[41] = VECTORS[7]
VECTORS = (VECTORS / np.linalg.norm(VECTORS, axis=1, keepdims=True)).astype(np.float32)
VOCABULARY = [f"w{i}" for i in range(120)]
TEXTS = [" ".join(RNG.choice(VOCABULARY, size=RNG.integers(4, 30))) for _ in range(ROWS)]
TEXTS[7] = TEXTS[40]
KEYS = np.stack([np.arange(ROWS), 1000 + np.arange(ROWS) // 3], axis=1)  # documents of three rows
VERSION = IndexVersion(0, "weights", "corpus", ROWS)
ANCHORS = np.arange(0, ROWS, 4)
QUERY_TEXTS = [" ".join(TEXTS[i].split()[::2]) for i in ANCHORS]
QUERY_TEXTS[-1] = "shares no word"


def shard(number: int = 0, count: int = 1, kind: Any = "flat") -> IndexShard:
    made = IndexShard(
        number=number,
        count=count,
        lengths=np.full(ROWS, 5),
        encode=lambda ids: VECTORS[ids],
        load_weights=lambda weights: None,
        read_words=lambda: LexicalIndex(TEXTS, keys_nc=KEYS[number::count], number=number, count=count),
        keys=lambda ids: KEYS[ids],
        plan=plan_index(kind, rows=len(range(number, ROWS, count)), dimension=D, memory_bytes=None),
        device=torch.device("cpu"),
        batch_size=9,
        threads=1,
    )
    made.build(VERSION, {})
    return made


def offers(shards: list[IndexShard], k: int) -> list[Offers]:
    return [s.offers(VERSION, VECTORS[ANCHORS], k=k, row_ids=ANCHORS, texts=QUERY_TEXTS) for s in shards]


def scores(words: WordQuery) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Score, cosine and BM25 of every anchor with every row, by the words' definition."""
    bm25 = np.stack([LexicalIndex(TEXTS, keys_nc=KEYS).scores(text) for text in words.texts]).astype(np.float64)
    own = (KEYS[ANCHORS, 0, None] == KEYS[:, 0]) | (KEYS[ANCHORS, 1, None] == KEYS[:, 1])
    most = np.where(own, 0, bm25).max(axis=1, keepdims=True)
    share = np.where(most > 0, np.minimum(1, bm25 / np.where(most > 0, most, 1)), 0)
    cosines = VECTORS[ANCHORS].astype(np.float64) @ VECTORS.astype(np.float64).T
    return words.weight * share + (0 if words.alone else cosines), cosines, np.where(own, 0, bm25)


@pytest.mark.parametrize("words", [WordQuery(QUERY_TEXTS, 0.3), WordQuery(QUERY_TEXTS, 0.5, alone=True)])
@pytest.mark.parametrize("k", [1, 10, 30, ROWS + 5])
def test_the_hits_are_the_best_of_the_nearest_by_either(words: WordQuery, k: int) -> None:
    (cosines_Bk, ids_Bk), most_B = merge_offers(offers([shard()], k), words=words)
    score, cosine, others = scores(words)
    np.testing.assert_allclose(most_B, others.max(axis=1), rtol=1e-6)
    for b in range(len(ANCHORS)):
        near = sorted(range(ROWS), key=lambda j: (-np.float32(cosine[b, j]), j))[:k]
        worded = sorted(np.flatnonzero(others[b]), key=lambda j: (-np.float32(others[b, j]), j))[:k]
        expected = sorted({*near, *worded}, key=lambda j: (-np.float32(score[b, j]), j))[:k]
        found = ids_Bk[b][ids_Bk[b] >= 0]
        np.testing.assert_allclose(score[b, found], score[b, expected], atol=1e-6)
        assert len(set(found.tolist())) == len(found) == min(k, ROWS)
        np.testing.assert_allclose(cosines_Bk[b][: len(found)], cosine[b, found], atol=1e-6)
        assert (cosines_Bk[b][len(found) :] == -np.inf).all()
        # What scores above the last of either together is found: that is what is promised.
        bound = (0 if words.alone else cosine[b, near[-1]]) + words.weight * (
            others[b, worded[-1]] / max(most_B[b], 1e-9) if len(worded) == k else 0
        )
        above = [j for j in range(ROWS) if score[b, j] > bound + 1e-6 and j // 3 != ANCHORS[b] // 3]
        best = sorted(above, key=lambda j: -score[b, j])[: max(0, k - 3)]  # three rows may be own
        assert set(best) <= set(found.tolist())


@pytest.mark.parametrize("kind", ["flat", "exact_torch"])
@pytest.mark.parametrize("alone", [False, True])
@pytest.mark.parametrize("count", [2, 3, 5])
def test_any_number_of_shards_finds_the_same_bits(count: int, alone: bool, kind: str) -> None:
    words = WordQuery(QUERY_TEXTS, 0.3, alone)
    whole = shard(kind=kind)
    shards = [shard(number, count, kind) for number in range(count)]
    for k in (1, 7, 25):
        (expected, ids), most = merge_offers(offers([whole], k), words=words)
        for order in (shards, shards[::-1]):
            (found, found_ids), found_most = merge_offers(offers(order, k), words=words)
            np.testing.assert_array_equal(found_ids, ids)
            np.testing.assert_array_equal(found, expected)
            np.testing.assert_array_equal(found_most, most)
    hits = Hits(ids, expected, VERSION, queries_BD=VECTORS[ANCHORS], most_words_B=most)
    wanted = np.arange(ROWS)[::-3]
    for asked in (words, None):
        parts = np.zeros((len(ANCHORS), len(wanted)), np.float32)
        for s in shards:
            mine = wanted % count == s.number
            parts[:, mine] = s.scores(hits, wanted[mine], asked)
        np.testing.assert_array_equal(parts, whole.scores(hits, wanted, asked))


def test_scores_of_given_rows_are_those_of_the_search() -> None:
    source = InProcessSource(shard(), corpus_digest="corpus", rows=ROWS)
    source.publish({}, step=0, key="key")
    words = WordQuery(QUERY_TEXTS, 0.3)
    hits = source.search(ANCHORS, k=20, words=words)
    given = np.arange(5, 60)
    np.testing.assert_allclose(source.scores(hits, given, words=words), scores(words)[0][:, given], atol=1e-6)
    np.testing.assert_allclose(source.scores(hits, given), scores(words)[1][:, given], atol=1e-6)
    found = source.scores(hits, np.arange(ROWS), words=words)
    best = np.take_along_axis(found, hits.ids_Bk, 1)
    assert (np.diff(best, axis=1) <= 0).all() and (np.diff(hits.scores_Bk, axis=1) > 0).any()
    plain = source.search(ANCHORS, k=20)
    np.testing.assert_array_equal(
        np.take_along_axis(source.scores(plain, np.arange(ROWS)), plain.ids_Bk, 1), plain.scores_Bk
    )


def test_an_own_row_counts_for_no_more_than_the_best_other_and_does_not_set_the_measure() -> None:
    """It holds the anchor: with its BM25 as the measure, no other row would have any."""
    words = WordQuery(QUERY_TEXTS, 0.3)
    source = InProcessSource(shard(), corpus_digest="corpus", rows=ROWS)
    source.publish({}, step=0, key="key")
    hits = source.search(ANCHORS, k=ROWS, words=words)
    found = source.scores(hits, np.arange(ROWS), words=words)
    cosines = source.scores(hits, np.arange(ROWS))
    by_words = found - cosines
    others = KEYS[ANCHORS, 1, None] != KEYS[:, 1]
    for b in range(len(ANCHORS) - 1):
        assert by_words[b, ANCHORS[b]] == pytest.approx(0.3, abs=1e-6)
        assert by_words[b][others[b]].max() == pytest.approx(0.3, abs=1e-6)
    assert (by_words[-1] == 0).all()


def test_words_are_read_when_they_are_first_asked_for_and_once() -> None:
    made, reads = shard(), []
    read = made._read_words
    made._read_words = lambda: reads.append(1) or read()  # type: ignore[misc, func-returns-value]
    made.search(VERSION, VECTORS[:2], k=3)
    assert reads == []
    for _ in range(2):
        offers([made], 3)
    assert reads == [1]
