"""Do S shards answer as one flat index? Ids and scores of 10,000 random queries, against each other and FAISS itself.

Rows are random unit vectors, some of them exact copies of others and some a few units in the last place away, where
the order of summation would show.

    python benchmarks/pool_parity.py --out result.json
"""

import argparse
import json
from pathlib import Path

import faiss
import numpy as np
import torch
from hardware import provenance

from hncse_ray.negatives import IndexVersion, merge_hits, plan_index
from hncse_ray.negatives.shard import IndexShard


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=20_011)
    parser.add_argument("--dimension", type=int, default=384)
    parser.add_argument("--queries", type=int, default=10_000)
    parser.add_argument("--k", type=int, default=32)
    parser.add_argument("--kinds", nargs="+", default=["flat", "exact_torch"])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    device = torch.device(args.device)
    rng = np.random.default_rng(0)
    vectors_ND = unit(rng.standard_normal((args.rows, args.dimension)))
    vectors_ND[1000:1200] = vectors_ND[0:200]
    vectors_ND[2000:2200] = unit(vectors_ND[0:200] + 1e-7 * rng.standard_normal((200, args.dimension)))
    queries_QD = unit(rng.standard_normal((args.queries, args.dimension)))
    queries_QD[:200] = vectors_ND[:200]
    if device.type == "cuda":  # what the index keeps there
        vectors_ND, queries_QD = (x.astype(np.float16).astype(np.float32) for x in (vectors_ND, queries_QD))

    one = faiss.IndexFlatIP(args.dimension)
    one.add(vectors_ND)
    scores_faiss, ids_faiss = one.search(queries_QD, args.k)
    result: dict[str, object] = provenance(device, "faiss") | {
        "rows": args.rows, "dimension": args.dimension, "queries": args.queries, "k": args.k,
    }  # fmt: skip
    first = None
    for kind in args.kinds:
        for count in (1, 2, 3, 5):
            scores, ids = search_sharded(kind, count, vectors_ND, queries_QD, args.k, device)
            first = first or (scores, ids)
            differ = ids != ids_faiss
            found = {
                "as one shard of kind flat": {
                    "ids_different": int((ids != first[1]).sum()),
                    "scores_different": int((scores != first[0]).sum()),
                },
                "as faiss.IndexFlatIP": {
                    "ids_different": int(differ.sum()),
                    # Where FAISS orders two rows otherwise, their true scores differ by less than fp32 can tell.
                    "largest_score_difference_there": float(np.abs(scores - scores_faiss)[differ].max(initial=0)),
                    "largest_score_difference": float(np.abs(scores - scores_faiss).max()),
                },
            }
            result[f"{kind}, {count} shards"] = found
            print(f"{kind:12s} S={count}: {found}", flush=True)
    if args.out:
        args.out.write_text(json.dumps(result, indent=2) + "\n")


def search_sharded(kind, count, vectors_ND, queries_QD, k, device):  # type: ignore[no-untyped-def]
    version = IndexVersion(0, "random", "random", len(vectors_ND))
    answers = []
    for number in range(count):
        rows = len(range(number, len(vectors_ND), count))
        shard = IndexShard(
            number=number,
            count=count,
            lengths=np.random.default_rng(1).integers(4, 64, len(vectors_ND)),
            encode=lambda ids: vectors_ND[ids],
            load_weights=lambda weights: None,
            plan=plan_index(
                kind, rows=rows, dimension=vectors_ND.shape[1], memory_bytes=None, on_gpu=device.type == "cuda"
            ),
            device=device,
            batch_size=1000,
            threads=torch.get_num_threads(),
        )
        shard.build(version, {})
        answers.append(shard.search(version, queries_QD, k=k))
    scores_SQk, ids_SQk = (np.stack(part) for part in zip(*answers, strict=True))
    return merge_hits(scores_SQk, ids_SQk, k=k)


def unit(vectors_ND: np.ndarray) -> np.ndarray:
    return (vectors_ND / np.linalg.norm(vectors_ND, axis=1, keepdims=True)).astype(np.float32)


if __name__ == "__main__":
    main()
