"""Rows of a batch that the index takes for right for each other, beside a double loop."""

from __future__ import annotations

import numpy as np
import pytest

from hncse_ray.negatives import rows_too_close, score_limit


def by_hand(keys: np.ndarray, scores: np.ndarray, own: np.ndarray, limit: float | None, r: int | None) -> set:
    def near(i: int, j: int) -> tuple[bool, bool]:
        others = [(key, score) for key, score in zip(keys[i], scores[i], strict=True) if np.isfinite(score)]
        others = [(key, score) for key, score in others if key != own[i]]
        above = any(key == own[j] and limit is not None and score > np.float32(limit) for key, score in others)
        return above, any(key == own[j] for key, _ in others[: r or 0])

    found = set()
    for i in range(len(own)):
        for j in range(i + 1, len(own)):
            (above, top), (above_too, top_too) = near(i, j), near(j, i)
            if own[i] != own[j] and (above or above_too or (top and top_too)):
                found.add((i, j))
    return found


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize(("limit", "r"), [(0.5, None), (None, 3), (0.8, 2), (None, None), (-2.0, None)])
def test_the_pairs_are_those_of_a_double_loop(seed: int, limit: float | None, r: int | None) -> None:
    rng = np.random.default_rng(seed)
    B, k, rows = 14, 9, 30
    target_of = rng.integers(100, 100 + 20, rows)  # several rows have one target
    own = target_of[rng.choice(rows, B, replace=False)]
    hits = np.stack([rng.choice(rows, k, replace=False) for _ in range(B)])
    scores = -np.sort(-rng.random((B, k)).astype(np.float32), axis=1)
    scores[rng.random(B) < 0.3, 6:] = -np.inf
    limit_B = None if limit is None else np.full(B, limit, np.float32)
    found = rows_too_close(target_of[hits], scores, batch_keys_B=own, limit_B=limit_B, reciprocal=r)
    assert found.shape[1] == 2 and found.dtype == np.int64
    assert set(map(tuple, found.tolist())) == by_hand(target_of[hits], scores, own, limit, r)
    assert len(found) > 0 or (limit is None or limit > 0.5)


def test_the_limit_is_the_stricter_of_the_rules() -> None:
    positive_B = np.array([0.8, 0.4], np.float32)
    assert score_limit(None, None, positive_B) is None
    assert score_limit(0.7, None, positive_B) == pytest.approx([0.7, 0.7])
    assert score_limit(0.7, 0.5, positive_B) == pytest.approx([0.4, 0.2])
    assert score_limit(0.3, 0.5, positive_B) == pytest.approx([0.3, 0.2])


def test_each_anchor_has_its_own_limit() -> None:
    scores = np.array([[0.5], [0.5], [0.5], [0.5]], np.float32)
    keys, own = np.array([[11], [10], [13], [12]]), np.array([10, 11, 12, 13])
    limit_B = np.array([0.6, 0.6, 0.4, 0.6], np.float32)
    assert rows_too_close(keys, scores, batch_keys_B=own, limit_B=limit_B, reciprocal=None).tolist() == [[2, 3]]
