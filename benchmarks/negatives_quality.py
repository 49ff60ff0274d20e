"""Do global negatives help? Quickstart runs without them, with `fresh` and with `stored` ones, over several seeds.

Every run takes the same number of steps on a sample of the quickstart's corpus and is scored with its last weights:
documentation pairs (dev for choosing settings, test for the table) and, with HNCSE_DATA, STS-B dev. The index lives in
the process (`negatives.source=in_process`), which serves the same neighbours as the pool. Results are added to the file
as they come, and runs that are there already are not repeated.

    python benchmarks/negatives_quality.py --out result.json                                  # the table
    python benchmarks/negatives_quality.py --out result.json --sweep --objectives info_nce    # selection settings
    python benchmarks/negatives_quality.py --out result.json --table                          # print only
"""

import argparse
import json
import logging
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from hardware import provenance
from small import NoStore

from hncse_ray import load_settings
from hncse_ray.config import Settings
from hncse_ray.encoder import load_encoder
from hncse_ray.evaluation.sts import read_sts, spearman
from hncse_ray.negatives import plan_index
from hncse_ray.negatives.in_process import InProcessSource
from hncse_ray.negatives.shard import IndexShard
from hncse_ray.reporting import LineReporter
from hncse_ray.training import TrainJob, fit, load_evaluation_sets
from hncse_ray.training.checks import prepare
from hncse_ray.training.shard import build_shard

OBJECTIVES = ("info_nce", "positive_mixing", "hard_negative_mixing", "hybrid")
GLOBAL = (
    "negatives.source=in_process",
    "negatives.refresh=sync",
    "negatives.refresh_every_steps=null",  # one index, made at the start: these runs are short
    "negatives.max_score=0.7",
)
STORED, FRESH = (*GLOBAL, "negatives.use=stored"), (*GLOBAL, "negatives.use=fresh")
VARIANTS: dict[str, tuple[str, ...]] = {
    "none": ("negatives.source=none",),
    "stored": STORED,
    "fresh": FRESH,
    "stored, mixed only": (*STORED, "negatives.columns=none"),
}
SWEEP: dict[str, tuple[str, ...]] = {
    "stored, score <= 0.9": (*STORED, "negatives.max_score=0.9"),
    "stored, score <= 0.5": (*STORED, "negatives.max_score=0.5"),
    "stored, ranks 17 to 64": (*STORED, "negatives.candidates=64", "negatives.skip_hardest=16"),
    "stored, everyone's": (*STORED, "negatives.columns=all"),
}


class KeepsTheFirst:
    """A shard that never drops the index of step 0, which all runs begin with."""

    def __init__(self, shard: IndexShard) -> None:
        self._shard = shard

    def __getattr__(self, name: str) -> object:
        return getattr(self._shard, name)

    def retire(self, keep: list) -> None:
        self._shard.retire([*keep, *(v for v in self._shard.versions() if v.step == 0)])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=24)
    parser.add_argument("--sentences", type=int, default=6000, help="size of the sample of the corpus")
    parser.add_argument("--objectives", nargs="+", default=list(OBJECTIVES))
    parser.add_argument("--sweep", action="store_true", help="vary the selection instead")
    parser.add_argument("--only", nargs="+", help="names of the variants to run")
    parser.add_argument("--table", action="store_true")
    args = parser.parse_args()
    logging.basicConfig(level=logging.WARNING)
    results = json.loads(args.out.read_text()) if args.out.exists() else {"runs": {}}
    if not args.table:
        results |= provenance(torch.device("cpu"), "faiss") | {
            "recipe": "quickstart",
            "steps": args.steps,
            "sentences": args.sentences,
        }
        run_all(args, results)
    print_table(results["runs"])


def run_all(args: argparse.Namespace, results: dict) -> None:
    variants = SWEEP if args.sweep else VARIANTS
    base = run_settings(args, 0, "info_nce", ())
    encoder = load_encoder(base.encoder.model, base.encoder)
    corpus = prepare(base, encoder, LineReporter())
    plan = plan_index("flat", rows=len(corpus), dimension=encoder.dimension, memory_bytes=None)
    shard = KeepsTheFirst(build_shard(base.negatives, base.encoder, corpus, plan=plan, threads=torch.get_num_threads()))
    score = scorer()
    if "before" not in results:
        results["before"] = score(encoder)
    for seed in args.seeds:
        for objective in args.objectives:
            for name, overrides in variants.items():
                key = f"{objective} | {name} | {seed}"
                if key in results["runs"] or (args.only and name not in args.only):
                    continue
                if "negatives.columns=none" in overrides and objective == "info_nce":
                    continue
                settings = run_settings(args, seed, objective, overrides)
                started = time.perf_counter()
                source = InProcessSource(shard, corpus_digest=corpus.digest, rows=len(corpus))
                trained = load_encoder(settings.encoder.model, settings.encoder, seed=seed)
                logged: list = []
                job = TrainJob(settings, corpus, trained, load_evaluation_sets(settings.evaluation, settings.corpus),
                               source=source if settings.negatives.source != "none" else None)  # fmt: skip
                fit(job, NoStore(), logged.append)
                seconds = time.perf_counter() - started
                scores = score(trained)
                last = next(e for e in reversed(logged) if hasattr(e, "metrics")).metrics
                if last.get("negatives/missing", 0.0) > 0:
                    raise RuntimeError(f"{key}: the index did not serve all batches")
                facts = {k: v for k, v in last.items() if "similarity" in k or "removed" in k or "usable" in k}
                results["runs"][key] = {"scores": scores, "seconds": seconds, "last_log": facts}
                args.out.write_text(json.dumps(results, indent=1) + "\n")
                print(f"{key}: {seconds:.0f} s  " + "  ".join(f"{k} {v:.4f}" for k, v in scores.items()), flush=True)


def run_settings(args: argparse.Namespace, seed: int, objective: str, overrides: tuple[str, ...]) -> Settings:
    common = [
        f"run.seed={seed}",
        f"train.max_steps={args.steps}",
        f"corpus.max_sentences={args.sentences}",
        "train.log_every_steps=10",
        "evaluation.suites=[]",
        "export.whiten=none",
        f"objective.name={objective}",
    ]
    return load_settings("quickstart", [*common, *overrides])


def scorer() -> Callable[[object], dict[str, float]]:
    sets = load_evaluation_sets(load_settings("quickstart").evaluation, load_settings("quickstart").corpus)
    data = os.environ.get("HNCSE_DATA")
    stsb = read_sts("STSBenchmark", "dev", os.path.join(data, "senteval")) if data else None

    def score(encoder) -> dict[str, float]:  # type: ignore[no-untyped-def]
        found = {}
        for split in ("dev", "test"):
            scores = sets.score(encoder.encode, split)
            found[f"{split} recall@10"] = scores["python-docs/recall@10"]
            found[f"{split} mrr"] = scores["python-docs/mrr"]
        if stsb is not None:
            found["stsb dev"] = spearman(encoder.encode, stsb)
        return found

    return score


def print_table(runs: dict) -> None:
    groups: dict[tuple[str, str], dict[str, dict]] = {}
    for key, run in runs.items():
        objective, variant, seed = key.split(" | ")
        groups.setdefault((objective, variant), {})[seed] = run["scores"]
    for (objective, variant), by_seed in groups.items():
        cells = []
        for metric in next(iter(by_seed.values())):
            values = [scores[metric] for scores in by_seed.values()]
            spread = f" +- {statistics.stdev(values):.4f}" if len(values) > 1 else ""
            without = groups.get((objective, "none"), {})
            paired = [by_seed[s][metric] - without[s][metric] for s in by_seed if s in without]
            change = f" ({statistics.mean(paired):+.4f})" if paired and variant != "none" else ""
            cells.append(f"{metric} {statistics.mean(values):.4f}{spread}{change}")
        print(f"{objective:21s} {variant:32s} n={len(by_seed)}  " + "  ".join(cells))


if __name__ == "__main__":
    main()
