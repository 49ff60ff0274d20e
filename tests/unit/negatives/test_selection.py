import itertools
import time
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hncse_ray.negatives.selection import SelectionRules, select

RULES = SelectionRules(
    per_anchor=2, max_score=None, relative_margin=None, skip_hardest=0, sampling="top", temperature=0.1
)
KEYS = ["itself", "same_content", "same_document", "in_batch", "max_score", "relative_margin"]
KEYS += ["skip_hardest"]
# Rows 3 and 9 are of one document, so are 6 and 107; each other row has one of its own.
DOCUMENTS = np.arange(30_000)
DOCUMENTS[[9, 107]] = 3, 6


def hash_of(ids):
    """Content hash of a row: rows 0..4 are copies of 100..104, all others differ."""
    ids = np.asarray(ids)
    return (np.where((ids >= 100) & (ids < 105), ids - 100, ids) * 7919 + 13) % (1 << 40)


def contents(ids):
    """Rows 7 and 8 have the positive of row 10; that of row 11 is what row 2 holds; each other is its own."""
    ids = np.asarray(ids)
    targets = np.where((ids == 7) | (ids == 8), 10, np.where(ids == 11, 2, ids))
    return np.stack([hash_of(ids), hash_of(targets)], axis=-1)


def shared(row, other):
    return not set(contents(row).tolist()).isdisjoint(contents(other).tolist())


def run(
    ids,
    scores,
    rows,
    *,
    rules=RULES,
    positive_score=1.0,
    seed=(0, 0),
    documents=DOCUMENTS,
    whole=None,
    first=0,
    **changes,
):
    return select(
        np.array(ids),
        np.array(scores, np.float32),
        row_ids_B=np.array(rows),
        contents=contents,
        documents=documents,
        positive_score=positive_score,
        rules=replace(rules, **changes),
        seed=seed,
        batch_ids=whole,
        first=first,
    )


def removed(selection):
    assert list(selection.removed) == KEYS
    assert all(type(count) is int for count in selection.removed.values())
    return {name: count for name, count in selection.removed.items() if count}


def naive_fate(i, ids, scores, rows, rules, positive_score):
    """Name what removes each hit of anchor i, one after the other: a rule, "no hit" or "alive"."""
    fates, alive = [], 0
    for hit, score in zip(ids[i], np.array(scores[i], np.float32), strict=True):
        if hit < 0:
            fate = "no hit"
        elif hit == rows[i]:
            fate = "itself"
        elif shared(hit, rows[i]):
            fate = "same_content"
        elif DOCUMENTS[hit] == DOCUMENTS[rows[i]]:
            fate = "same_document"
        elif rules.exclude_batch and any(shared(hit, row) for row in rows):
            fate = "in_batch"
        elif rules.max_score is not None and score > np.float32(rules.max_score):
            fate = "max_score"
        elif rules.relative_margin is not None and score > np.float32(positive_score * (1 - rules.relative_margin)):
            fate = "relative_margin"
        else:
            alive += 1
            fate = "skip_hardest" if alive <= rules.skip_hardest else "alive"
        fates.append(fate)
    return fates


@st.composite
def cases(draw):
    B, k = draw(st.integers(1, 6)), draw(st.integers(0, 8))
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    pool = np.array([*range(12), *range(100, 108)])
    rows = rng.choice(pool, B, replace=False)
    ids, scores = np.full((B, k), -1), np.full((B, k), -np.inf)
    for i in range(B):
        n = int(rng.integers(0, k + 1))
        ids[i, :n] = rng.choice(pool, n, replace=False)
        scores[i, :n] = np.sort(rng.integers(-2, 11, n) / 10)[::-1]
    rules = SelectionRules(
        per_anchor=draw(st.integers(1, 10)),
        max_score=draw(st.sampled_from([None, 0.7, 0.9])),
        relative_margin=draw(st.sampled_from([None, 0.1, 0.5])),
        skip_hardest=draw(st.integers(0, 3)),
        sampling=draw(st.sampled_from(["top", "uniform", "softmax", "bands"])),
        bands=draw(st.sampled_from([(), (1,), (1, 3)])),
        temperature=draw(st.sampled_from([0.01, 0.1, 10.0])),
        exclude_batch=draw(st.booleans()),
    )
    return ids, scores, rows, rules, draw(st.sampled_from([0.8, 1.0]))


@settings(max_examples=400, deadline=None)
@given(cases())
def test_selected_removed_and_left_over_are_all_the_hits(case):
    ids, scores, rows, rules, positive_score = case
    selection = run(ids, scores, rows, rules=rules, positive_score=positive_score)
    m = rules.per_anchor
    assert selection.ids_Bm.shape == selection.scores_Bm.shape == selection.mask_Bm.shape == (len(rows), m)
    assert (selection.ids_Bm.dtype, selection.scores_Bm.dtype, selection.mask_Bm.dtype) == (
        np.int64,
        np.float32,
        np.bool_,
    )
    fates = [naive_fate(i, ids, scores, rows, rules, positive_score) for i in range(len(rows))]
    for i, mine in enumerate(fates):
        alive = {int(ids[i, place]): place for place, fate in enumerate(mine) if fate == "alive"}
        n = min(m, len(alive))  # as many as there can be, and at the front
        assert selection.mask_Bm[i].tolist() == [True] * n + [False] * (m - n)
        chosen = selection.ids_Bm[i, :n].tolist()
        assert set(chosen) <= alive.keys()
        positions = [alive[row] for row in chosen]
        assert positions == sorted(set(positions))  # falling scores, no row twice
        np.testing.assert_array_equal(selection.scores_Bm[i, :n], scores[i, positions].astype(np.float32))
        assert (selection.ids_Bm[i, n:] == -1).all() and (selection.scores_Bm[i, n:] == 0).all()
        if rules.sampling == "top":
            assert positions == sorted(alive.values())[:n]
        barred = [int(ids[i, p]) if fate in ("max_score", "relative_margin") else -1 for p, fate in enumerate(mine)]
        assert selection.barred_Bk[i].tolist() == barred
    assert selection.removed == {name: sum(fate.count(name) for fate in fates) for name in KEYS}
    assert list(selection.removed) == KEYS


@settings(max_examples=150, deadline=None)
@given(cases(), st.data())
def test_a_part_of_a_batch_is_chosen_for_as_in_the_whole(case, data):
    ids, scores, rows, rules, positive_score = case
    start = data.draw(st.integers(0, len(rows)))
    part = slice(start, data.draw(st.integers(start, len(rows))))
    whole = run(ids, scores, rows, rules=rules, positive_score=positive_score)
    found = run(
        ids[part], scores[part], rows[part], rules=rules, positive_score=positive_score, whole=rows, first=start
    )
    np.testing.assert_array_equal(found.ids_Bm, whole.ids_Bm[part])
    np.testing.assert_array_equal(found.barred_Bk, whole.barred_Bk[part])


@settings(max_examples=150, deadline=None)
@given(cases())
def test_same_arguments_same_outcome_and_nothing_is_written_into_them(case):
    ids, scores, rows, rules, positive_score = case
    before = ids.copy(), scores.copy(), rows.copy()
    np.random.seed(1)
    one = run(ids, scores, rows, rules=rules, positive_score=positive_score)
    np.random.seed(2)
    two = run(ids, scores, rows, rules=rules, positive_score=positive_score)
    np.testing.assert_array_equal(one.ids_Bm, two.ids_Bm)
    assert one.removed == two.removed
    for array, kept in zip((ids, scores, rows), before, strict=True):
        np.testing.assert_array_equal(array, kept)


@settings(max_examples=150, deadline=None)
@given(cases(), st.randoms(use_true_random=False))
def test_top_does_not_depend_on_the_order_of_the_batch(case, random):
    ids, scores, rows, rules, positive_score = case
    rules = replace(rules, sampling="top")
    order = random.sample(range(len(rows)), len(rows))
    straight = run(ids, scores, rows, rules=rules, positive_score=positive_score)
    turned = run(ids[order], scores[order], rows[order], rules=rules, positive_score=positive_score)
    np.testing.assert_array_equal(straight.ids_Bm[order], turned.ids_Bm)
    assert straight.removed == turned.removed


@settings(max_examples=150, deadline=None)
@given(cases(), st.data())
def test_an_anchor_does_not_depend_on_the_hits_of_the_others(case, data):
    ids, scores, rows, rules, positive_score = case
    i = data.draw(st.integers(0, len(rows) - 1))
    changed = np.where(np.arange(len(rows))[:, None] == i, ids, -1)
    one = run(ids, scores, rows, rules=rules, positive_score=positive_score)
    two = run(changed, scores, rows, rules=rules, positive_score=positive_score)
    np.testing.assert_array_equal(one.ids_Bm[i], two.ids_Bm[i])


# One anchor, row 0 (a copy of row 100); the batch's other row is 1 (a copy of row 101).
HITS = [0, 100, 1, 101, 20, 21, 22, 23]
SCORES = [1.0, 1.0, 0.95, 0.95, 0.9, 0.8, 0.7, 0.6]
BATCH = ([HITS, [-1] * 8], [SCORES, [-np.inf] * 8], [0, 1])


@pytest.mark.parametrize(
    ("changes", "chosen", "counts"),
    [
        ({}, [20, 21], {"itself": 1, "same_content": 1, "in_batch": 2}),
        ({"exclude_batch": False}, [1, 101], {"itself": 1, "same_content": 1}),
        ({"max_score": 0.85}, [21, 22], {"itself": 1, "same_content": 1, "in_batch": 2, "max_score": 1}),
        ({"max_score": 0.9}, [20, 21], {"itself": 1, "same_content": 1, "in_batch": 2}),  # equal is kept
        ({"relative_margin": 0.3}, [22, 23], {"itself": 1, "same_content": 1, "in_batch": 2, "relative_margin": 2}),
        (
            {"max_score": 0.85, "relative_margin": 0.3},
            [22, 23],
            {"itself": 1, "same_content": 1, "in_batch": 2, "max_score": 1, "relative_margin": 1},
        ),
        ({"skip_hardest": 1}, [21, 22], {"itself": 1, "same_content": 1, "in_batch": 2, "skip_hardest": 1}),
        (
            {"max_score": 0.85, "skip_hardest": 2},
            [23, -1],
            {"itself": 1, "same_content": 1, "in_batch": 2, "max_score": 1, "skip_hardest": 2},
        ),
        ({"skip_hardest": 9}, [-1, -1], {"itself": 1, "same_content": 1, "in_batch": 2, "skip_hardest": 4}),
        ({"per_anchor": 6}, [20, 21, 22, 23, -1, -1], {"itself": 1, "same_content": 1, "in_batch": 2}),
        ({"per_anchor": 9}, [20, 21, 22, 23] + [-1] * 5, {"itself": 1, "same_content": 1, "in_batch": 2}),
    ],
)
def test_each_rule(changes, chosen, counts):
    selection = run(*BATCH, **changes)
    assert selection.ids_Bm[0].tolist() == chosen
    assert not selection.mask_Bm[1].any()
    assert removed(selection) == counts


@pytest.mark.parametrize("limit", np.linspace(0.05, 0.95, 19).round(2).tolist())
def test_a_score_that_is_equal_in_fp32_is_kept(limit):
    over = float(np.nextafter(np.float32(limit), np.float32(2)))
    selection = run([[30, 31]], [[over, limit]], [5], max_score=limit)
    assert selection.ids_Bm.tolist() == [[31, -1]]


def test_relative_margin_is_relative_to_the_positive_score():
    assert run([[30, 31]], [[0.8, 0.7]], [5], relative_margin=0.1, positive_score=0.8).ids_Bm.tolist() == [[31, -1]]
    assert run([[30, 31]], [[0.8, 0.7]], [5], relative_margin=0.1, positive_score=0.9).ids_Bm.tolist() == [[30, 31]]
    own, hits = np.array([0.8, 0.9], np.float32), ([[30, 31], [30, 31]], [[0.8, 0.7], [0.8, 0.7]])
    assert run(*hits, [5, 6], relative_margin=0.1, positive_score=own).ids_Bm.tolist() == [[31, -1], [30, 31]]


@pytest.mark.parametrize("sampling", ["top", "uniform", "softmax", "bands"])
@pytest.mark.parametrize(("B", "k"), [(0, 3), (2, 0), (0, 0), (2, 3)])
def test_no_hits_at_all(B, k, sampling):
    selection = run(
        np.full((B, k), -1),
        np.full((B, k), -np.inf),
        np.arange(B),
        per_anchor=4,
        skip_hardest=1,
        sampling=sampling,
    )
    assert selection.ids_Bm.shape == (B, 4) and not selection.mask_Bm.any()
    assert removed(selection) == {}


def test_what_no_hit_holds_does_not_matter():
    selection = select(
        np.array([[0, -1]]),
        np.array([[0.5, -np.inf]], np.float32),
        row_ids_B=np.array([1]),
        contents=lambda ids: np.array([1, 99])[ids][..., None],  # of row -1: that of the last
        documents=np.array([3, 4]),
        positive_score=1.0,
        rules=RULES,
        seed=(0,),
    )
    assert selection.ids_Bm.tolist() == [[0, -1]] and removed(selection) == {}


def test_rows_of_one_document_are_negatives_where_they_are_not_kept_apart():
    ids, scores = [[9, 30, 31]], [[0.5, 0.4, 0.3]]
    assert removed(run(ids, scores, [3])) == {"same_document": 1}
    assert run(ids, scores, [3], documents=None).ids_Bm.tolist() == [[9, 30]]


def test_rows_of_one_positive_or_whose_positive_is_the_anchor_are_no_negatives():
    ids, scores = [[8, 30, 31], [11, 30, 31], [2, 30, 31], [10, 30, 31]], [[0.5, 0.4, 0.3]] * 4
    selection = run(ids, scores, [7, 2, 11, 8], exclude_batch=False)
    assert selection.ids_Bm.tolist() == [[30, 31]] * 4
    assert removed(selection) == {"same_content": 4}


def frequencies(sampling, *, n=20_000, per_anchor=2, **changes):
    """How often each of four hits is chosen, and how often each pair, over n anchors with the same hits."""
    ids, scores = np.tile([30, 31, 32, 33, -1], (n, 1)), np.tile([0.9, 0.8, 0.6, 0.3, -np.inf], (n, 1))
    selection = run(ids, scores, np.arange(n) + 1000, per_anchor=per_anchor, sampling=sampling, seed=(3, 5), **changes)
    assert selection.mask_Bm.all()
    assert (np.diff(selection.scores_Bm, axis=1) < 0).all()
    pairs = [tuple(row) for row in selection.ids_Bm.tolist()]
    return {key: pairs.count(key) / n for key in itertools.combinations([30, 31, 32, 33], per_anchor)}


def expected_frequencies(weights, per_anchor):
    """Chances of each set under successive draws without replacement."""
    chances = {}
    for draws in itertools.permutations(weights, per_anchor):
        left, chance = sum(weights.values()), 1.0
        for row in draws:
            chance, left = chance * weights[row] / left, left - weights[row]
        key = tuple(sorted(draws))
        chances[key] = chances.get(key, 0) + chance
    return chances


@pytest.mark.parametrize("per_anchor", [1, 2, 3])
@pytest.mark.parametrize(("sampling", "temperature"), [("uniform", 0.1), ("softmax", 0.2), ("softmax", 1.0)])
def test_sampling_frequencies(sampling, temperature, per_anchor):
    n = 20_000
    heat = np.inf if sampling == "uniform" else temperature
    scores = zip([30, 31, 32, 33], [0.9, 0.8, 0.6, 0.3], strict=True)
    expected = expected_frequencies({row: float(np.exp(score / heat)) for row, score in scores}, per_anchor)
    found = frequencies(sampling, n=n, per_anchor=per_anchor, temperature=temperature)
    assert found.keys() == expected.keys()
    for key, chance in expected.items():
        assert abs(found[key] - chance) < 4.5 * np.sqrt(chance * (1 - chance) / n), key


def test_softmax_at_a_low_temperature_is_top():
    assert frequencies("softmax", n=500, temperature=1e-6)[30, 31] == 1.0


def test_another_seed_another_draw_and_batches_of_one_run_differ():
    def chosen(seed):
        return run(
            [list(range(30, 62))] * 8, [np.linspace(1, 0, 32)] * 8, range(200, 208), sampling="uniform", seed=seed
        )

    draws = [chosen(seed).ids_Bm.tolist() for seed in [(0, 0), (0, 1), (1, 0), (1, 1), (0, 10), (2**40, 3)]]
    assert all(a != b for a, b in itertools.combinations(draws, 2))
    assert chosen([0, 1]).ids_Bm.tolist() == draws[1]
    assert draws[0][0] != draws[0][1]  # nor do the anchors share a draw


def test_uniform_draws_from_all_survivors_after_the_hardest_are_skipped():
    ids, scores = [list(range(30, 40))] * 400, [np.linspace(0.9, 0.1, 10)] * 400
    selection = run(ids, scores, range(200, 600), sampling="uniform", skip_hardest=3, max_score=0.85)
    assert set(selection.ids_Bm.ravel().tolist()) == set(range(34, 40))


@pytest.mark.parametrize(
    ("changes", "names"),
    [
        ({"ids_Bk": np.zeros(3, int)}, "ids_Bk"),
        ({"scores_Bk": np.zeros((2, 4), np.float32)}, "scores_Bk"),
        ({"row_ids_B": np.zeros(3, int)}, "row_ids_B"),
        ({"scores_Bk": np.full((2, 3), np.nan, np.float32)}, "not finite"),
        ({"positive_score": float("nan"), "rules": replace(RULES, relative_margin=0.1)}, "positive_score"),
        ({"seed": (-1, 0), "rules": replace(RULES, sampling="uniform")}, "non-negative"),
    ],
)
def test_wrong_arguments(changes, names):
    arguments = {
        "ids_Bk": np.arange(6).reshape(2, 3),
        "scores_Bk": np.zeros((2, 3), np.float32),
        "row_ids_B": np.array([8, 9]),
        "contents": contents,
        "positive_score": 1.0,
        "rules": RULES,
        "seed": (0, 0),
    } | changes
    with pytest.raises(ValueError, match=names):
        select(arguments.pop("ids_Bk"), arguments.pop("scores_Bk"), **arguments)


@pytest.mark.parametrize(
    "changes",
    [{"per_anchor": 0}, {"skip_hardest": -1}, {"sampling": "best"}, {"temperature": 0.0}, {"temperature": np.nan}],
)
def test_wrong_rules(changes):
    with pytest.raises(ValueError, match=next(iter(changes))):
        replace(RULES, **changes)


def test_a_large_batch_takes_little_time():
    rng = np.random.default_rng(0)
    B, k = 2048, 64
    ids = np.argsort(rng.random((B, 4096)), axis=1)[:, :k] + 10_000
    scores = np.sort(rng.random((B, k)), axis=1)[:, ::-1]
    begin = time.perf_counter()
    selection = run(ids, scores, np.arange(B), rules=replace(RULES, max_score=0.95, sampling="softmax"))
    assert time.perf_counter() - begin < 5  # 0.2 s where it was written
    assert selection.mask_Bm.any()


def test_bands_are_drawn_from_in_turn():
    """Ranks are those of what is left: rows 0 (itself) and 100 (its copy) have none."""
    ids = [[0, 100, *range(200, 240)]]
    scores = [np.linspace(0.9, 0.1, 42)]
    seen = set()
    for seed in range(200):
        how = {"sampling": "bands", "bands": (5, 30), "seed": (seed, 3)}
        chosen = run(ids, scores, [0], per_anchor=3, **how).ids_Bm[0] - 200
        assert [np.searchsorted((5, 30), rank, side="right") for rank in chosen] == [0, 1, 2]
        seen |= set(chosen.tolist())
        more = run(ids, scores, [0], per_anchor=20, **how).ids_Bm[0] - 200
        # The first band is used up after five turns, the last after ten.
        assert np.bincount(np.searchsorted((5, 30), more, side="right")).tolist() == [5, 8, 7]
        assert set(chosen) <= set(more)
    assert seen == set(range(40))


def test_a_band_with_nobody_left_is_passed_over():
    chosen = run([[0, 200, 201, 202]], [[1, 0.9, 0.8, 0.7]], [0], per_anchor=3, sampling="bands", bands=(2, 30))
    assert sorted(chosen.ids_Bm[0].tolist()) == [200, 201, 202]
