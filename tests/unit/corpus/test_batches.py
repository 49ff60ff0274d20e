import tracemalloc

import numpy as np
import pytest

from hncse_ray.corpus import BatchPlan, Shuffled, batch_mask, batches, pad_rows, rank_slice
from hncse_ray.errors import DataError

LENGTHS = np.random.default_rng(0).integers(3, 33, 10_007)


def plan(**changes):
    arguments = {"batch_size": 64, "seed": 1, "bucket_by_length": True, "min_batch": 2} | changes
    return BatchPlan(arguments.pop("lengths", LENGTHS), **arguments)


def epoch(plan, number=0):
    return [plan.batch(number * plan.batches_per_epoch + i) for i in range(plan.batches_per_epoch)]


def test_pad_rows():
    ids, mask = pad_rows([np.array([5, 6, 7], np.int32), np.array([8], np.int32)], pad_id=9)
    assert ids.tolist() == [[5, 6, 7], [8, 9, 9]]
    assert mask.tolist() == [[1, 1, 1], [1, 0, 0]]
    assert ids.dtype == mask.dtype == np.int64


def test_pad_rows_with_pad_id_inside_a_row_counts_it_as_a_token():
    _, mask = pad_rows([np.array([0, 1]), np.array([2])], pad_id=0)
    assert mask.tolist() == [[1, 1], [1, 0]]


def test_pad_rows_of_nothing():
    ids, mask = pad_rows([], pad_id=0)
    assert ids.shape == mask.shape == (0, 0)


def test_rows_that_agree_in_any_key_do_not_repel_each_other():
    hashes, documents = np.array([7, -3, 7, 5]), np.array([1, 2, 3, 2])
    assert batch_mask(hashes[1:]) is None and batch_mask() is None
    yes, no = True, False
    assert batch_mask(hashes).tolist() == [
        [no, yes, no, yes],
        [yes, no, yes, yes],
        [no, yes, no, yes],
        [yes, yes, yes, no],
    ]
    both = batch_mask(hashes, documents)
    assert both.tolist() == (batch_mask(hashes) & batch_mask(documents)).tolist()
    assert batch_mask(hashes, np.arange(4)).tolist() == batch_mask(hashes).tolist()


@pytest.mark.parametrize("bucket", [False, True])
@pytest.mark.parametrize("n", [2, 63, 64, 65, 66, 5000, 10_007])
def test_an_epoch_holds_every_row_once(bucket, n):
    batches = epoch(plan(lengths=LENGTHS[:n], bucket_by_length=bucket))
    rows = np.concatenate(batches)
    assert len(set(rows.tolist())) == len(rows) == (n if n % 64 != 1 else n - 1)
    assert all(len(batch) == 64 for batch in batches[:-1])
    assert all(batch.dtype == np.int64 for batch in batches)


def test_a_trailing_batch_below_the_least_is_dropped():
    assert plan(lengths=LENGTHS[:70], min_batch=6).batches_per_epoch == 2
    assert [len(b) for b in epoch(plan(lengths=LENGTHS[:70], min_batch=7))] == [64]


def test_same_arguments_same_batches_and_each_argument_matters():
    def rows(seed, number):
        return np.concatenate(epoch(plan(seed=seed), number)).tolist()

    assert rows(1, 0) == rows(1, 0)
    assert rows(1, 0) != rows(2, 0)
    assert rows(1, 0) != rows(1, 1)


def test_a_batch_is_a_function_of_its_number_alone():
    a, b = plan(), plan()
    expected = [batch.tolist() for number in range(3) for batch in epoch(a, number)]
    backwards = [b.batch(step).tolist() for step in reversed(range(3 * b.batches_per_epoch))]
    assert backwards[::-1] == expected


def test_bucketing_cuts_padding():
    def padding(bucket):
        batches = epoch(plan(bucket_by_length=bucket))
        return sum(int((LENGTHS[b].max() - LENGTHS[b]).sum()) for b in batches)

    assert padding(True) < 0.2 * padding(False)


def test_bucketed_batches_are_in_no_order_of_length():
    means = [LENGTHS[batch].mean() for batch in epoch(plan())[:-1]]
    correlation = np.corrcoef(means, np.arange(len(means)))[0, 1]
    assert abs(correlation) < 0.3
    assert any((np.diff(LENGTHS[batch]) < 0).any() for batch in epoch(plan()))


def test_rows_of_a_batch_cannot_be_changed_by_a_user():
    with pytest.raises(ValueError, match="read-only"):
        plan().batch(0)[0] = 1


class Watched:
    """Lengths of so many rows that nobody could hold them; notes which are asked for."""

    def __init__(self, rows):
        self.rows, self.asked = rows, []

    def __len__(self):
        return self.rows

    def __getitem__(self, ids):
        self.asked.append(ids)
        return ids % 30


def test_of_ten_billion_rows_a_batch_looks_at_those_of_its_window_alone():
    lengths = Watched(10**10)
    big = plan(lengths=lengths, left_out=np.arange(0, 10**6, 7))
    tracemalloc.start()
    rows = [big.batch(step) for step in (0, 63, 64, big.batches_per_epoch - 1, 5 * big.batches_per_epoch + 77)]
    assert tracemalloc.get_traced_memory()[1] < 2**22
    tracemalloc.stop()
    assert len(lengths.asked) == 3 and max(map(len, lengths.asked)) <= 64 * 64
    assert all(len(set(of_one.tolist())) == len(of_one) for of_one in rows)
    assert max(int(of_one.max()) for of_one in rows) > 9 * 10**9
    runs = np.sort(lengths.asked[0])
    assert (np.diff(runs) == 1).mean() > 0.9  # rows that are neighbours are read together


@pytest.mark.parametrize("left_out", [None, np.arange(100, 4000, 3)])
def test_large_corpora_are_cut_into_blocks_and_every_row_still_comes_once(monkeypatch, left_out):
    monkeypatch.setattr(batches, "_LEAST_BLOCKS", 300)
    big = plan(left_out=left_out, min_batch=1)
    kept = set(range(len(LENGTHS))) - set([] if left_out is None else left_out.tolist())
    first, second = (np.concatenate(epoch(big, number)) for number in (0, 1))
    assert sorted(first.tolist()) == sorted(second.tolist()) == sorted(kept)
    tails = [set(epoch(plan(left_out=left_out, min_batch=64), number)[-1].tolist()) for number in (0, 1)]
    assert tails[0] != tails[1]
    assert np.corrcoef(first, second)[0, 1] < 0.1


def test_dropped_rows_differ_by_epoch(monkeypatch):
    for blocks in (2**20, 300):
        monkeypatch.setattr(batches, "_LEAST_BLOCKS", blocks)
        some = plan(min_batch=64)
        dropped = [set(range(len(LENGTHS))) - set(np.concatenate(epoch(some, number)).tolist()) for number in (0, 1)]
        assert len(dropped[0]) == len(dropped[1]) == len(LENGTHS) % 64 and dropped[0] != dropped[1]


@pytest.mark.parametrize("size", [1, 2, 3, 10, 64, 1000, 65_537])
def test_an_order_is_a_permutation_and_keys_differ(size):
    orders = [Shuffled(size, (1, key))(np.arange(size)) for key in range(40)]
    assert all(np.array_equal(np.sort(order), np.arange(size)) for order in orders)
    if size >= 10:
        assert len({order.tobytes() for order in orders}) == 40


def test_every_number_is_as_likely_at_every_place_and_beside_every_other():
    size, keys = 7, 7000
    orders = np.stack([Shuffled(size, (key, 3))(np.arange(size)) for key in range(keys)])
    at = np.zeros((size, size))
    beside = np.zeros((size, size))
    for place in range(size):
        np.add.at(at, (place, orders[:, place]), 1)
        np.add.at(beside, (orders[:, place], orders[:, (place + 1) % size]), 1)
    expected = keys / size
    assert ((at - expected) ** 2 / expected).sum() < 85  # chi square, 36 degrees of freedom: 1 in 100,000 is above 83
    off, expected = beside[~np.eye(size, dtype=bool)], keys / (size - 1)
    assert np.abs(off - expected).max() < 6 * np.sqrt(expected)


def test_too_small_a_corpus_is_explained():
    with pytest.raises(DataError, match="3 rows, fewer than the 4"):
        plan(lengths=LENGTHS[:3], min_batch=4)


@pytest.mark.parametrize("world", [1, 2, 3, 7])
@pytest.mark.parametrize("n", [0, 2, 7, 64])
def test_rank_slices_are_those_of_array_split(n, world):
    rows = np.arange(n) * 3
    parts = [rank_slice(rows, rank, world).tolist() for rank in range(world)]
    assert parts == [part.tolist() for part in np.array_split(rows, world)]


def test_rank_out_of_world():
    with pytest.raises(ValueError, match="rank 2"):
        rank_slice(np.arange(4), 2, 2)


def naive_mask(*keys):
    def known(i):
        return [{(k, int(value)) for value in np.atleast_1d(key[i])} for k, key in enumerate(keys)]

    B = len(keys[0])
    return [[all(a.isdisjoint(b) for a, b in zip(known(i), known(j), strict=True)) for j in range(B)] for i in range(B)]


@pytest.mark.parametrize("seed", range(30))
def test_rows_that_share_any_value_of_a_key_do_not_repel_each_other(seed):
    rng = np.random.default_rng(seed)
    B = int(rng.integers(2, 12))
    contents, documents = rng.integers(0, 3 * B, (B, 2)), rng.integers(0, 2 * B, B)
    for keys in ((contents,), (documents,), (contents, documents)):
        expected = naive_mask(*keys)
        mask = batch_mask(*keys)
        if mask is None:
            assert (np.array(expected) == ~np.eye(B, dtype=bool)).all()
        else:
            assert mask.tolist() == expected and (mask == mask.T).all()


def test_a_row_whose_positive_is_itself_is_alike_no_other():
    own = np.arange(5)
    assert batch_mask(np.stack([own, own], axis=1)) is None
    assert batch_mask(np.stack([own, [9, 1, 8, 1, 4]], axis=1)).tolist() == naive_mask(
        np.stack([own, [9, 1, 8, 1, 4]], axis=1)
    )


@pytest.mark.parametrize("bucket", [True, False])
def test_rows_that_are_left_out_are_in_no_batch(bucket):
    left_out = np.array([0, 7, 50, len(LENGTHS) - 1])
    found = plan(batch_size=8, seed=1, bucket_by_length=bucket, min_batch=1, left_out=left_out)
    kept = sorted(set(range(len(LENGTHS))) - set(left_out.tolist()))
    assert found.rows == len(kept) and found.batches_per_epoch == -(-len(kept) // 8)
    for number in (0, 1):
        assert sorted(np.concatenate(epoch(found, number)).tolist()) == kept


def test_without_any_left_out_the_batches_are_as_ever():
    one, two = (plan(batch_size=8, seed=1, bucket_by_length=True, min_batch=1, left_out=rows)
                for rows in (None, np.array([], dtype=np.int64)))  # fmt: skip
    assert all(np.array_equal(a, b) for a, b in zip(epoch(one), epoch(two), strict=True))
