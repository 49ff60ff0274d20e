"""How large a shard's index is, what it costs, and whether it fits."""

from __future__ import annotations

from dataclasses import dataclass
from importlib.util import find_spec
from typing import Literal

from hncse_ray.errors import ClusterError, DataError, counted

IndexKind = Literal["flat", "ivf_flat", "ivf_pq", "exact_torch"]

BLOCK_ROWS = 16384  # rows scored, added or read at a time
GPU_MOST_HITS = 2048  # faiss selects no more on a GPU, of hits as of lists
_GPU_PQ_BYTES = (1, 2, 3, 4, 8, 12, 16, 20, 24, 28, 32, 40, 48, 56, 64, 96)  # code lengths that faiss has kernels for
_PQ_TRAINING_ROWS = 256  # one for each value of a byte


@dataclass(frozen=True)
class IndexPlan:
    """Which index a shard makes, how large, and what it costs.

    Bytes are those of the memory that holds the vectors: the GPU's with `on_gpu`, else main memory. What a search
    needs besides is bounded, below 0.5 GB a thread. The IVF kinds also keep `bytes_on_disk` a version.
    """

    kind: IndexKind
    rows: int
    dimension: int
    nlist: int  # 0 but for the IVF kinds
    nprobe: int
    pq_bytes: int  # 0 but for ivf_pq
    bytes_at_rest: int  # one version
    bytes_building: int  # at most: one version served, the next being built
    bytes_on_disk: int
    on_gpu: bool

    def describe(self) -> str:
        """One line for people."""
        lists = f", {self.nprobe} of {self.nlist} lists searched" if self.nlist else ""
        disk = f", {size_text(self.bytes_on_disk)} of disk a version" if self.bytes_on_disk else ""
        memory = f"{size_text(self.bytes_at_rest)} of {'GPU memory' if self.on_gpu else 'memory'}"
        building = f"{size_text(self.bytes_building)} while the next is built"
        return f"{self.kind} index, {counted(self.rows, 'row')} x {self.dimension}{lists}: {memory}, {building}{disk}"


def plan_index(
    kind: IndexKind | Literal["auto"],
    *,
    rows: int,
    dimension: int,
    memory_bytes: float | None,
    nprobe: int = 32,
    on_gpu: bool = False,
) -> IndexPlan:
    """Size an index, and refuse one that does not fit.

    `auto` is exact where that fits, else `ivf_pq`: `flat` on a CPU, `exact_torch` on a GPU, where it answers alike and
    sooner (benchmarks/results/gpu_index_h200.json), and where faiss is not installed. `ivf_flat` needs more memory than
    these and is not exact: it is chosen by hand, for the speed of a search among very many rows.

    Args:
        kind: the index, or `auto`.
        rows: rows of this shard.
        dimension: of a vector.
        memory_bytes: free for all versions, of the GPU with `on_gpu`, else main memory; None = not bounded.
        nprobe: lists that a search of an IVF kind visits.
        on_gpu: the vectors live on a GPU.

    Raises:
        DataError: there are no rows, or too few to train `ivf_pq`.
        ClusterError: the index, or with `auto` every index, is too large, or needs faiss, which is not installed.
    """
    if rows < 1:
        raise DataError("a shard has no rows to index", "negatives.index", "Use fewer shards (negatives.num_shards)")
    has_faiss = find_spec("faiss") is not None
    if kind not in ("auto", "exact_torch") and not has_faiss:
        raise ClusterError(f"{kind} needs faiss, which is not installed", "negatives.index",
                           "Install hncse-ray[cpu] or hncse-ray[gpu], or use negatives.index=exact_torch")  # fmt: skip
    candidates: list[IndexKind] = [kind] if kind != "auto" else ["exact_torch" if on_gpu or not has_faiss else "flat"]
    if kind == "auto" and has_faiss and rows >= _PQ_TRAINING_ROWS:
        candidates.append("ivf_pq")
    sums = []
    for candidate in candidates:
        plan, arithmetic = _plan(candidate, rows, dimension, nprobe, on_gpu)
        if memory_bytes is None or plan.bytes_building <= memory_bytes:
            return plan
        sums.append(f"{candidate} needs {arithmetic} = {size_text(plan.bytes_building)}")
    where = "of GPU memory " if on_gpu else ""
    smaller = "" if "ivf_pq" in candidates else ", negatives.index=ivf_pq"
    raise ClusterError(
        f"the index of a shard does not fit: {'; '.join(sums)}; but {size_text(memory_bytes or 0)} {where}are free",
        "negatives.index",
        f"Use more shards on more nodes (negatives.num_shards){smaller}, or fewer sentences (corpus.max_sentences)",
    )


def _plan(kind: IndexKind, rows: int, dimension: int, nprobe: int, on_gpu: bool) -> tuple[IndexPlan, str]:
    """Return the plan of an index and the arithmetic of `bytes_building`, in words."""
    nlist = pq_bytes = on_disk = extra = 0
    if kind in ("flat", "exact_torch"):
        width = 2 if on_gpu else 4
        at_rest, each = rows * dimension * width, f"{counted(rows, 'row')} x {dimension} x {width} bytes"
    else:
        nlist = max(1, min(int(4 * rows**0.5), rows // 39))  # faiss wants 39 training rows a list
        width = 4 * dimension
        if kind == "ivf_pq":
            if rows < _PQ_TRAINING_ROWS:
                what = f"ivf_pq needs {_PQ_TRAINING_ROWS} rows a shard to train, and this shard has {rows}"
                raise DataError(what, "negatives.index", "Use negatives.index=flat, or fewer shards")
            fitting = (size for size in range(max(1, dimension // 4), 0, -1) if dimension % size == 0)
            width = pq_bytes = next(size for size in fitting if not on_gpu or size in _GPU_PQ_BYTES)
        books = 4 * dimension * (nlist + (256 if pq_bytes else 0))
        at_rest = rows * (width + 8) + books
        on_disk = rows * dimension * 2
        # the training rows and their residuals, a block being added, and lists growing (a vector doubles)
        extra = 2 * 4 * dimension * (training_rows(rows, nlist) + BLOCK_ROWS) + (at_rest - books) // 2
        each = f"{counted(rows, 'row')} x ({width} + 8) bytes + {size_text(books)} of centroids"
    building = 2 * at_rest + extra + rows  # and a flag a row: was it put
    to_build = f" + {size_text(extra)} to build" if extra else ""
    arithmetic = f"({each}) x 2 versions (one served, one being built){to_build}"
    probes = min(nprobe, nlist, GPU_MOST_HITS if on_gpu else nlist)
    plan = IndexPlan(kind, rows, dimension, nlist, probes, pq_bytes, at_rest, building, on_disk, on_gpu)
    return plan, arithmetic


def training_rows(rows: int, nlist: int) -> int:
    """Return how many rows an IVF index of `nlist` lists is trained on."""
    return min(rows, max(40 * nlist, 16384))


def size_text(count: float) -> str:
    """Return a number of bytes in GB or MB (powers of ten)."""
    return f"{count / 1e9:,.2f} GB" if count >= 1e9 else f"{count / 1e6:,.1f} MB"
