"""The label-free set ``pseudo-relevance``: who counts as right, and that a query's own text is not ranked."""

from __future__ import annotations

import numpy as np

from hncse_ray.evaluation import evaluate_retrieval
from hncse_ray.training.label_free import pseudo_relevance_set

TOPICS = ("osmium", "quince", "zither", "yucca", "vellum")  # twelve rows each
ROWS = [f"{TOPICS[i % 5]} plain notes {chr(97 + i // 5)}{chr(97 + i % 5)}" for i in range(60)]


class Vectors:
    """An encoder that gives each text a fixed random direction, and texts of one group nearly the same."""

    def __init__(self, group: dict[str, int] | None = None) -> None:
        self.group = group or {}

    def __call__(self, texts: list[str]) -> np.ndarray:
        found = []
        for text in texts:
            seed = self.group.get(text, sum(text.encode()) + 1000)
            own = np.random.default_rng(sum(text.encode())).normal(size=512)
            found.append(np.random.default_rng(seed).normal(size=512) + 0.01 * own)
        return np.array(found, np.float32)


def test_words_decide_where_the_base_knows_nothing() -> None:
    asked = {place: f"{TOPICS[place % 5]} plain" for place in range(10)}
    found = pseudo_relevance_set(ROWS, asked, Vectors())
    assert found.queries == tuple(asked.values())
    for own, right in zip(found.own, found.grades, strict=True):
        assert len(right) == 10 and own not in right
        assert all(at % 5 == own % 5 for at in right)


def test_the_best_rows_ask_again_with_their_words() -> None:
    # "kumquat" stands in four rows only, all of which hold "azimuth"; seven others hold "azimuth" alone.
    rows = [f"kumquat azimuth row {i}" for i in range(4)] + [f"azimuth line {i}" for i in range(7)]
    rows += [f"filler {i} text" for i in range(20, 80)]
    found = pseudo_relevance_set(rows, {0: "kumquat"}, Vectors())
    right = set(found.grades[0])
    assert {1, 2, 3} <= right and len(right & set(range(4, 11))) >= 5


def test_near_rows_count_where_no_word_is_shared() -> None:
    group = dict.fromkeys(ROWS[:9], 7) | {"something else": 7}
    found = pseudo_relevance_set(ROWS, {0: "something else"}, Vectors(group))
    assert set(range(1, 9)) <= set(found.grades[0])


def test_an_encoder_that_finds_only_the_own_row_earns_nothing() -> None:
    data = pseudo_relevance_set(ROWS, {place: f"{TOPICS[place % 5]} plain" for place in range(10)}, Vectors())
    assert evaluate_retrieval(Vectors(dict(zip(ROWS, range(60), strict=True))), data)["ndcg@10"] < 0.6
    by_topic = {row: 5000 + at % 5 for at, row in enumerate(ROWS)}
    by_topic |= {query: 5000 + own % 5 for query, own in zip(data.queries, data.own, strict=True)}
    assert evaluate_retrieval(Vectors(by_topic), data)["recall@100"] == 1
    assert evaluate_retrieval(Vectors(by_topic), data)["ndcg@10"] > 0.6
