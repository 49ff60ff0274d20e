"""Does training on the pairs that code holds pay, and do hard negatives add to it?

Pairs are summaries of functions and their code (recipe ``code``): 3,000 of the packages trained on, 800 of others to
search among. All methods take as many steps of as many pairs; the checkpoint is the last, so nothing is chosen.

- base, whitened: all-MiniLM-L6-v2 as it is, and whitened on the codes trained on;
- in-batch: InfoNCE over the codes of the batch;
- mined once: one more column, by sentence-transformers' ``mine_hard_negatives`` with the base, at most 95 % as near as
  the positive;
- pool: neighbours of the query among all codes, under present weights (renewed every 10 steps) or the base's (once);
- hncse: the mixings of HNCSE, in the batch and with the pool;
- walked: InfoNCE, each batch a walk on a graph of near codes;
- taught: InfoNCE, and the other codes ranked as the base's cosine and BM25 together do.

    python benchmarks/code_search.py tables FOLDER
    python benchmarks/code_search.py run --tables FOLDER --out RESULTS --methods base in-batch@0,1,2
    python benchmarks/code_search.py table RESULTS --out result.json
"""

import argparse
import json
import os
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
from numpy.typing import NDArray
from runs import Encoded, add_options, device, read_results, run_tasks, with_seeds
from sentence_transformers import SentenceTransformer
from sentence_transformers.util import mine_hard_negatives

from hncse_ray import load_encoder, load_settings, train
from hncse_ray.config import Settings
from hncse_ray.corpus import BatchPlan
from hncse_ray.corpus.python_code import code_pairs, scored_code_pairs
from hncse_ray.encoder import resolve_model
from hncse_ray.evaluation import paired_set
from hncse_ray.evaluation.retrieval import query_scores
from hncse_ray.reporting import LineReporter
from hncse_ray.training.checks import prepare

METRICS = ("recall@1", "recall@10", "mrr")
POOL = "source: in_process, refresh: sync, candidates: 50, max_score: null, relative_margin: 0.05, columns: all"
LIST = (
    "source: in_process, refresh: sync, refresh_every_steps: null, candidates: 200, max_score: null, columns: all,"
    " use: fresh, per_anchor: 1, sampling: bands"
)
OWN = "contrast_weight: 1, contrast_max_score: null"  # the own code is in the contrast, not in the list
METHODS: dict[str, list[str]] = {
    "in-batch": [],
    "mined once": ["corpus.negative_columns=negative", "negatives.columns=all"],
    "pool, stored, renewed": [f"negatives={{{POOL}, use: stored, refresh_every_steps: 10}}"],
    "pool, stored, once": [f"negatives={{{POOL}, use: stored, refresh_every_steps: null}}"],
    "pool, fresh, renewed": [f"negatives={{{POOL}, use: fresh, refresh_every_steps: 10}}"],
    "pool, stored, renewed, 4": [f"negatives={{{POOL}, use: stored, refresh_every_steps: 10, per_anchor: 4}}"],
    "hncse, in-batch": ["objective={name: hybrid}"],
    "hncse, pool": ["objective={name: hybrid}", f"negatives={{{POOL}, use: stored, refresh_every_steps: 10}}"],
    "walked": [],
    "taught": [f"objective={{name: distillation, {OWN}}}", f"negatives={{{LIST}, score: hybrid}}"],
}


def main() -> None:
    parser = argparse.ArgumentParser(description="Summaries and code.")
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("tables").add_argument("folder", type=Path)
    run = commands.add_parser("run")
    run.add_argument("--tables", type=Path, required=True)
    add_options(commands, run, ["base", "whitened", *METHODS])
    args = parser.parse_args()
    if args.command == "tables":
        write_tables(args.folder)
    elif args.command == "run":
        measured = partial(measure, args.tables, args.override)
        run_tasks(with_seeds(args.methods), measured, args.out, workers=args.workers, minutes=args.minutes)
    else:
        tabulate(args.folder, args.out)


def write_tables(folder: Path) -> None:
    """Write the pairs of the recipe to tables, so that all machines have the same."""
    folder.mkdir(parents=True, exist_ok=True)
    settings = load_settings("code")
    found: dict[str, Any] = {"train": code_pairs(settings.corpus)}
    for split in ("dev", "test"):
        packages = settings.evaluation.code_dev if split == "dev" else settings.evaluation.code_test
        found[split] = scored_code_pairs(split, packages, settings.corpus, settings.evaluation.code_pairs)
    for name, pairs in found.items():
        with (folder / f"{name}.jsonl").open("w", encoding="utf-8") as file:
            for pair in pairs:
                file.write(json.dumps({"query": pair.summary, "answer": pair.code, "name": pair.name}) + "\n")


def measure(tables: Path, overrides: list[str], method: str, seed: str) -> dict[str, Any]:
    """Train if the method does, and score on dev and test."""
    with tempfile.TemporaryDirectory(dir="/dev/shm" if os.path.isdir("/dev/shm") else None) as scratch:
        settings = of_run(tables, overrides, method, seed, scratch)
        model, found = settings.encoder.model, {}
        if method == "mined once":
            mine(settings, tables / "train.jsonl", Path(scratch) / "mined.jsonl")
            settings = of_run(Path(scratch), overrides, method, seed, scratch, train_file="mined.jsonl")
        if method in METHODS:
            with walking(settings) if method == "walked" else nullcontext():
                started = time.perf_counter()
                result = train(settings)
                model, found["train_seconds"] = result.model, round(time.perf_counter() - started, 1)
            found["sentences_per_s"] = result.sentences_per_s
        encode: Any = Encoded(load_encoder(model, device=device()))
        powers = (0.0,) if method != "whitened" else (0.125, 0.25)
        for power in powers:
            chosen = (
                encode.whitened([row["answer"] for row in read(tables / "train.jsonl")], power) if power else encode
            )
            for split in ("dev", "test"):
                rows = read(tables / f"{split}.jsonl")
                data = paired_set([row["query"] for row in rows], [row["answer"] for row in rows])
                scores = query_scores(chosen, data)
                found[f"{split}, {power:g}"] = {m: [round(float(v), 5) for v in scores[m]] for m in METRICS}
    return found


def of_run(
    tables: Path, overrides: list[str], method: str, seed: str, scratch: str, train_file: str = "train.jsonl"
) -> Settings:
    """Return the settings of a run on tables."""
    path = tables / train_file
    source = f"path: {path}, column: query, positive_column: answer, document_column: name, max_sentences: 3000"
    return load_settings(
        "code",
        [
            f"corpus={{source: auto, {source}}}",
            f"run={{name: run, storage_path: {scratch}, seed: {seed}}}",
            "cluster={engine: local, cpus_per_worker: 2}",
            "evaluation.suites=[]",
            *overrides,
            *METHODS.get(method, []),
        ],
    )


@contextmanager
def walking(settings: Settings, among: int = 1000, degree: int = 10, restart: float = 0.1) -> Iterator[None]:
    """Have batches be random walks with restart on a graph: each code's nearest of a random thousand, by the base.

    After BatchSampler (Yang et al., KDD 2023). A batch hangs on seed and number alone; rows may come again in others.
    """
    encoder, seed = load_encoder(settings.encoder.model, settings.encoder, device=device()), settings.run.seed
    corpus = prepare(settings, encoder, LineReporter())
    codes_ND = encoder.encode(corpus.target_texts(range(len(corpus))))
    rng = np.random.default_rng([seed, 7])
    near_NK = np.empty((len(corpus), degree), dtype=np.int64)
    for row, code_D in enumerate(codes_ND):
        others = rng.choice(np.delete(np.arange(len(corpus)), row), min(among, len(corpus) - 1), replace=False)
        near_NK[row] = others[np.argsort(codes_ND[others] @ code_D)[-degree:]]

    def walk(plan: BatchPlan, number: int) -> NDArray[np.int64]:
        rng = np.random.default_rng([seed, number, 11])
        start = here = int(rng.integers(len(near_NK)))
        found, steps = {here: None}, 0
        while len(found) < plan.batch_size:
            steps += 1
            if steps % (20 * plan.batch_size) == 0:  # nothing new is near
                start = here = int(rng.integers(len(near_NK)))
            else:
                here = start if rng.random() < restart else int(rng.choice(near_NK[here]))
            found.setdefault(here)
        return rng.permutation(list(found))

    with patch.object(BatchPlan, "batch", walk):
        yield


def mine(settings: Settings, source: Path, target: Path) -> None:
    """Add a column of negatives, as sentence-transformers mines them; pairs without one have none."""
    from datasets import Dataset

    rows = read(source)
    model = SentenceTransformer(str(resolve_model(settings.encoder.model)), device=str(device()))
    pairs = Dataset.from_dict({"query": [r["query"] for r in rows], "answer": [r["answer"] for r in rows]})
    mined = mine_hard_negatives(
        pairs, model, num_negatives=1, range_max=50, relative_margin=0.05, sampling_strategy="top", verbose=False
    )
    negative = {(row["query"], row["answer"]): row["negative"] for row in mined}
    with target.open("w", encoding="utf-8") as file:
        for row in rows:
            file.write(json.dumps(row | {"negative": negative.get((row["query"], row["answer"]))}) + "\n")


def read(path: Path) -> list[dict[str, str]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def tabulate(folder: Path, out: Path | None) -> None:
    """Print the table: means over seeds, and intervals by drawing queries anew."""
    rows = read_results(folder)
    base = next(row for row in rows if row["task"][0] == "base")
    means: dict[str, NDArray[Any]] = {}
    found: dict[str, Any] = {}
    for method in dict.fromkeys(row["task"][0] for row in rows):
        own = [row for row in rows if row["task"][0] == method]
        for key in [key for key in own[0] if key.startswith("test, ")]:
            name = f"{method}, {key[6:]}" if method == "whitened" else method
            means[name] = np.mean([row[key]["mrr"] for row in own], axis=0)
            found[name] = {
                "seeds": len(own),
                **{m: float(np.mean([row[key][m] for row in own])) for m in METRICS},
                "mrr of each seed": [float(np.mean(row[key]["mrr"])) for row in own],
                "dev mrr": float(np.mean([row[f"dev{key[4:]}"]["mrr"] for row in own])),
                "train_seconds": [row.get("train_seconds") for row in own],
            }
    for name, row in found.items():
        row["mrr - base"] = interval(means[name] - means["base"])
        if "in-batch" in means:
            row["mrr - in-batch"] = interval(means[name] - means["in-batch"])
    result = {
        "question": "Does training on the pairs that code holds pay, and do hard negatives add to it?",
        **{k: base[k] for k in ("hardware", "date", "commit", "torch", "transformers", "sentence-transformers")},
        "methods": found,
    }
    print(f"{'':26}{'recall@1':>9}{'recall@10':>10}{'MRR':>8}{'- base':>24}{'- in-batch':>24}{'dev':>7} seeds")
    for name, row in found.items():
        changes = "".join(
            f"{row[k][0]:+8.3f} [{row[k][1]:+.3f},{row[k][2]:+.3f}]" if k in row else ""
            for k in ("mrr - base", "mrr - in-batch")
        )
        print(f"{name:26}{row['recall@1']:9.3f}{row['recall@10']:10.3f}{row['mrr']:8.3f}{changes}{row['dev mrr']:7.3f}"
              f" {row['seeds']}")  # fmt: skip
    if out:
        out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


def interval(change_Q: NDArray[Any]) -> list[float]:
    """The mean change over queries and its 95 % interval."""
    rng = np.random.default_rng(0)
    drawn = change_Q[rng.integers(0, len(change_Q), (10_000, len(change_Q)))].mean(axis=1)
    return [float(change_Q.mean()), *np.percentile(drawn, [2.5, 97.5]).tolist()]


if __name__ == "__main__":
    main()
