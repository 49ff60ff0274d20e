"""The vector index of one shard: inner product over unit-norm rows.

An index is made empty, filled in any row order, finished, and then searched by several threads while the next
version is built beside it. The exact kinds (`flat`, `exact_torch`) answer alike however a corpus is cut into shards:
fast fp32 scores only propose candidates; returned scores are float64 sums, rounded, ordered by score, then by row.
"""

from __future__ import annotations

import os
import tempfile
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, Protocol, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from hncse_ray.errors import ClusterError, DataError, StorageError, counted
from hncse_ray.negatives.hits import Ranked, merge_hits, no_hits, ordered
from hncse_ray.negatives.index_plan import BLOCK_ROWS, GPU_MOST_HITS, IndexPlan, size_text, training_rows

Floats: TypeAlias = NDArray[np.floating[Any]]
Float32: TypeAlias = NDArray[np.float32]
Int64: TypeAlias = NDArray[np.int64]

_OVERFETCH = 8  # candidates beyond k, for rows that fp32 scores cannot tell apart
_RESCORE_BYTES = 64e6  # float64 working memory of one search
_MOST_QUERIES = 1024  # scored at a time
_GPU_SCORES = 1 << 25  # fp32 scores held at a time on a GPU, 134 MB


class VectorIndex(Protocol):
    """Vectors of one shard. Filled by one thread, then finished, then searched by any number."""

    rows: int
    dimension: int

    def put(self, rows_n: NDArray[np.integer[Any]], vectors_nD: Floats) -> None:
        """Store unit-norm vectors at positions 0..rows-1; raises DataError on what is not finite."""

    def finish(self) -> None:
        """Make ready to search (trains the IVF kinds); raises DataError where a row was never put."""

    def search(self, queries_QD: Floats, k: int, *, threads: int) -> Ranked:
        """Return float32 scores [Q, k] and int64 rows [Q, k], best first; -inf and -1 where there is no hit.

        `threads` bounds faiss. It does not bound torch on the CPU (`exact_torch`; also, in every kind, a scan for
        rows that fp32 cannot tell apart), whose number of threads can only be set for the whole process.
        """

    def scores(self, queries_QD: Floats, rows_QK: Int64) -> Float32:
        """Return the scores of queries with rows of their own, float32 [Q, K]; in the exact kinds those of a search."""

    def vectors(self, rows_n: NDArray[np.integer[Any]]) -> Float32:
        """Return the stored vectors, float32 [n, D]; the IVF kinds and a GPU store float16."""


def _faiss() -> Any:
    """Return faiss; imported by the kinds that use it: the stubs miss most of its GPU part."""
    import faiss

    return faiss


def new_index(plan: IndexPlan, *, device: torch.device, threads: int = 1, folder: Path | None = None) -> VectorIndex:
    """Make an empty index.

    Args:
        plan: of `plan_index`.
        device: the CPU or a GPU.
        threads: CPU threads that faiss may use to finish it.
        folder: where the IVF kinds keep their float16 vectors, in a file without a name; default the system's.

    Raises:
        ClusterError: a GPU was asked for, and torch or faiss cannot use one.
        StorageError: `folder` cannot hold the vectors.
    """
    if device.type == "cuda":
        lacking = ""
        if plan.kind != "exact_torch" and not hasattr(_faiss(), "StandardGpuResources"):
            lacking = "this faiss has no GPU support"
        elif not torch.cuda.is_available():
            lacking = "torch sees no GPU"
        if lacking:
            hint = "Install hncse-ray[gpu], use negatives.index=exact_torch, or keep the index on the CPU"
            raise ClusterError(f"a GPU index was asked for, but {lacking}", "negatives.index", hint)
    if plan.on_gpu != (device.type == "cuda"):
        raise ValueError(f"the index was planned with on_gpu={plan.on_gpu}, and asked for on {device}")
    if plan.kind in ("ivf_flat", "ivf_pq"):
        return _IvfIndex(plan, device, threads, folder)
    if plan.kind == "exact_torch":
        return _ExactIndex(plan, device)
    return _FaissGpuIndex(plan, device) if plan.on_gpu else _FaissIndex(plan, device)


class _Filling:
    """Which rows were put, and the checks that every index makes."""

    def __init__(self, plan: IndexPlan) -> None:
        self.rows, self.dimension = plan.rows, plan.dimension
        self.most_hits = GPU_MOST_HITS if plan.on_gpu and plan.kind != "exact_torch" else None
        self.put_N: NDArray[np.bool_] | None = np.zeros(plan.rows, dtype=bool)  # None = finished

    def accept(self, rows_n: NDArray[np.integer[Any]], vectors_nD: Floats) -> None:
        if self.put_N is None:
            raise RuntimeError("put after finish")
        if rows_n.ndim != 1 or vectors_nD.shape != (len(rows_n), self.dimension):
            raise ValueError(f"rows {rows_n.shape}, vectors {vectors_nD.shape}; wanted [n], [n, {self.dimension}]")
        if len(rows_n) and not 0 <= rows_n.min() <= rows_n.max() < self.rows:
            raise ValueError(f"rows {rows_n.min()} to {rows_n.max()}; the index has {self.rows}")
        bad = int((~np.isfinite(vectors_nD).all(axis=1)).sum())
        if bad:
            what = f"not finite (NaN or infinity) are values of {bad} of {counted(len(rows_n), 'vector')}"
            raise DataError(what, "index", "Look at the encoder's weights and precision")
        self.put_N[rows_n] = True

    def finish(self) -> None:
        if self.put_N is not None and not self.put_N.all():
            missing = int((~self.put_N).sum())
            raise DataError(
                f"never put: {missing} of {counted(self.rows, 'row')}", "index", "The encoding was cut short"
            )
        self.put_N = None

    def queries(self, queries_QD: Floats, k: int, threads: int) -> Float32:
        if self.put_N is not None:
            raise RuntimeError("search before finish")
        if queries_QD.ndim != 2 or queries_QD.shape[1] != self.dimension or k < 1 or threads < 1:
            asked = f"queries {queries_QD.shape}, k {k}, threads {threads}"
            raise ValueError(f"{asked}; wanted [Q, {self.dimension}], and at least 1 of the others")
        if self.most_hits and k > self.most_hits:
            raise ValueError(f"k {k}: faiss finds at most {self.most_hits} rows on a GPU")
        if not np.isfinite(queries_QD).all():
            raise DataError("queries hold values that are not finite", "index", "Look at the encoder's precision")
        return np.array(queries_QD, dtype=np.float32, order="C")


class _ExactIndex:
    """All vectors in one torch matrix: float32 on the CPU, float16 on a GPU, where queries are rounded likewise.

    Products of float16 are exact in fp32 (and in TF32), so candidates everywhere differ from exact by summing alone.
    On a GPU searches have streams of their own, ahead of the encoder's in the queue.
    """

    def __init__(self, plan: IndexPlan, device: torch.device, dtype: torch.dtype | None = None) -> None:
        self.rows, self.dimension = plan.rows, plan.dimension
        self._dtype = dtype or (torch.float16 if device.type == "cuda" else torch.float32)
        self._matrix_ND = torch.empty((plan.rows, plan.dimension), dtype=self._dtype, device=device)
        self._filling = _Filling(plan)
        self._longest = 0.0  # norm of a vector
        self._local = threading.local()  # a GPU's stream and faiss's resources serve one thread at a time

    def put(self, rows_n: NDArray[np.integer[Any]], vectors_nD: Floats) -> None:
        self._filling.accept(rows_n, vectors_nD)
        copy_nD = np.array(vectors_nD, dtype=np.float32)
        self._longest = max(self._longest, float(np.linalg.norm(copy_nD, axis=1).max(initial=0)))
        device = self._matrix_ND.device
        self._matrix_ND[self._at(rows_n)] = torch.from_numpy(copy_nD).to(device, self._dtype)

    def finish(self) -> None:
        self._filling.finish()
        if self._matrix_ND.is_cuda:  # faiss reads on a stream of its own
            torch.cuda.synchronize(self._matrix_ND.device)

    def vectors(self, rows_n: NDArray[np.integer[Any]]) -> Float32:
        if self._matrix_ND.device.type == "cpu":
            return np.take(self._matrix_ND.numpy(), rows_n, axis=0).astype(np.float32, copy=False)
        found: Float32 = self._matrix_ND[self._at(rows_n)].float().cpu().numpy()
        return found

    def search(self, queries_QD: Floats, k: int, *, threads: int) -> Ranked:
        queries_QD = self._rounded(self._filling.queries(queries_QD, k, threads))
        scores_Qk, rows_Qk = no_hits(len(queries_QD), k)
        keep, fetch = min(k, self.rows), min(k + _OVERFETCH, self.rows)
        step = min(_MOST_QUERIES, max(1, int(_RESCORE_BYTES / (8 * fetch * self.dimension))))
        with self._own_stream():
            for part in (slice(start, start + step) for start in range(0, len(queries_QD), step)):
                hits = self._search_part(queries_QD[part], keep, fetch, threads)
                scores_Qk[part, :keep], rows_Qk[part, :keep] = hits
        return scores_Qk, rows_Qk

    def scores(self, queries_QD: Floats, rows_QK: Int64) -> Float32:
        queries_QD = self._rounded(self._filling.queries(queries_QD, 1, 1))
        with self._own_stream():
            return _in_parts(self._exact_scores, queries_QD, rows_QK)

    def _rounded(self, queries_QD: Float32) -> Float32:
        return queries_QD.astype(np.float16).astype(np.float32) if self._dtype == torch.float16 else queries_QD

    def _own_stream(self) -> AbstractContextManager[Any]:
        if not self._matrix_ND.is_cuda:
            return nullcontext()
        if not hasattr(self._local, "stream"):
            make: Any = torch.cuda.Stream
            self._local.stream = make(self._matrix_ND.device, priority=-1)
        return torch.cuda.stream(self._local.stream)

    def _search_part(self, queries_QD: Float32, keep: int, fetch: int, threads: int) -> Ranked:
        fast_QK, rows_QK = self._candidates(queries_QD, fetch, threads)
        scores_Qk, rows_Qk = ordered(self._exact_scores(queries_QD, rows_QK), rows_QK, keep)
        if rows_QK.shape[1] == self.rows:
            return scores_Qk, rows_Qk
        # A row that was not fetched has a fast score of at most the lowest fetched, and an exact one within `slack`
        # of that (rounding errors grow with the root of D; 4 is some ten deviations). Where this could still reach
        # the k-th score (near-ties, duplicates), all rows that might are looked at.
        slack_Q = np.linalg.norm(queries_QD, axis=1) * (self._longest * 4 * self.dimension**0.5 * 2.0**-24)
        doubtful_u = np.flatnonzero(scores_Qk[:, -1] <= fast_QK.min(axis=1) + slack_Q)
        if len(doubtful_u):
            found = scores_Qk[doubtful_u], rows_Qk[doubtful_u]
            floor_U = (found[0][:, -1] - slack_Q[doubtful_u]).astype(np.float32)
            scores_Qk[doubtful_u], rows_Qk[doubtful_u] = self._all_above(queries_QD[doubtful_u], floor_U, found)
        return scores_Qk, rows_Qk

    def _exact_scores(self, queries_QD: Float32, rows_QK: Int64) -> Float32:
        """Float64 sums, rounded. Those of unit-norm float16 vectors are exact, in any order and on any device.

        Products of float16 are multiples of 2^-48, and their partial sums stay below 2.
        """
        if self._matrix_ND.is_cuda:
            wide_QKD = self._matrix_ND[self._at(rows_QK)].double()
            queries = torch.from_numpy(queries_QD).to(wide_QKD)
            found: Float32 = (wide_QKD * queries[:, None]).sum(-1).float().cpu().numpy()
        else:
            found = _float64_scores(self.vectors(rows_QK), queries_QD)
        return found

    def _all_above(self, queries_UD: Float32, floor_U: Float32, found_Uk: Ranked) -> Ranked:
        """Return the best of `found_Uk` and of every row whose fast score reaches its query's floor."""
        users, keep = found_Uk[0].shape
        query_n, score_n, row_n = np.repeat(np.arange(users), keep), found_Uk[0].ravel(), found_Uk[1].ravel()
        wide_UD = queries_UD.astype(np.float64)
        queries, floor = (torch.from_numpy(x).to(self._matrix_ND.device) for x in (queries_UD, floor_U))
        step = max(1, int(_RESCORE_BYTES / (16 * self.dimension)))
        for start in range(0, self.rows, BLOCK_ROWS):
            block = self._matrix_ND[start : start + BLOCK_ROWS].float()
            pairs_2p = (queries @ block.T >= floor[:, None]).nonzero().T.cpu().numpy()
            for first in range(0, pairs_2p.shape[1], step):
                query_p, row_p = pairs_2p[0, first : first + step], pairs_2p[1, first : first + step] + start
                score_p = np.vecdot(self.vectors(row_p).astype(np.float64), wide_UD[query_p]).astype(np.float32)
                query_n, row_n = np.concatenate((query_n, query_p)), np.concatenate((row_n, row_p))
                score_n = np.concatenate((score_n, score_p))
                order_n = np.lexsort((row_n, -score_n, query_n))
                twice_n = (np.diff(row_n[order_n]) == 0) & (np.diff(query_n[order_n]) == 0)  # found before: neighbours
                order_n = order_n[np.append(True, ~twice_n)]
                sorted_n = query_n[order_n]
                order_n = order_n[np.arange(len(order_n)) - np.searchsorted(sorted_n, sorted_n) < keep]
                query_n, score_n, row_n = query_n[order_n], score_n[order_n], row_n[order_n]
        return score_n.reshape(users, keep), row_n.reshape(users, keep)

    def _candidates(self, queries_QD: Float32, fetch: int, threads: int) -> Ranked:
        queries = torch.from_numpy(queries_QD).to(self._matrix_ND.device)
        best, at = (queries.new_empty((len(queries), 0), dtype=dtype) for dtype in (torch.float32, torch.int64))
        step = BLOCK_ROWS
        if queries.is_cuda:  # few large products: each costs a start
            queries, step = queries.half(), max(step, _GPU_SCORES // len(queries))
        for start in range(0, self.rows, step):
            block = self._matrix_ND[start : start + step]
            if queries.is_cuda:
                fast = torch.mm(queries, block.T, out_dtype=torch.float32)
            else:
                fast = queries @ block.float().T
            top = fast.topk(min(fetch, fast.shape[1]))
            both, positions = torch.cat((best, top.values), 1), torch.cat((at, top.indices + start), 1)
            best, order = both.topk(min(fetch, both.shape[1]))
            at = positions.gather(1, order)
        return best.cpu().numpy(), at.cpu().numpy()

    def _at(self, rows_n: NDArray[np.integer[Any]]) -> Tensor:
        return torch.from_numpy(np.array(rows_n, dtype=np.int64)).to(self._matrix_ND.device)


def _float64_scores(vectors_QKD: Float32, queries_QD: Float32) -> Float32:
    wide_Q1D = queries_QD.astype(np.float64)[:, None]
    found: Float32 = np.vecdot(vectors_QKD.astype(np.float64), wide_Q1D).astype(np.float32)
    return found


def _in_parts(score: Callable[[Float32, Int64], Float32], queries_QD: Float32, rows_QK: Int64) -> Float32:
    """Score queries with their rows, so many at a time as working memory holds."""
    found_QK = np.zeros(rows_QK.shape, dtype=np.float32)
    step = max(1, int(_RESCORE_BYTES / (8 * max(1, rows_QK.shape[1]) * queries_QD.shape[1])))
    for start in range(0, len(queries_QD), step):
        part = slice(start, start + step)
        found_QK[part] = score(queries_QD[part], rows_QK[part])
    return found_QK


class _FaissIndex(_ExactIndex):
    """`flat` on the CPU: faiss.knn, the kernel of IndexFlatIP, over the matrix as it lies.

    Rows are cut among threads that each run the kernel alone: OpenMP's own threads wait for each other, several times
    slower where the trainers use the same cores. faiss 1.15 also uses BLAS only above queries x D = 128,000, six times
    slower at a batch of 64 (faiss #5109 made it 800 a thread). That bound is the process's; it changes only speed.
    """

    def _candidates(self, queries_QD: Float32, fetch: int, threads: int) -> Ranked:
        faiss = _faiss()
        faiss.cvar.distance_compute_blas_threshold = 800
        matrix_ND = self._matrix_ND.numpy()

        def scan(start: int, stop: int) -> Ranked:
            faiss.omp_set_num_threads(1)  # of this thread of the pool, no other
            block_ND = matrix_ND[start:stop]
            found = faiss.knn(queries_QD, block_ND, min(fetch, len(block_ND)), metric=faiss.METRIC_INNER_PRODUCT)
            return found[0], found[1] + start

        edges = np.linspace(0, self.rows, min(threads, -(-self.rows // 1024)) + 1).astype(int).tolist()
        with ThreadPoolExecutor(len(edges) - 1, thread_name_prefix="index") as pool:
            parts = list(pool.map(scan, edges[:-1], edges[1:]))
        scores, rows = (np.concatenate(x, axis=1) for x in zip(*parts, strict=True))
        return ordered(scores, rows, fetch)


class _FaissGpuIndex(_ExactIndex):
    """`flat` on a GPU: faiss's brute-force kernel (that of GpuIndexFlatIP in float16) over the matrix as it lies."""

    def _candidates(self, queries_QD: Float32, fetch: int, threads: int) -> Ranked:
        if not hasattr(self._local, "resources"):
            self._local.resources = _gpu_resources()
        faiss, fetch = _faiss(), min(fetch, GPU_MOST_HITS)
        half_QD = queries_QD.astype(np.float16)
        scores_QK, rows_QK = no_hits(len(queries_QD), fetch)
        args = faiss.GpuDistanceParams()
        args.metric, args.k, args.dims = faiss.METRIC_INNER_PRODUCT, fetch, self.dimension
        args.vectors, args.numVectors = faiss.cast_integer_to_void_ptr(self._matrix_ND.data_ptr()), self.rows
        args.queries, args.numQueries = faiss.cast_integer_to_void_ptr(half_QD.ctypes.data), len(half_QD)
        args.vectorType = args.queryType = faiss.DistanceDataType_F16
        args.outDistances, args.outIndices = faiss.swig_ptr(scores_QK), faiss.swig_ptr(rows_QK)
        args.outIndicesType = faiss.IndicesDataType_I64
        args.device = self._matrix_ND.device.index or 0
        faiss.bfKnn(self._local.resources, args)
        return scores_QK, rows_QK


def _gpu_resources() -> Any:
    """Return what faiss needs on a GPU, with less working memory than the 1.5 GB that it takes by itself."""
    resources = _faiss().StandardGpuResources()
    resources.setTempMemory(256 << 20)
    return resources


class _IvfIndex:
    """`ivf_flat` and `ivf_pq`: a faiss index in memory, and the float16 vectors in a file that has no name."""

    def __init__(self, plan: IndexPlan, device: torch.device, threads: int, folder: Path | None) -> None:
        self.rows, self.dimension = plan.rows, plan.dimension
        self._plan, self._device, self._threads = plan, device, threads
        self._filling = _Filling(plan)
        self._index: Any = None
        self._turn: AbstractContextManager[Any] = threading.Lock() if device.type == "cuda" else nullcontext()
        place = str(folder or tempfile.gettempdir())
        try:
            with tempfile.TemporaryFile(dir=place) as file:  # the mapping outlives the descriptor
                if hasattr(os, "posix_fallocate"):  # a full disk is told now, not by a signal later
                    os.posix_fallocate(file.fileno(), 0, plan.bytes_on_disk)
                self._stored_ND = np.memmap(file, np.float16, "r+", shape=(plan.rows, plan.dimension))
        except OSError as error:
            what = f"cannot keep {size_text(plan.bytes_on_disk)} of vectors there ({error.strerror})"
            raise StorageError(what, place, "Free some space there, or use negatives.index=flat") from error

    def put(self, rows_n: NDArray[np.integer[Any]], vectors_nD: Floats) -> None:
        self._filling.accept(rows_n, vectors_nD)
        self._stored_ND[rows_n] = vectors_nD.astype(np.float16)

    def finish(self) -> None:
        self._filling.finish()
        faiss, plan = _faiss(), self._plan
        faiss.omp_set_num_threads(self._threads)  # of this thread
        quantizer = faiss.IndexFlatIP(plan.dimension)
        parameters = (quantizer, plan.dimension, plan.nlist)
        index: Any
        if plan.pq_bytes:
            index = faiss.IndexIVFPQ(*parameters, plan.pq_bytes, 8, faiss.METRIC_INNER_PRODUCT)
            index.pq.cp.min_points_per_centroid = 1  # small corpora: no warnings
        else:
            index = faiss.IndexIVFFlat(*parameters, faiss.METRIC_INNER_PRODUCT)
        size = training_rows(plan.rows, plan.nlist)
        sample_n = np.sort(np.random.default_rng(0).choice(plan.rows, size, replace=False))
        index.train(self.vectors(sample_n))
        if self._device.type == "cuda":
            self._resources = _gpu_resources()
            options = faiss.GpuClonerOptions()
            options.useFloat16 = options.useFloat16CoarseQuantizer = True
            index = faiss.index_cpu_to_gpu(self._resources, self._device.index or 0, index, options)
        for start in range(0, plan.rows, BLOCK_ROWS):
            index.add(self._stored_ND[start : start + BLOCK_ROWS].astype(np.float32))
        if self._device.type == "cuda":
            index.reclaimMemory()  # lists grow by doubling
        self._index = index

    def search(self, queries_QD: Floats, k: int, *, threads: int) -> Ranked:
        queries_QD = self._filling.queries(queries_QD, k, threads)
        faiss = _faiss()
        if self._device.type == "cpu":
            faiss.omp_set_num_threads(threads)  # of the calling thread
        probes = faiss.SearchParametersIVF(nprobe=self._plan.nprobe)
        with self._turn:  # on a GPU one at a time
            scores_Qk, rows_Qk = self._index.search(queries_QD, min(k, self.rows), params=probes)
        return merge_hits([scores_Qk], [rows_Qk], k=k)

    def scores(self, queries_QD: Floats, rows_QK: Int64) -> Float32:
        queries_QD = self._filling.queries(queries_QD, 1, 1)
        return _in_parts(lambda q_QD, r_QK: _float64_scores(self.vectors(r_QK), q_QD), queries_QD, rows_QK)

    def vectors(self, rows_n: NDArray[np.integer[Any]]) -> Float32:
        return np.asarray(self._stored_ND[rows_n], dtype=np.float32)
