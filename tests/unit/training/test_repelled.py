"""Whom anchors must not be repelled from, beside double loops; and a rank finds of its rows what all find of all."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass, field, fields, replace

import numpy as np
import pytest
import torch
from torch import Tensor

from hncse_ray.negatives import NearHits, near_hits, score_limit
from hncse_ray.objectives import WHOLE, Share
from hncse_ray.training.repelled import ColumnFacts, apart, columns_mask, share_a_key

CPU = torch.device("cpu")


@dataclass(frozen=True)
class Recorded(Share):
    """All rows; keeps what is gathered."""

    gathered: list[Tensor] = field(default_factory=list)

    def gather(self, rows: Tensor) -> Tensor:
        self.gathered.append(rows)
        return rows


@dataclass(frozen=True)
class Part(Share):
    """Some rows, and what the gatherings of all have been."""

    gathered: list[Tensor] = field(default_factory=list)

    def gather(self, rows: Tensor) -> Tensor:
        whole = self.gathered.pop(0)
        assert torch.equal(whole[self.start : self.start + len(rows)], rows)
        return whole


def in_parts(work: Callable[[slice, Share], Tensor], B: int) -> Tensor:
    """What is found of all rows, having seen that two ranks find the same of theirs."""
    recorded = Recorded()
    whole = work(slice(None), recorded)
    for part in (slice(0, B // 3), slice(B // 3, B)):
        share = Part(start=part.start, processes=2, gathered=list(recorded.gathered))
        assert torch.equal(work(part, share), whole[part]) and not share.gathered
    return whole


def rows_of(facts: object, part: slice) -> object:
    return replace(facts, **{f.name: v[part] for f in fields(facts) if (v := getattr(facts, f.name)) is not None})


# ------------------------------------------------------------------------------------------------ rows of the batch


def by_hand(keys: np.ndarray, scores: np.ndarray, own: np.ndarray, limit: float | None, r: int | None) -> set:
    def near(i: int, j: int) -> tuple[bool, bool]:
        others = [(key, score) for key, score in zip(keys[i], scores[i], strict=True) if np.isfinite(score)]
        others = [(key, score) for key, score in others if key != own[i]]
        above = any(key == own[j] and limit is not None and score > np.float32(limit) for key, score in others)
        return above, any(key == own[j] for key, _ in others[: r or 0])

    found = set()
    for i, j in itertools.product(range(len(own)), repeat=2):
        (above, top), (above_too, top_too) = near(i, j), near(j, i)
        if own[i] != own[j] and (above or above_too or (top and top_too)):
            found.add((i, j))
    return found


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize(("limit", "r"), [(0.5, None), (None, 3), (0.8, 2), (None, None), (-2.0, None)])
def test_rows_that_the_index_keeps_apart_are_those_of_a_double_loop(
    seed: int, limit: float | None, r: int | None
) -> None:
    rng = np.random.default_rng(seed)
    B, k, rows = 14, 9, 30
    target_of = rng.integers(100, 100 + 20, rows)  # several rows have one target
    own = target_of[rng.choice(rows, B, replace=False)]
    hits = np.stack([rng.choice(rows, k, replace=False) for _ in range(B)])
    scores = -np.sort(-rng.random((B, k)).astype(np.float32), axis=1)
    scores[rng.random(B) < 0.3, 6:] = -np.inf
    limit_B = None if limit is None else np.full(B, limit, np.float32)
    near = near_hits(target_of[hits], scores, own_B=own, limit_B=limit_B, reciprocal=r)
    found = in_parts(lambda part, share: apart(rows_of(near, part), share, CPU), B)  # type: ignore[arg-type]
    assert {(int(i), int(j)) for i, j in found.nonzero()} == by_hand(target_of[hits], scores, own, limit, r)
    assert found.any() or (limit is None or limit > 0.5)


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
    near: NearHits = near_hits(keys, scores, own_B=own, limit_B=limit_B, reciprocal=None)
    assert apart(near, WHOLE, CPU).nonzero().tolist() == [[2, 3], [3, 2]]


def test_rows_that_share_any_key_are_found() -> None:
    keys = np.array([[1, 2], [3, 4], [2, 5], [6, 3], [7, 7]])
    found = in_parts(lambda part, share: share_a_key(keys[part], share, CPU), 5)
    expected = np.eye(5, dtype=bool)
    for i, j in ((0, 2), (1, 3)):
        expected[i, j] = expected[j, i] = True
    assert found.tolist() == expected.tolist()


# ------------------------------------------------------------------------------------------------ columns


@pytest.mark.parametrize("documents", [True, False])
@pytest.mark.parametrize("seed", range(6))
def test_columns_are_those_of_a_naive_loop(seed: int, documents: bool) -> None:
    rng = np.random.default_rng(seed)
    B, m, k, rows = 7, 3, 5, 40
    contents = np.stack([np.arange(rows) // 2, rng.integers(0, 60, rows)], axis=1) + 1000
    document_of = rng.integers(0, 15, rows)
    anchors = rng.choice(rows, B, replace=False)
    ids, usable = rng.integers(0, rows, (B, m)), rng.random((B, m)) < 0.8
    ids[~usable] = -1
    barred = rng.integers(-1, rows, (B, k))
    facts = ColumnFacts(
        ids_bm=ids,
        contents_bmc=contents[ids],
        documents_bm=document_of[ids] if documents else None,
        row_ids_b=anchors,
        kept_bt=contents[anchors],
        own_documents_b=document_of[anchors] if documents else None,
        barred_bk=barred,
    )

    def work(part: slice, share: Share) -> Tensor:
        own: ColumnFacts = rows_of(facts, part)  # type: ignore[assignment]
        return columns_mask(own, torch.from_numpy(usable[part]), share)

    found, columns = in_parts(work, B), ids.ravel()
    for i, c in itertools.product(range(B), range(B * m)):
        row = columns[c]
        allowed = row >= 0 and row not in columns[:c] and row not in barred[i] and row != anchors[i]
        allowed = allowed and not set(contents[row]) & set(contents[anchors[i]])
        allowed = allowed and not (documents and document_of[row] == document_of[anchors[i]])
        assert bool(found[i, c]) == allowed
    assert 0.2 < found.float().mean() < 0.9


def test_columns_that_are_too_close_to_one_anchor_stay_columns_of_the_others() -> None:
    anchors, ids = np.array([5, 6, 7]), np.array([[31], [30], [6]])
    facts = ColumnFacts(ids, ids[..., None], None, anchors, anchors[:, None], None, np.array([[30], [-1], [99]]))
    found = columns_mask(facts, torch.ones(3, 1, dtype=torch.bool), WHOLE)
    # row 30 is too close to anchor 0; row 6 is anchor 1 itself
    assert found.tolist() == [[True, False, True], [True, True, False], [True, True, True]]
