"""The index on a GPU: how long it takes to fill, to search and how much memory, for every kind, beside faiss's own.

Unit vectors around random centres, as embeddings lie, stored in float16. `flat` and `exact_torch` must answer alike;
the IVF kinds say which part of the exact neighbours they find. The largest error of the fast scores is put
beside the slack that the exact kinds allow it (`_ExactIndex`): at 1 it would no longer be enough.

    python benchmarks/gpu_index.py --rows 1000000 10000000 --out result.json
"""

import argparse
import json
import time
from pathlib import Path
from typing import Any

import faiss
import numpy as np
import torch
from hardware import provenance, synchronise

from hncse_ray.negatives import plan_index
from hncse_ray.negatives.index import VectorIndex, new_index

BLOCK = 1 << 17


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, nargs="+", default=[1_000_000])
    parser.add_argument("--dimension", type=int, default=384)
    parser.add_argument("--queries", type=int, nargs="+", default=[64, 512])
    parser.add_argument("--k", type=int, default=32)
    parser.add_argument("--kinds", nargs="+", default=["flat", "exact_torch", "ivf_flat", "ivf_pq"])
    parser.add_argument("--ivf-most", type=int, default=1_000_000, help="no IVF index of more rows")
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--device", type=torch.device, default=torch.device("cuda"))
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    result: dict[str, Any] = provenance(args.device, "faiss") | vars(args) | {"sizes": {}}
    for rows in args.rows:
        found: dict[str, Any] = {}
        queries_QD = np.concatenate([part for _, part in vectors(args, max(args.queries), seed=1)])
        exact = None
        for kind in args.kinds:
            if kind == "flat" and args.device.type == "cuda" and not hasattr(faiss, "StandardGpuResources"):
                continue
            if kind.startswith("ivf") and rows > args.ivf_most:
                continue
            index, found[kind] = build(args, kind, rows)
            found[kind] |= {f"{q}_queries_ms": search_ms(args, index, queries_QD[:q]) for q in args.queries}
            answer = index.search(queries_QD, args.k, threads=4)
            if kind in ("flat", "exact_torch"):
                found[kind]["error_over_slack"] = error_over_slack(index, queries_QD, args.k)
            if exact is None:
                exact = answer
            found[kind]["scores_as_first"] = bool((answer[0] == exact[0]).all())
            found[kind]["rows_as_first"] = bool((answer[1] == exact[1]).all())
            pairs = zip(answer[1], exact[1], strict=True)
            found[kind]["recall"] = float(np.mean([len(set(a) & set(b)) / args.k for a, b in pairs]))
            print(rows, kind, found[kind], flush=True)
            del index
            torch.cuda.empty_cache()
        if args.device.type == "cuda" and hasattr(faiss, "StandardGpuResources"):
            found["faiss.GpuIndexFlatIP"] = bare_faiss(args, rows, queries_QD)
            print(rows, "faiss", found["faiss.GpuIndexFlatIP"], flush=True)
        result["sizes"][rows] = found
    if args.out:
        args.out.write_text(json.dumps(result, indent=2, default=str) + "\n")


def vectors(args: argparse.Namespace, rows: int, *, seed: int = 0):  # type: ignore[no-untyped-def]
    """Yield (row numbers, unit vectors) block by block: around 4,096 centres, made on the device."""
    centres = torch.Generator(args.device).manual_seed(0)
    generator = torch.Generator(args.device).manual_seed(seed)
    shape = (4096, args.dimension)
    centres_CD = torch.nn.functional.normalize(torch.randn(shape, generator=centres, device=args.device), dim=-1)
    for start in range(0, rows, BLOCK):
        n = min(BLOCK, rows - start)
        own = torch.randint(0, len(centres_CD), (n,), generator=generator, device=args.device)
        noise = torch.randn((n, args.dimension), generator=generator, device=args.device)
        made = torch.nn.functional.normalize(centres_CD[own] + noise * 0.8 * args.dimension**-0.5, dim=-1)
        yield np.arange(start, start + n), made.half().float().cpu().numpy()


def build(args: argparse.Namespace, kind: str, rows: int) -> tuple[VectorIndex, dict[str, Any]]:
    plan = plan_index(kind, rows=rows, dimension=args.dimension, memory_bytes=None, on_gpu=args.device.type == "cuda")
    before = free_bytes(args)
    index, put_s = new_index(plan, device=args.device), 0.0
    for numbers, part in vectors(args, rows):
        started = time.perf_counter()
        index.put(numbers, part)
        put_s += time.perf_counter() - started
    started = time.perf_counter()
    index.finish()
    synchronise(args.device)
    return index, {
        "put_s": put_s,
        "finish_s": time.perf_counter() - started,
        "gpu_gb": (before - free_bytes(args)) / 1e9,
        "planned_gb": plan.bytes_at_rest / 1e9,
    }


def free_bytes(args: argparse.Namespace) -> int:
    if args.device.type != "cuda":
        return 0
    torch.cuda.empty_cache()
    return torch.cuda.mem_get_info(args.device)[0]


def search_ms(args: argparse.Namespace, index: VectorIndex, queries_QD: np.ndarray) -> dict[str, float]:
    times = []
    for _ in range(args.rounds + 3):
        started = time.perf_counter()
        index.search(queries_QD, args.k, threads=4)
        times.append((time.perf_counter() - started) * 1e3)
    return summary(times[3:])


def summary(times: list[float]) -> dict[str, float]:
    return {"median": float(np.median(times)), "min": min(times), "max": max(times)}


def error_over_slack(index: Any, queries_QD: np.ndarray, k: int) -> float:
    """The largest |fast - exact| of the candidates, as a part of what `_search_part` allows."""
    queries_QD = queries_QD.astype(np.float16).astype(np.float32)
    fast_QK, rows_QK = index._candidates(queries_QD, k, 4)
    exact_QK = np.vecdot(index.vectors(rows_QK).astype(np.float64), queries_QD.astype(np.float64)[:, None])
    slack_Q = np.linalg.norm(queries_QD, axis=1) * (index._longest * 4 * index.dimension**0.5 * 2.0**-24)
    return float((np.abs(fast_QK - exact_QK) / slack_Q[:, None]).max())


def bare_faiss(args: argparse.Namespace, rows: int, queries_QD: np.ndarray) -> dict[str, Any]:
    """Faiss's own float16 index on the GPU, whose scores are not exact."""
    untyped: Any = faiss
    options = untyped.GpuIndexFlatConfig()
    options.useFloat16 = True
    index = untyped.GpuIndexFlatIP(untyped.StandardGpuResources(), args.dimension, options)
    for _, part in vectors(args, rows):
        index.add(part)
    found = {}
    for q in args.queries:
        times = []
        for _ in range(args.rounds + 3):
            started = time.perf_counter()
            index.search(queries_QD[:q], args.k)
            times.append((time.perf_counter() - started) * 1e3)
        found[f"{q}_queries_ms"] = summary(times[3:])
    return found


if __name__ == "__main__":
    main()
