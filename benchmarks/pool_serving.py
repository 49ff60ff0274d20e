"""What does serving a million rows take? Memory of all processes, and latency beside FAISS's own search time.

Random unit vectors, which no encoder has to make: the shards are real IndexShards in actors of their own, behind the
pool's coordinator and client. FAISS is timed on as many vectors in one process with the threads of all shards,
both as shipped (which skips BLAS for few queries) and with BLAS; the faster counts.

    python benchmarks/pool_serving.py --out result.json
"""

import argparse
import json
import os
import tempfile
import time
from pathlib import Path

import faiss
import numpy as np
import psutil
import ray
import torch
from hardware import provenance

from hncse_ray.cluster import ray_session
from hncse_ray.cluster.coordinator import PoolCoordinator
from hncse_ray.cluster.pool import PoolClient, PoolHandles
from hncse_ray.negatives import plan_index
from hncse_ray.negatives.shard import IndexShard

GROUPS = {"search": 2, "build": 1, "control": 1}


class RandomShard:
    """The interface of ShardActor over vectors drawn from row ids."""

    def __init__(self, number: int, count: int, rows: int, dimension: int, kind: str, threads: int) -> None:
        torch.set_num_threads(threads)
        self.shard = IndexShard(
            number=number,
            count=count,
            lengths=np.ones(rows, dtype=np.int32),
            encode=lambda ids: random_rows(ids, dimension),
            load_weights=lambda weights: None,
            plan=plan_index(kind, rows=len(range(number, rows, count)), dimension=dimension, memory_bytes=None),
            device=torch.device("cpu"),
            batch_size=4096,
            threads=threads,
        )

    def versions(self):  # type: ignore[no-untyped-def]
        return self.shard.versions()

    def build(self, version, weights):  # type: ignore[no-untyped-def]
        return self.shard.build(version, weights)

    def retire(self, keep):  # type: ignore[no-untyped-def]
        self.shard.retire(keep)

    def vectors(self, version, ids):  # type: ignore[no-untyped-def]
        return self.shard.vectors(version, ids)

    def search(self, version, queries_QD, k, words, ahead):  # type: ignore[no-untyped-def]
        return self.shard.search(version, queries_QD, k=k), self.shard.vectors(version, ahead)


def random_rows(ids: np.ndarray, dimension: int) -> np.ndarray:
    """Unit vectors, the same for a block of 4096 ids whoever asks; good enough noise, quickly made."""
    rng = np.random.default_rng(int(ids[0]))
    vectors = rng.standard_normal((len(ids), dimension), dtype=np.float32)
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--dimension", type=int, default=384)
    parser.add_argument("--shards", type=int, default=2)
    parser.add_argument("--threads", type=int, default=1, help="of each shard")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--k", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--kind", default="flat")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    result: dict[str, object] = provenance(torch.device("cpu"), "faiss", "ray") | vars(args) | {"out": None}
    result["faiss"] = bare_faiss(args)
    with ray_session(), tempfile.TemporaryDirectory() as folder:
        shards = [
            ray.remote(concurrency_groups=GROUPS)(RandomShard)
            .options(num_cpus=0, name=f"shard-{number}")
            .remote(number, args.shards, args.rows, args.dimension, args.kind, args.threads)
            for number in range(args.shards)
        ]
        coordinator = ray.remote(PoolCoordinator).options(num_cpus=0).remote(
            [f"shard-{n}" for n in range(args.shards)],
            folder=folder,
            corpus_digest="random",
            rows=args.rows,
            build_timeout_s=600,
        )  # fmt: skip
        client = PoolClient(PoolHandles(coordinator, tuple(shards)), timeout_s=120)
        client.publish({"none": np.zeros(1, dtype=np.float32)}, step=0, key="0")
        client.wait(600)
        rng = np.random.default_rng(0)
        times = []
        for _ in range(args.rounds + 2):
            ids = rng.integers(0, args.rows, args.batch)
            started = time.perf_counter()
            hits = client.search(ids, k=args.k)
            times.append(time.perf_counter() - started)
            assert hits.complete and (hits.ids_Bk[:, 0] == ids).all()
        result["pool_s"] = summary(times[2:])
        result["memory_mb"] = memory_mb()
        client.close()
    result["ratio"] = result["pool_s"]["median"] / min(t["median"] for t in result["faiss"].values())
    print(json.dumps({key: result[key] for key in ("faiss", "pool_s", "ratio", "memory_mb")}, indent=2))
    if args.out:
        args.out.write_text(json.dumps(result, indent=2, default=str) + "\n")


def bare_faiss(args: argparse.Namespace) -> dict[str, dict[str, float]]:
    matrix_ND = random_rows(np.arange(args.rows), args.dimension)
    faiss.omp_set_num_threads(args.threads * args.shards)
    found = {}
    for name, threshold in (("as shipped", faiss.cvar.distance_compute_blas_threshold), ("with BLAS", 1)):
        faiss.cvar.distance_compute_blas_threshold = threshold
        times = []
        for round_number in range(args.rounds // 2 + 2):
            queries_QD = random_rows(np.arange(round_number, round_number + args.batch), args.dimension)
            started = time.perf_counter()
            faiss.knn(queries_QD, matrix_ND, args.k, metric=faiss.METRIC_INNER_PRODUCT)
            times.append(time.perf_counter() - started)
        found[name] = summary(times[2:])
    return found


def memory_mb() -> dict[str, float]:
    """Proportional set size of this process and of all below it (shared memory counted once), by name."""
    found: dict[str, float] = {}
    for process in [psutil.Process(os.getpid()), *psutil.Process(os.getpid()).children(recursive=True)]:
        try:
            name = process.name() if process.pid != os.getpid() else "driver"
            found[name] = found.get(name, 0.0) + process.memory_full_info().pss / 1e6
        except psutil.Error:
            continue
    return {name: round(size, 1) for name, size in sorted(found.items())} | {"all": round(sum(found.values()), 1)}


def summary(times: list[float]) -> dict[str, float]:
    return {"median": float(np.median(times)), "min": min(times), "max": max(times)}


if __name__ == "__main__":
    main()
