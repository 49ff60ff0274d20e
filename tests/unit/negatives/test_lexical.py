"""BM25 of a shard's rows: beside a plain one, alike on any number of shards, in any script."""

from __future__ import annotations

import math
import re
from collections import Counter

import numpy as np
import pytest

from hncse_ray.negatives.lexical import LexicalIndex, words

WORDS = [f"w{i}" for i in range(200)]
RNG = np.random.default_rng(3)
TEXTS = [
    " ".join(
        RNG.choice(WORDS, size=RNG.integers(9, 60), p=np.arange(200, 0, -1) ** 2.0 / np.sum(np.arange(201) ** 2.0))
    )
    for _ in range(97)
]
TEXTS[5] = TEXTS[50] = TEXTS[90]
QUERIES = [*TEXTS[:9], "w1 w90 w90 w150", "nothing of it", "W93, w94; w95!"]
KEYS = np.arange(97)[:, None]


def plain(texts: list[str], query: str) -> list[float]:
    """BM25 by dictionaries; words of more than a quarter of the texts are left out."""
    bags = [Counter(re.findall(r"\w+", text.lower())) for text in texts]
    mean = sum(sum(bag.values()) for bag in bags) / len(bags)
    found = []
    for bag in bags:
        score = 0.0
        for word in re.findall(r"\w+", query.lower()):
            holders = sum(word in other for other in bags)
            if word in bag and holders <= max(10, len(texts) / 4):
                idf = math.log(1 + (len(texts) - holders + 0.5) / (holders + 0.5))
                score += idf * bag[word] * 2.2 / (bag[word] + 1.2 * (0.25 + 0.75 * sum(bag.values()) / mean))
        found.append(score)
    return found


@pytest.mark.parametrize("query", QUERIES)
def test_scores_are_those_of_a_plain_bm25(query: str) -> None:
    index = LexicalIndex(TEXTS, keys_nc=KEYS)
    expected = plain(TEXTS, query)
    np.testing.assert_allclose(index.scores(query), expected, rtol=1e-5)
    assert any(expected) == (query != "nothing of it")


@pytest.mark.parametrize("count", [2, 3, 5])
def test_a_row_scores_the_same_bits_on_any_number_of_shards(count: int) -> None:
    whole = LexicalIndex(TEXTS, keys_nc=KEYS)
    for number in range(count):
        part = LexicalIndex(iter(TEXTS), keys_nc=KEYS[number::count], number=number, count=count)
        assert part.rows == len(TEXTS[number::count])
        for query in QUERIES:
            np.testing.assert_array_equal(part.scores(query), whole.scores(query)[number::count])


def test_the_best_are_not_the_anchors_own_and_ties_go_by_row() -> None:
    keys_N2 = np.stack([np.arange(97), np.arange(97) // 4 + 1000], axis=1)  # documents of four rows
    for number, count in ((0, 1), (1, 3)):
        index = LexicalIndex(TEXTS, keys_nc=keys_N2[number::count], number=number, count=count)
        for row in (0, 5, 50, 96):
            scores = index.scores(TEXTS[row])
            others = [n for n in range(index.rows) if (n * count + number) // 4 != row // 4 and scores[n] > 0]
            expected = sorted(others, key=lambda n: (-scores[n], n))
            for k in (1, 2, 7, 500):
                assert index.best(scores, k, keys_c=keys_N2[row]).tolist() == expected[:k]
    twins = [5, 50, 90]
    best = LexicalIndex(TEXTS, keys_nc=KEYS).best(LexicalIndex(TEXTS, keys_nc=KEYS).scores(TEXTS[5]), 2, keys_c=KEYS[5])
    assert best.tolist() == twins[1:]


def test_rows_that_share_any_key_are_an_anchors_own() -> None:
    keys_N2 = np.array([[1, 10], [2, 20], [10, 30], [4, 10]])
    index = LexicalIndex(["a b", "a c", "a d", "a e"], keys_nc=keys_N2)
    assert sorted(set(index.own(keys_N2[0]).tolist())) == [0, 2, 3]
    assert index.best(index.scores("a"), 5, keys_c=keys_N2[0]).tolist() == [1]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("The STRASSE, the Straße: x_1!", ["the", "strasse", "the", "strasse", "x", "1"]),
        ("Été naïve don't", ["été", "naïve", "don", "t"]),
        ("我爱北京 and 猫", ["我爱", "爱北", "北京", "and", "猫"]),
        ("東京タワー3号", ["東京", "京タ", "タワ", "ワー", "3", "号"]),
        ("ภาษา", ["ภา", "าษ", "ษา"]),
        ("한국어 검색", ["한국어", "검색"]),
        (" ... ", []),
    ],
)
def test_words_of_any_script(text: str, expected: list[str]) -> None:
    assert list(words(text)) == expected


def test_a_corpus_without_words_scores_nothing() -> None:
    index = LexicalIndex(["...", "!"], keys_nc=KEYS[:2])
    assert index.scores("a word").tolist() == [0, 0]
    assert index.best(index.scores("a word"), 3, keys_c=KEYS[0]).tolist() == []
    assert LexicalIndex(["a"], keys_nc=KEYS[:0], number=1, count=2).scores("a").tolist() == []
