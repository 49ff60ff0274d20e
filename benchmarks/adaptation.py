"""Does adapting an encoder to a corpus help those who search it? Six judged collections, controls and peers beside.

Every method trains all-MiniLM-L6-v2 on the documents of a collection (``corpus.jsonl``) and is scored on its judged
test queries. Nothing is chosen on test: the scores without labels (``pseudo-relevance``, and ``cloze``: does a sentence
find its document?) and the dev queries are written beside. Of every trained model four exports are scored: as trained
and half way to the base (``export.merge`` 1 and 0.5, seed 0 alone), each without and with whitening (``export.whiten``
0.125).
``base`` has whitening alone beside it. Each is scored with BM25 beside it too: who searches with
a second index, of words, asks whether the encoder still gains.

    python benchmarks/adaptation.py run --data DOMAINS --out FOLDER --methods base simcse adapt@0,1,2
    python benchmarks/adaptation.py table FOLDER --out result.json

``run`` goes on with what FOLDER holds already, so it can be stopped at any time.
"""

import argparse
import json
import os
import random
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from runs import Encoded, add_options, device, read_results, run_tasks, with_seeds
from safetensors.torch import load_file
from scipy.stats import spearmanr
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.losses import DenoisingAutoEncoderLoss

from hncse_ray import load_encoder, load_settings, train
from hncse_ray.config import Settings
from hncse_ray.corpus import Corpus
from hncse_ray.encoder import SentenceEncoder, resolve_model
from hncse_ray.evaluation import RetrievalSet, evaluate_sts, read_collection
from hncse_ray.evaluation.retrieval import METRICS, query_scores
from hncse_ray.negatives.lexical import LexicalIndex
from hncse_ray.reporting import LineReporter
from hncse_ray.training.checks import prepare
from hncse_ray.training.label_free import SUITES, hold_out, label_free_sets
from hncse_ray.training.merging import merged

WITH_BM25 = " + bm25"
COLLECTIONS = ("cran", "cisi", "med", "cacm", "npl", "lisa")
# InfoNCE in the batch, at the learning rate that is usual for it
PLAIN = ["objective={name: info_nce}", "negatives={source: none}", "train.batch_size=64", "train.learning_rate=2e-5"]
INDEX = "negatives={source: in_process, refresh: sync, refresh_every_steps: 50, max_score: 0.7}"
METHODS: dict[str, list[str]] = {
    "simcse": [*PLAIN, "views={mix: {dropout: 1}}"],
    "is-cse": [*PLAIN, "views={mix: {dropout: 1}}", "objective={name: instance_smoothing}"],
    "hncse": [*PLAIN, "views={mix: {dropout: 1}}", "objective={name: hybrid}", INDEX],
    "title": [*PLAIN, "views={mix: {title: 1}}"],
    "crop": [*PLAIN, "views={mix: {crop: 1}}"],
    "cloze": [*PLAIN, "views={mix: {cloze: 1}}"],
    "title + cloze": [*PLAIN],
    "title + cloze, hncse": [*PLAIN, "objective={name: hybrid}", INDEX],
    "adapt": [],
    "adapt, 2e-5": ["train.learning_rate=2e-5"],
    "adapt, fresh, 100 steps": ["negatives.use=fresh", "train.max_steps=100"],
    "adapt, contrast": ["objective.contrast_weight=0.5"],
    "adapt, cosine alone": ["negatives.score=cosine"],
    "adapt, bm25 alone": ["negatives.score=lexical"],
    "adapt, 200 steps": ["train.max_steps=200"],
}


def main() -> None:
    parser = argparse.ArgumentParser(description="Adaptation to six collections.")
    commands = parser.add_subparsers(dest="command", required=True)
    run = commands.add_parser("run")
    run.add_argument("--data", type=Path, required=True, help="folder of the collections")
    run.add_argument("--collections", nargs="+", default=list(COLLECTIONS))
    run.add_argument("--sts", help="folder of SentEval: the STS tasks are scored too, without a mixture")
    add_options(commands, run, ["base", *METHODS, "tsdae"])
    args = parser.parse_args()
    if args.command == "run":
        tasks = [
            (collection, method, seed) for method, seed in with_seeds(args.methods) for collection in args.collections
        ]
        measured = partial(measure, args.data, args.sts, args.override)
        run_tasks(tasks, measured, args.out, workers=args.workers, minutes=args.minutes)
    else:
        tabulate(args.folder, args.out)


def measure(
    data: Path, sts: str | None, overrides: list[str], collection: str, method: str, seed: str
) -> dict[str, Any]:
    """Train if the method does, and score every export."""
    with tempfile.TemporaryDirectory(dir="/dev/shm" if os.path.isdir("/dev/shm") else None) as scratch:
        corpus_file = data / collection / "corpus.jsonl"
        chosen = [
            f"corpus={{source: documents, path: {corpus_file}}}",
            f"run={{name: run, storage_path: {scratch}, seed: {seed}}}",
            "cluster={engine: local, cpus_per_worker: 2}",
            "export={merge: 1, whiten: none}",
            f"evaluation.suites=[{', '.join(SUITES)}]",
            *METHODS.get(method, []),
            *overrides,
        ]
        steps = load_settings("adapt", chosen).train.max_steps
        at_the_end = [f"train.{what}_every_steps={steps}" for what in ("evaluate", "checkpoint", "log")]
        settings = load_settings("adapt", [*chosen, *at_the_end])
        assert settings.train.max_steps == steps
        encoder = load_encoder(settings.encoder.model, settings.encoder, device=device())
        base, found = {name: value.clone() for name, value in encoder.weights().items()}, {}
        corpus = prepare(settings, encoder, LineReporter())
        started = time.perf_counter()
        if method in METHODS:
            train(settings)
            # The last weights, also where the label-free score prefers the base: what a method does is the question.
            weights = load_file(Path(settings.run_dir) / "checkpoints" / f"step_{steps:09d}" / "encoder.safetensors")
            lines = (Path(settings.run_dir) / "metrics.jsonl").read_text().splitlines()
            found["last_log"] = next((row for line in reversed(lines) if "loss" in (row := json.loads(line))), None)
        elif method == "tsdae":
            weights = tsdae(settings, corpus, int(seed))
        else:
            weights = base
        found["train_seconds"] = round(time.perf_counter() - started, 1)
    encoder.load_weights(base)
    scored = Scored(data / collection, settings, corpus, Encoded(encoder))
    exports: dict[str, Any] = {}
    shares = (0.0,) if method == "base" else (1.0, 0.5) if seed == "0" else (1.0,)
    for share in shares:
        encoder.load_weights({name: value.to(base[name]) for name, value in merged(base, weights, share).items()})
        for power in (0.0, 0.0625, 0.125, 0.25) if method == "base" else (0.0, 0.125):
            exports[f"{share:g}, {power:g}"] = scored(encoder, power)
        exports[f"{share:g}, 0{WITH_BM25}"] = scored.with_bm25()
        if sts and share in (0.0, 1.0):
            exports[f"{share:g}, 0"]["sts"] = evaluate_sts(Encoded(encoder), sts)["avg"]
    return found | {"exports": exports}


class Scored:
    """Scores an encoder on the judged queries of a collection and on what its documents ask of themselves."""

    def __init__(self, folder: Path, settings: Settings, corpus: Corpus, base: Encoded) -> None:
        self.corpus = corpus
        self.plain: Encoded | None = None
        judged = read_collection(folder, ("dev", "test"))
        gaps = hold_out(settings, corpus)
        assert gaps is not None
        self.sets: dict[str, tuple[str, RetrievalSet]] = {
            "dev": ("ndcg@10", judged["dev"]),
            "test": ("ndcg@10", judged["test"]),
        }
        for suite, asked in label_free_sets(settings, corpus, gaps, base).items():
            self.sets[suite] = ("mrr" if suite == "cloze" else "ndcg@10", asked)

    def __call__(self, encoder: SentenceEncoder, power: float) -> dict[str, list[float]]:
        """Return what each query earns."""
        if power == 0:
            self.plain = Encoded(encoder)
        assert self.plain is not None
        encode: Any = self.plain
        if power:
            encode = self.plain.whitened(self.corpus.texts(range(len(self.corpus))), power)
        found = {}
        for name, (metric, data) in self.sets.items():
            scores = query_scores(encode, data)
            found[name] = [round(float(value), 5) for value in scores[metric]]
            if name == "test":
                found["recall@100"] = [round(float(value), 5) for value in scores["recall@100"]]
        return found

    def with_bm25(self) -> dict[str, list[float]]:
        """Rank by the last encoder's cosine and 0.3 of BM25, its best being 1, as the teacher of ``adapt`` does."""
        assert self.plain is not None
        found: dict[str, list[float]] = {}
        for name in ("dev", "test"):
            metric, data = self.sets[name]
            index = LexicalIndex(data.candidates, keys_nc=np.arange(len(data.candidates))[:, None])
            cosine_QA = self.plain(data.queries) @ self.plain(data.candidates).T
            found[name] = []
            for query, score_A, grades in zip(data.queries, cosine_QA, data.grades, strict=True):
                lexical_A = index.scores(query)
                score_A = score_A + 0.3 * lexical_A / max(lexical_A.max(), 1e-9)
                own = np.fromiter(grades, np.int_)
                rank_R = 1 + np.count_nonzero(score_A > score_A[own][:, None], axis=1)
                found[name].append(round(METRICS[metric](rank_R, np.fromiter(grades.values(), np.int_)), 5))
        return found


def tsdae(settings: Settings, corpus: Corpus, seed: int) -> dict[str, torch.Tensor]:
    """Train by sentence-transformers' own loss (Wang et al. 2021, arXiv 2104.06979) on as many documents.

    Six of ten words are deleted, the decoder is tied, the learning rate is that of the paper's code, 3e-5, constant.
    """
    rng = random.Random(seed)
    torch.manual_seed(seed)
    model = SentenceTransformer(str(resolve_model(settings.encoder.model)), device=str(device()))
    model.max_seq_length = settings.encoder.max_length
    loss = DenoisingAutoEncoderLoss(model, tie_encoder_decoder=True).to(device())
    optimizer = torch.optim.AdamW({id(p): p for p in loss.parameters()}.values(), lr=3e-5)
    texts = corpus.texts(range(len(corpus)))
    loss.train()
    for _ in range(settings.train.max_steps or 100):
        batch = rng.sample(texts, min(64, len(texts)))
        noisy = [" ".join([w for w in t.split() if rng.random() < 0.4] or t.split()[:1]) for t in batch]
        with torch.autocast(device().type, torch.bfloat16):
            features = [{k: v.to(device()) for k, v in model.preprocess(part).items() if hasattr(v, "to")}
                        for part in (noisy, batch)]  # fmt: skip
            value = loss(features, torch.empty(0))
        optimizer.zero_grad()
        value.backward()
        torch.nn.utils.clip_grad_norm_(loss.parameters(), 1.0)
        optimizer.step()
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        return {name: value.cpu() for name, value in load_encoder(folder).weights().items()}


def tabulate(folder: Path, out: Path | None) -> None:
    """Print the table and the label-free score beside the labelled one; write the result."""
    rows = [dict(zip(("collection", "method", "seed"), row["task"], strict=True)) | row for row in read_results(folder)]
    untouched = {(r["collection"], r["seed"]): r["exports"]["0, 0"] for r in rows if r["method"] == "base"}
    base = {collection: untouched[collection, "0"] for collection in COLLECTIONS if (collection, "0") in untouched}
    found: dict[str, Any] = {}
    points = []
    for method in dict.fromkeys(row["method"] for row in rows):
        own = [row for row in rows if row["method"] == method]
        for export in dict.fromkeys(name for row in own for name in row["exports"]):
            by: dict[str, dict[str, NDArray[Any]]] = {}
            for name in ("test", "dev", *SUITES, "recall@100"):
                for collection in base:
                    scores = {
                        row["seed"]: row["exports"][export][name]
                        for row in own
                        if row["collection"] == collection and name in row["exports"].get(export, ())
                    }
                    before = {seed: untouched.get((collection, seed), base[collection])[name] for seed in scores}
                    if name in SUITES:  # asked by other sentences with each seed, of which both have to be there
                        before = {seed: [np.mean(before[seed])] for seed in scores if (collection, seed) in untouched}
                        scores = {seed: [np.mean(scores[seed])] for seed in before}
                    if scores:
                        by.setdefault(name, {})[collection] = np.mean(
                            [np.subtract(scores[seed], before[seed]) for seed in scores], axis=0
                        )
            seeds_of = {row["seed"] for row in own if export in row["exports"]}
            found[f"{method} | {export}"] = summary(by, seeds=len(seeds_of))
            if sts := {row["collection"]: row["exports"][export]["sts"] for row in own
                       if "sts" in row["exports"].get(export, ())}:  # fmt: skip
                found[f"{method} | {export}"]["sts"] = sts
            if export != "0, 0" and not export.endswith(WITH_BM25):
                points += [
                    {"method": method, "export": export, "collection": c,
                     **{name: float(by[name][c].mean()) for name in ("test", "dev", *SUITES)}}
                    for c in by["test"] if SUITES[0] in by
                ]  # fmt: skip
    result = {
        "question": "Does adapting an encoder to a corpus help those who search it?",
        **{k: rows[0][k] for k in ("hardware", "date", "commit", "torch", "transformers", "sentence-transformers")},
        "base": {c: {k: float(np.mean(v)) for k, v in row.items()} for c, row in base.items()},
        "changes": found,
        "label_free": {
            "spearman with test": {
                name: float(spearmanr([p[name] for p in points], [p["test"] for p in points]).statistic)
                for name in ("dev", *SUITES)
            },
            "points": points,
        },
    }
    print_table(result)
    if out:
        out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


def summary(by: dict[str, dict[str, NDArray[Any]]], *, seeds: int) -> dict[str, Any]:
    """Mean changes by collection, their mean, and its interval: queries are drawn anew within each collection."""
    rng = np.random.default_rng(0)
    row: dict[str, Any] = {"seeds": seeds}
    for name, changes in by.items():
        row[name] = {c: float(change.mean()) for c, change in changes.items()}
        row[f"{name}, mean"] = float(np.mean(list(row[name].values())))
    drawn = [c[rng.integers(0, len(c), (10_000, len(c)))].mean(axis=1) for c in by["test"].values()]
    row["test, interval of the mean"] = np.percentile(np.mean(drawn, axis=0), [2.5, 97.5]).tolist()
    queries = np.concatenate(list(by["test"].values()))
    over_queries = queries[rng.integers(0, len(queries), (10_000, len(queries)))].mean(axis=1)
    row["test, over all queries"] = [float(queries.mean()), *np.percentile(over_queries, [2.5, 97.5]).tolist()]
    return row


def print_table(result: dict[str, Any]) -> None:
    """One line a method and export: change of test nDCG@10 against the base."""
    names = list(result["base"])
    print(f"{'':44}" + "".join(f"{n:>8}" for n in names) + f"{'mean':>8}{'interval':>18}{'dev':>8}{'pseudo':>8} seeds")
    print(f"{'base':44}" + "".join(f"{result['base'][n]['test']:8.3f}" for n in names))
    for name, row in result["changes"].items():
        cells = "".join(f"{row['test'][n]:+8.3f}" if n in row["test"] else f"{'':8}" for n in names)
        low, high = row["test, interval of the mean"]
        others = f"{row['dev, mean']:+8.3f}" + (
            f"{row['pseudo-relevance, mean']:+8.3f}" if "pseudo-relevance, mean" in row else f"{'':8}"
        )
        print(f"{name:44}{cells}{row['test, mean']:+8.3f}  {low:+7.3f} {high:+7.3f}{others} {row['seeds']}")
    followed = ", ".join(f"{name} {value:+.2f}" for name, value in result["label_free"]["spearman with test"].items())
    print(f"Spearman with test: {followed} over {len(result['label_free']['points'])} points")


if __name__ == "__main__":
    main()
