"""A shard's vector index: exact answers however the rows are cut, memory arithmetic, refusals, threads."""

import threading
from concurrent.futures import ThreadPoolExecutor

import faiss
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from waits import seconds

from hncse_ray.errors import ClusterError, DataError, StorageError
from hncse_ray.negatives import merge_hits, plan_index
from hncse_ray.negatives.index import _ExactIndex, new_index

torch.set_num_threads(1)
faiss.omp_set_num_threads(1)  # OpenMP threads that wait for each other are slow on a busy machine

CPU = torch.device("cpu")
EXACT = ("flat", "exact_torch")
ALL = (*EXACT, "ivf_flat", "ivf_pq")


def unit(x):
    return (x / np.linalg.norm(x, axis=1, keepdims=True)).astype(np.float32)


def random_rows(rows, dimension=24, seed=0):
    return unit(np.random.default_rng(seed).standard_normal((rows, dimension)))


def clustered(rows, dimension=32, clusters=60, seed=0):
    rng = np.random.default_rng(seed)
    centres = rng.standard_normal((clusters, dimension))
    return unit(centres[rng.integers(clusters, size=rows)] + 0.35 * rng.standard_normal((rows, dimension)))


def crowded(rows=3001, dimension=24, seed=1):
    """Exact duplicates by the dozen, and rows that differ by 1e-7: fp32 sums cannot order them."""
    rng = np.random.default_rng(seed)
    base = random_rows(rows // 30, dimension, seed)
    x = base[rng.integers(len(base), size=rows)]
    near = rng.random(rows) < 0.6
    x[near] += rng.choice([-1e-7, 1e-7], size=(near.sum(), dimension)).astype(np.float32)
    return x


def built(vectors, kind="flat", *, folder=None, seed=3, nprobe=32):
    plan = plan_index(kind, rows=len(vectors), dimension=vectors.shape[1], memory_bytes=None, nprobe=nprobe)
    return filled(new_index(plan, device=CPU, folder=folder), vectors, seed=seed)


def filled(index, vectors, *, seed=3):
    order = np.random.default_rng(seed).permutation(len(vectors))
    for part in np.array_split(order, 7):
        index.put(part, vectors[part])
    index.finish()
    return index


def reference(vectors, queries, k):
    """Naive: one float64 sum a pair, rounded to float32; best score first, then the smallest row."""
    scores = np.array([(vectors.astype(np.float64) * q).sum(axis=1) for q in queries.astype(np.float64)], np.float32)
    rows = np.array([sorted(range(len(vectors)), key=lambda i: (-s[i], i))[:k] for s in scores.astype(float)])
    return np.take_along_axis(scores, rows, 1), rows


def assert_same(got, wanted):
    np.testing.assert_array_equal(got[1], wanted[1])
    np.testing.assert_array_equal(got[0], wanted[0])


@pytest.mark.parametrize("kind", EXACT)
@pytest.mark.parametrize("vectors", [random_rows(2500), crowded()], ids=["random", "crowded"])
def test_an_exact_index_answers_as_the_definition_does(kind, vectors):
    queries = np.concatenate([vectors[:40], random_rows(10, seed=9)])
    got = built(vectors, kind).search(queries, 13, threads=2)
    assert got[0].dtype == np.float32 and got[1].dtype == np.int64
    assert_same(got, reference(vectors, queries, 13))


@pytest.mark.parametrize("kind", EXACT)
def test_more_equal_rows_than_any_over_fetch_are_ordered_by_row(kind):
    vectors = random_rows(40_000, dimension=8)  # spans several blocks
    same = np.random.default_rng(0).choice(40_000, 500, replace=False)
    vectors[same] = vectors[same[0]]
    scores, rows = built(vectors, kind).search(vectors[same[:3]], 20, threads=2)
    np.testing.assert_array_equal(rows, np.tile(np.sort(same)[:20], (3, 1)))
    assert (scores == scores[0, 0]).all()


@pytest.mark.parametrize("kind", EXACT)
def test_a_corpus_cut_into_shards_answers_exactly_as_one_index(kind):
    vectors = np.concatenate([crowded(2000), random_rows(1001, seed=5)])
    rng = np.random.default_rng(0)
    queries = np.concatenate([vectors[rng.integers(len(vectors), size=1500)], random_rows(500, seed=6)])
    k = 10
    whole = built(vectors, kind).search(queries, k, threads=2)
    for shards in (1, 2, 3, 5):
        hits = [built(vectors[s::shards], kind).search(queries, k, threads=1 + s % 2) for s in range(shards)]
        ids = [np.where(rows < 0, -1, rows * shards + s) for s, (_, rows) in enumerate(hits)]
        assert_same(merge_hits(np.stack([scores for scores, _ in hits]), np.stack(ids), k=k), whole)


@pytest.mark.parametrize("size", [1, 7, 333])
def test_the_number_of_queries_asked_at_once_changes_nothing(size):
    vectors = crowded(1500)
    index, queries = built(vectors), vectors[:333]
    parts = [index.search(queries[i : i + size], 9, threads=2) for i in range(0, 333, size)]
    whole = index.search(queries, 9, threads=1)
    assert_same([np.concatenate(x) for x in zip(*parts, strict=True)], whole)


def test_flat_agrees_with_faiss():
    vectors, queries = random_rows(5000, 48), random_rows(64, 48, seed=2)
    theirs = faiss.IndexFlatIP(48)
    theirs.add(vectors)
    scores, rows = theirs.search(queries, 10)
    got = built(vectors).search(queries, 10, threads=2)
    np.testing.assert_array_equal(got[1], rows)
    np.testing.assert_allclose(got[0], scores, atol=1e-6)


def test_float16_storage_is_exact_for_what_it_stores():
    """What a GPU does, on the CPU: vectors and queries rounded to float16, then no further loss."""
    vectors, queries = crowded(2000), random_rows(50, seed=4)
    plan = plan_index("exact_torch", rows=2000, dimension=24, memory_bytes=None)
    index = filled(_ExactIndex(plan, CPU, torch.float16), vectors)
    halves = [x.astype(np.float16).astype(np.float32) for x in (vectors, queries)]
    assert_same(index.search(queries, 12, threads=1), reference(*halves, 12))
    np.testing.assert_array_equal(index.vectors(np.array([3, 1])), halves[0][[3, 1]])


@pytest.mark.parametrize("kind", ["flat", "exact_torch", "ivf_flat"])
def test_more_hits_than_rows_are_padded(kind):
    vectors = random_rows(5)
    scores, rows = built(vectors, kind).search(vectors[:2], 8, threads=1)
    assert (np.sort(rows[:, :5], axis=1) == np.arange(5)).all() and (rows[:, 0] == [0, 1]).all()
    assert (rows[:, 5:] == -1).all() and np.isneginf(scores[:, 5:]).all() and np.isfinite(scores[:, :5]).all()


@pytest.mark.parametrize("kind", ALL)
def test_vectors_come_back_by_row(kind):
    vectors = random_rows(300)
    rows = np.array([299, 0, 17, 17])
    got = built(vectors, kind).vectors(rows)
    assert got.dtype == np.float32
    np.testing.assert_allclose(got, vectors[rows], atol=0 if kind in EXACT else 5e-4)


@pytest.mark.parametrize("kind", ALL)
def test_what_a_put_refuses(kind):
    plan = plan_index(kind, rows=300, dimension=8, memory_bytes=None)
    index, vectors = new_index(plan, device=CPU), random_rows(300, 8)
    broken = vectors.copy()
    broken[3, 2], broken[7, 0] = np.nan, np.inf
    with pytest.raises(DataError, match="2 of 300 vectors") as error:
        index.put(np.arange(300), broken)
    assert error.value.where == "index" and "precision" in error.value.hint
    with pytest.raises(DataError, match="never put: 300 of 300 rows"):
        index.finish()
    for rows, part in (([-1], vectors[:1]), ([300], vectors[:1]), ([0], vectors[:2]), ([0], vectors[:1, :4])):
        with pytest.raises(ValueError):
            index.put(np.array(rows), part)
    index.put(np.arange(299), vectors[:299])
    index.put(np.arange(299), vectors[:299])  # counted once
    with pytest.raises(DataError, match="1 of 300 rows"):
        index.finish()
    with pytest.raises(RuntimeError):
        index.search(vectors[:1], 1, threads=1)
    index.put(np.array([299]), vectors[299:])
    index.finish()
    assert index.search(vectors[:1], 1, threads=1)[1].shape == (1, 1)
    with pytest.raises(DataError, match="queries"):
        index.search(broken, 1, threads=1)
    with pytest.raises(RuntimeError):
        index.put(np.array([0]), vectors[:1])


def test_read_only_and_half_precision_input_is_taken():
    vectors = random_rows(50).astype(np.float16)
    vectors.flags.writeable = False
    index = built(vectors)
    assert (index.search(vectors, 1, threads=1)[1][:, 0] == np.arange(50)).all()


@pytest.mark.parametrize("kind", ["flat", "ivf_flat"])
def test_threads_search_at_once_and_bound_their_own_openmp(kind):
    vectors = clustered(4000)
    index = built(vectors, kind, nprobe=8)
    parts = np.array_split(np.arange(480), 8)
    alone = [index.search(vectors[part], 10, threads=1) for part in parts]
    gate, bounds = threading.Barrier(4), {}

    def search(number):
        gate.wait(timeout=seconds(20))
        threads = 1 + number % 2
        hits = index.search(vectors[parts[number]], 10, threads=threads)
        bounds[number] = faiss.omp_get_max_threads() - threads
        return hits

    before = faiss.omp_get_max_threads()
    with ThreadPoolExecutor(4) as pool:
        for got, wanted in zip(pool.map(search, range(8)), alone, strict=True):
            np.testing.assert_array_equal(got[1], wanted[1])
            np.testing.assert_allclose(got[0], wanted[0], atol=1e-6)
    assert faiss.omp_get_max_threads() == before
    if kind == "ivf_flat":
        assert set(bounds.values()) == {0}


@pytest.mark.parametrize("threads", [1, 3])
def test_flat_cuts_the_rows_among_single_threads(threads, monkeypatch):
    vectors, calls, knn = random_rows(5000), [], faiss.knn

    def watched(queries, block, k, **options):
        calls.append((len(block), faiss.omp_get_max_threads()))
        return knn(queries, block, k, **options)

    index, before = built(vectors), faiss.omp_get_max_threads()
    monkeypatch.setattr(faiss, "knn", watched)
    index.search(vectors[:4], 5, threads=threads)
    assert len(calls) == threads and sum(rows for rows, _ in calls) == 5000
    assert {bound for _, bound in calls} == {1} and faiss.omp_get_max_threads() == before


def test_a_near_tie_past_the_over_fetch_is_looked_at_only_where_there_is_one(monkeypatch):
    vectors, seen, whole = random_rows(5000), [], _ExactIndex._all_above
    vectors[100:140] = vectors[100]

    def watched(self, queries_UD, *rest):
        seen.append(len(queries_UD))
        return whole(self, queries_UD, *rest)

    monkeypatch.setattr(_ExactIndex, "_all_above", watched)
    built(vectors).search(vectors[95:105], 10, threads=1)
    assert seen == [5]


def test_ivf_flat_visiting_every_list_finds_what_flat_finds():
    vectors = clustered(4000)
    index = built(vectors, "ivf_flat", nprobe=10_000)
    wanted = built(vectors).search(vectors[:100], 10, threads=1)
    got = index.search(vectors[:100], 10, threads=1)
    assert (got[1] == wanted[1]).mean() > 0.97  # it indexes float16
    np.testing.assert_allclose(got[0], wanted[0], atol=1e-3)


def test_ivf_pq_recalls_most_neighbours_and_fewer_lists_find_fewer():
    vectors = clustered(6000)
    wanted = built(vectors).search(vectors[:200], 10, threads=1)[1]

    def recall(nprobe):
        got = built(vectors, "ivf_pq", nprobe=nprobe).search(vectors[:200], 10, threads=1)[1]
        return np.mean([len(set(a) & set(b)) / 10 for a, b in zip(got, wanted, strict=True)])

    assert recall(32) > 0.5
    assert recall(1) < recall(32)


@pytest.mark.parametrize("kind", ["ivf_flat", "ivf_pq"])
def test_an_ivf_index_leaves_no_file_and_is_reproducible(kind, tmp_path):
    vectors = clustered(1000)
    plan = plan_index(kind, rows=1000, dimension=32, memory_bytes=None)
    index = new_index(plan, device=CPU, folder=tmp_path)
    assert list(tmp_path.iterdir()) == []
    filled(index, vectors)
    assert list(tmp_path.iterdir()) == []
    again = built(vectors, kind, seed=8).search(vectors[:50], 5, threads=1)
    assert_same(index.search(vectors[:50], 5, threads=1), again)


def test_a_folder_that_cannot_hold_the_vectors_is_named(tmp_path):
    plan = plan_index("ivf_flat", rows=1000, dimension=32, memory_bytes=None)
    with pytest.raises(StorageError, match="missing"):
        new_index(plan, device=CPU, folder=tmp_path / "missing")


@pytest.mark.parametrize("kind", ALL)
def test_a_gpu_that_is_not_there_is_refused_not_replaced(kind):
    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    plan = plan_index(kind, rows=1000, dimension=32, memory_bytes=None, on_gpu=True)
    with pytest.raises(ClusterError, match="a GPU index was asked for") as error:
        new_index(plan, device=torch.device("cuda"))
    assert "exact_torch" in error.value.hint
    with pytest.raises(ValueError, match="on_gpu=True"):
        new_index(plan, device=CPU)


def test_memory_is_counted():
    flat = plan_index("flat", rows=1_000_000, dimension=384, memory_bytes=None)
    assert flat.bytes_at_rest == 1_000_000 * 384 * 4
    assert flat.bytes_building == 2 * flat.bytes_at_rest + 1_000_000
    assert (flat.nlist, flat.nprobe, flat.pq_bytes, flat.bytes_on_disk) == (0, 0, 0, 0)
    assert plan_index("flat", rows=10, dimension=6, memory_bytes=None, on_gpu=True).bytes_at_rest == 10 * 6 * 2
    assert "1,000,000 rows x 384" in flat.describe() and "1.54 GB" in flat.describe() and "3.07 GB" in flat.describe()
    pq = plan_index("ivf_pq", rows=1_000_000, dimension=384, memory_bytes=None)
    assert (pq.nlist, pq.nprobe, pq.pq_bytes, pq.bytes_on_disk) == (4000, 32, 96, 768_000_000)
    assert pq.bytes_at_rest == 1_000_000 * (96 + 8) + (4000 + 256) * 384 * 4
    assert "768.0 MB of disk" in pq.describe()
    assert plan_index("ivf_flat", rows=1_000_000, dimension=384, memory_bytes=None).bytes_at_rest > flat.bytes_at_rest


@pytest.mark.parametrize(
    "dimension, on_gpu, wanted", [(768, False, 192), (768, True, 96), (10, False, 2), (7, True, 1)]
)
def test_the_code_of_a_vector_divides_it(dimension, on_gpu, wanted):
    plan = plan_index("ivf_pq", rows=1000, dimension=dimension, memory_bytes=None, on_gpu=on_gpu)
    assert plan.pq_bytes == wanted


@given(rows=st.integers(1, 10**8))
@settings(deadline=None)
def test_lists_have_enough_rows_to_train(rows):
    plan = plan_index("ivf_flat", rows=rows, dimension=8, memory_bytes=None)
    assert plan.nlist >= 1 and plan.nprobe <= plan.nlist <= 4 * rows**0.5
    assert plan.nlist == 1 or plan.nlist * 39 <= rows


def test_auto_takes_the_exact_index_where_it_fits():
    assert plan_index("auto", rows=1000, dimension=384, memory_bytes=None, on_gpu=True).kind == "exact_torch"

    def choose(memory, rows=1_000_000):
        return plan_index("auto", rows=rows, dimension=384, memory_bytes=memory).kind

    flat = plan_index("flat", rows=1_000_000, dimension=384, memory_bytes=None).bytes_building
    assert choose(None) == choose(flat) == "flat"
    assert choose(flat - 1) == "ivf_pq"
    with pytest.raises(ClusterError) as error:
        choose(0.2e9)
    text = str(error.value)
    assert error.value.where == "negatives.index"
    for part in (
        "flat needs (1,000,000 rows x 384 x 4 bytes) x 2 versions",
        "= 3.07 GB",
        "ivf_pq needs",
        "200.0 MB are",
    ):
        assert part in text
    assert "more shards" in error.value.hint and "corpus.max_sentences" in error.value.hint
    with pytest.raises(ClusterError) as error:
        choose(1000, rows=200)
    assert "ivf_pq" not in error.value.what


def test_an_index_asked_for_by_name_is_never_replaced():
    with pytest.raises(ClusterError, match="flat needs") as error:
        plan_index("flat", rows=1_000_000, dimension=384, memory_bytes=1e9)
    assert "negatives.index=ivf_pq" in error.value.hint
    with pytest.raises(DataError, match="256 rows .* has 255"):
        plan_index("ivf_pq", rows=255, dimension=8, memory_bytes=None)
    with pytest.raises(DataError, match="no rows"):
        plan_index("flat", rows=0, dimension=8, memory_bytes=None)


@given(st.integers(1, 4), st.integers(0, 3), st.integers(1, 5), st.integers(1, 12), st.integers(0, 10**6))
@settings(deadline=None, max_examples=60)
def test_merging_sorts_and_pads(shards, queries, width, k, seed):
    rng = np.random.default_rng(seed)
    scores = rng.integers(0, 4, size=(shards, queries, width)).astype(np.float32)  # many ties
    ids = rng.permuted(np.tile(np.arange(shards * width), (queries, 1)), axis=1)
    ids = ids.reshape(queries, shards, width).swapaxes(0, 1)
    ids = np.where(rng.random(ids.shape) < 0.3, -1, ids)
    got_scores, got_ids = merge_hits(scores, ids, k=k)
    assert got_scores.shape == got_ids.shape == (queries, k)
    for q in range(queries):
        hits = [(-s, i) for s, i in zip(scores[:, q].ravel(), ids[:, q].ravel(), strict=True) if i >= 0]
        wanted = [(i, -s) for s, i in sorted(hits)][:k]
        wanted += [(-1, -np.inf)] * (k - len(wanted))
        assert list(zip(got_ids[q], got_scores[q], strict=True)) == wanted
