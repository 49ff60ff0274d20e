"""Transfer: how well a logistic regression on frozen sentence vectors solves seven classification tasks.

The protocol is that of SentEval (Conneau & Kiela 2018, arXiv 1803.05449) with its scikit-learn classifier and ten
folds (``usepytorch=False, kfold=10``), on the tasks of SimCSE (arXiv 2104.08821, appendix E):

- MR, CR, SUBJ, MPQA: nested cross-validation. Ten outer folds are tested in turn; on the other nine, ten inner folds
  choose the strength C of the regularisation from 2^-2 .. 2^3. The accuracy is the mean over the outer folds.
- SST2: C from 2^-2 .. 2^3 is chosen on the dev split.
- TREC, MRPC: ten folds of the training split choose C from 2^-1 .. 2^5. MRPC's features are |u-v| and u*v.

Details that move the last digits are SentEval's too: folds are stratified, shuffled and seeded with 1111 over rows
sorted by number of tokens and then by label; accuracies are rounded to two decimals before the first best C is taken
and before the outer folds are averaged; sentences are tokens joined by single blanks; vectors are used as the encoder
returns them, not normalised. An empty sentence (seven lines of CR and MPQA) is encoded as ".", as in SentEval's
examples; SimCSE's script encodes the empty string.

The classifier is L2-penalised (multinomial) logistic regression with a free intercept, scikit-learn's default since
0.22, solved until it has converged. scikit-learn's own stopping rule depends on its version: up to 1.3 ``tol`` bounds
the gradient of the summed loss, since 1.4 that of the mean loss, which stops well short of the optimum on unit-norm
vectors. SimCSE's published transfer scores come from SentEval's other classifier (``usepytorch=True``: the same model,
trained by Adam with early stopping), and need not agree to the last tenths.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from hncse_ray.errors import DataError, counted
from hncse_ray.evaluation.logistic import logistic_regressions, principal_axes
from hncse_ray.evaluation.senteval_files import GET_THE_DATA, read_lines
from hncse_ray.evaluation.vectors import Encode, FloatArray, encode_checked

logger = logging.getLogger(__name__)

Progress = Callable[[str], None]
IntArray = NDArray[np.int64]

FOLDS = 10
SEED = 1111
_STRENGTHS = tuple(2.0**t for t in range(-2, 4))
_KFOLD_STRENGTHS = tuple(2.0**t for t in range(-1, 6))
_EMPTY = "."
# What stratified folds need of every label: ten for ten folds, and ten in nine tenths of them for nested ones.
_LEAST_OF_A_LABEL = {"nested": 12, "kfold": FOLDS, "dev": 1}
_TRUNCATED = "Is the file truncated? Fetch it again"


class _Row(NamedTuple):
    sentences: tuple[str, ...]
    label: int
    lengths: tuple[int, ...]  # tokens, of each sentence


@dataclass(frozen=True)
class _Split:
    files: tuple[str, ...]  # binary: of label 1, of label 0
    rows: int  # as published; another number is worth a warning


@dataclass(frozen=True)
class _TransferSet:
    """Where a task lies below the data folder, how its files are read, and what chooses C."""

    folder: str
    format: Literal["binary", "sst", "trec", "mrpc"]
    choose: Literal["nested", "kfold", "dev"]
    splits: dict[str, _Split]
    labels: tuple[str, ...] = ("0", "1")


def _binary(task: str, positive: str, negative: str, rows: int) -> _TransferSet:
    return _TransferSet(task, "binary", "nested", {"train": _Split((positive, negative), rows)})


_SETS: dict[str, _TransferSet] = {
    "MR": _binary("MR", "rt-polarity.pos", "rt-polarity.neg", 10662),
    "CR": _binary("CR", "custrev.pos", "custrev.neg", 3775),
    "SUBJ": _binary("SUBJ", "subj.objective", "subj.subjective", 10000),
    "MPQA": _binary("MPQA", "mpqa.pos", "mpqa.neg", 10606),
    "SST2": _TransferSet(
        "SST/binary",
        "sst",
        "dev",
        {
            "train": _Split(("sentiment-train",), 67349),
            "dev": _Split(("sentiment-dev",), 872),
            "test": _Split(("sentiment-test",), 1821),
        },
    ),
    "TREC": _TransferSet(
        "TREC",
        "trec",
        "kfold",
        {"train": _Split(("train_5500.label",), 5452), "test": _Split(("TREC_10.label",), 500)},
        ("ABBR", "DESC", "ENTY", "HUM", "LOC", "NUM"),
    ),
    "MRPC": _TransferSet(
        "MRPC",
        "mrpc",
        "kfold",
        {"train": _Split(("msr_paraphrase_train.txt",), 4076), "test": _Split(("msr_paraphrase_test.txt",), 1725)},
    ),
}
TRANSFER_TASKS = tuple(_SETS)


def transfer_files() -> dict[str, tuple[str, ...]]:
    """Return the files of each task, relative to the data folder."""
    return {
        task: tuple(f"{one.folder}/{name}" for split in one.splits.values() for name in split.files)
        for task, one in _SETS.items()
    }


def evaluate_transfer(
    encode: Encode,
    data_dir: str | Path,
    tasks: Sequence[str] | None = None,
    *,
    num_processes: int | None = None,
    progress: Progress | None = None,
) -> dict[str, float]:
    """Score an encoder on SentEval's transfer tasks.

    Every file is read before anything is encoded, and each distinct sentence of a task is encoded once.

    Args:
        encode: the encoder to score.
        data_dir: SentEval's ``data/downstream`` folder.
        tasks: some of :data:`TRANSFER_TASKS`; default all seven.
        num_processes: fits at a time, each on one core; default as many as there are cores. They run as threads of
            this process (linear algebra holds no lock), and the scores do not depend on their number.
        progress: called with a line before and after each stage.

    Returns:
        Test accuracy times 100 for each task, under ``MRPC_F1`` the F1 of MRPC's paraphrases, and under ``avg`` the
        mean of the seven accuracies if all were scored.

    Raises:
        DataError: an unknown task, a missing or broken file, or vectors that cannot be scored.
    """
    chosen = tuple(dict.fromkeys(TRANSFER_TASKS if tasks is None else tasks))
    if not chosen:
        raise DataError("no transfer task is chosen", hint=f"Choose from {', '.join(TRANSFER_TASKS)}")
    data = {task: _read_task(task, data_dir) for task in chosen}
    tell = progress or (lambda line: None)
    scores: dict[str, float] = {}
    for task, splits in data.items():
        scores |= _score_task(task, splits, encode, num_processes, tell)
    if set(chosen) == set(TRANSFER_TASKS):
        scores["avg"] = sum(scores[task] for task in TRANSFER_TASKS) / len(TRANSFER_TASKS)
    return scores


# --- the protocol


class _Search(NamedTuple):
    """One search of C: which rows are learnt from, what judges a C, and which rows the best C is tested on.

    A judge is (rows left out of the training rows, rows whose accuracy counts): the same fold twice in
    cross-validation, nothing and the dev split otherwise. Left-out rows are positions in ``train``.
    """

    train: IntArray | slice
    judges: list[tuple[IntArray, IntArray]]
    test: IntArray


class _Outcome(NamedTuple):
    judged: float  # accuracy x 100 by the judges, rounded to two decimals
    predicted: IntArray  # labels of the test rows


def _score_task(
    task: str, splits: dict[str, list[_Row]], encode: Encode, num_processes: int | None, tell: Progress
) -> dict[str, float]:
    from joblib import cpu_count
    from threadpoolctl import threadpool_limits

    rows = [row for split in splits.values() for row in split]
    y_N = np.array([row.label for row in rows])
    tell(f"{task}: encoding the sentences of {len(rows):,} rows")
    z_ND, spread_D = principal_axes(_features(rows, encode))
    searches, strengths = _searches(_SETS[task].choose, y_N, [len(split) for split in splits.values()])
    units = [(search, strength) for search in searches for strength in strengths]
    fits = sum(1 + sum(len(left_out) > 0 for left_out, _ in search.judges) for search, _ in units)
    tell(f"{task}: {fits} logistic regressions on {z_ND.shape[1]} features")
    with threadpool_limits(1, user_api="blas"), ThreadPoolExecutor(num_processes or cpu_count()) as pool:
        outcomes = list(pool.map(lambda unit: _try_strength(z_ND, y_N, spread_D, *unit), units))
    accuracies, f1s = [], []
    for i, search in enumerate(searches):
        of_search = outcomes[i * len(strengths) : (i + 1) * len(strengths)]
        best = of_search[int(np.argmax([outcome.judged for outcome in of_search]))]  # the first of equals
        y_T = y_N[search.test]
        accuracies.append(round(100 * float(np.mean(best.predicted == y_T)), 2))
        f1s.append(round(100 * _f1(best.predicted, y_T), 2))
    scores = {task: round(float(np.mean(accuracies)), 2)}
    if task == "MRPC":
        scores["MRPC_F1"] = f1s[0]
    tell(", ".join(f"{name} {score:.2f}" for name, score in scores.items()))
    return scores


def _features(rows: Sequence[_Row], encode: Encode) -> FloatArray:
    """The encoder's own vectors, since the penalty makes their length matter; for pairs |u-v| and u*v side by side."""
    z_SD = encode_checked(encode, [sentence or _EMPTY for row in rows for sentence in row.sentences])
    if len(z_SD) == len(rows):
        return z_SD
    u_ND, v_ND = z_SD[::2], z_SD[1::2]
    return np.concatenate([np.abs(u_ND - v_ND), u_ND * v_ND], axis=1)


def _searches(
    choose: str, y_N: NDArray[np.integer[Any]], sizes: Sequence[int]
) -> tuple[list[_Search], tuple[float, ...]]:
    starts = np.cumsum([0, *sizes])
    spans = [np.arange(a, b) for a, b in zip(starts[:-1], starts[1:], strict=True)]
    train = slice(0, sizes[0])  # a view of the features, not a copy
    if choose == "dev":
        return [_Search(train, [(np.arange(0), spans[1])], spans[2])], _STRENGTHS
    if choose == "kfold":
        return [_Search(train, [(fold, fold) for fold in _folds(y_N[train])], spans[1])], _KFOLD_STRENGTHS
    searches = []
    for outer in _folds(y_N):
        rest = np.setdiff1d(spans[0], outer)
        searches.append(_Search(rest, [(fold, rest[fold]) for fold in _folds(y_N[rest])], outer))
    return searches, _STRENGTHS


def _folds(y_N: NDArray[np.integer[Any]]) -> list[IntArray]:
    """The rows held out by each of SentEval's folds."""
    from sklearn.model_selection import StratifiedKFold

    splitter = StratifiedKFold(n_splits=FOLDS, shuffle=True, random_state=SEED)
    return [held_out for _, held_out in splitter.split(np.zeros(len(y_N)), y_N)]


def _try_strength(
    z_ND: FloatArray, y_N: NDArray[np.integer[Any]], spread_D: FloatArray, search: _Search, strength: float
) -> _Outcome:
    """Fit all training rows, and them without each judge's left-out rows: one batch of problems."""
    left_out = [np.arange(0), *(rows for rows, _ in search.judges if len(rows))]
    y_T = y_N[search.train]
    used_TP = np.ones((len(y_T), len(left_out)), dtype=z_ND.dtype)
    for problem, rows in enumerate(left_out):
        used_TP[rows, problem] = 0
    w_DPM = logistic_regressions(z_ND[search.train], y_T, used_TP, spread_D, strength=strength)
    problems = range(1, len(left_out)) if len(left_out) > 1 else (0,)
    judged = [
        np.mean(_predict(z_ND[rows], w_DPM[:, problem]) == y_N[rows])
        for problem, (_, rows) in zip(problems, search.judges, strict=True)
    ]
    return _Outcome(round(100 * float(np.mean(judged)), 2), _predict(z_ND[search.test], w_DPM[:, 0]))


def _predict(z_ND: FloatArray, w_DM: FloatArray) -> IntArray:
    logits_NM = z_ND @ w_DM
    return logits_NM.argmax(axis=1) if logits_NM.shape[1] > 1 else (logits_NM[:, 0] > 0).astype(np.int64)


def _f1(predicted_N: IntArray, y_N: NDArray[np.integer[Any]]) -> float:
    both = int(np.sum((predicted_N == 1) & (y_N == 1)))
    either = int(np.sum(predicted_N == 1) + np.sum(y_N == 1))
    return 2 * both / either if either else 0.0


# --- the files


def _read_task(task: str, data_dir: str | Path) -> dict[str, list[_Row]]:
    if task not in _SETS:
        raise DataError(f"unknown transfer task {task!r}", hint=f"Choose from {', '.join(TRANSFER_TASKS)}")
    transfer_set = _SETS[task]
    folder = Path(data_dir) / transfer_set.folder
    if not folder.is_dir():
        raise DataError(f"the folder of {task} is missing", str(folder), GET_THE_DATA)
    splits = {}
    for name, split in transfer_set.splits.items():
        rows = [row for i, file in enumerate(split.files) for row in _read_file(folder / file, transfer_set, 1 - i)]
        if len(rows) != split.rows:
            logger.warning(
                "%s: %s %s has %d rows where the published set has %d; its score does not compare",
                folder, task, name, len(rows), split.rows,
            )  # fmt: skip
        # SentEval's order, which decides the folds: by number of tokens, then by label.
        splits[name] = sorted(rows, key=lambda row: (row.lengths, row.label))
    counts = np.bincount([row.label for row in splits["train"]], minlength=len(transfer_set.labels))
    least = _LEAST_OF_A_LABEL[transfer_set.choose]
    if counts.min() < least:
        label = transfer_set.labels[int(counts.argmin())]
        what = f"has {counted(int(counts.min()), 'training row')} of label {label} where at least {least} are needed"
        raise DataError(what, str(folder), "Is a file truncated? Fetch them again")
    return splits


def _read_file(path: Path, transfer_set: _TransferSet, file_label: int) -> Iterator[_Row]:
    lines = read_lines(path, "latin-1" if transfer_set.format in ("binary", "trec") else "utf-8-sig")
    first = 1
    if transfer_set.format == "mrpc":
        if not lines[0].startswith("Quality\t"):
            raise DataError("does not start with its header line", f"{path}:1", "Expected Quality, #1 ID, #2 ID, ...")
        lines, first = lines[1:], 2
    for number, line in enumerate(lines, start=first):
        where = f"{path}:{number}"
        if transfer_set.format == "binary":
            tokens = line.split()  # none in a blank line, which is a sentence all the same
            yield _Row((" ".join(tokens),), file_label, (len(tokens),))
            continue
        label, texts = _columns(line, transfer_set.format, where)
        if label.strip() not in transfer_set.labels:
            what = f"the label {label!r} is not one of {', '.join(transfer_set.labels)}"
            raise DataError(what, where, _TRUNCATED)
        sentences = [text.split() for text in texts]
        if not all(sentences):
            raise DataError("has an empty sentence", where, _TRUNCATED)
        yield _Row(
            tuple(" ".join(tokens) for tokens in sentences),
            transfer_set.labels.index(label.strip()),
            tuple(len(tokens) for tokens in sentences),
        )
    if not lines:
        raise DataError("holds no row", str(path), _TRUNCATED)


def _columns(line: str, format: str, where: str) -> tuple[str, list[str]]:
    """The label and the sentences of a line."""
    if format == "trec":
        label, _, rest = line.strip().partition(":")
        return label, [rest.partition(" ")[2]]  # without the fine label
    columns = line.split("\t")
    needed = 2 if format == "sst" else 5
    if len(columns) < needed:
        found = counted(len(columns), "tab-separated column")
        raise DataError(f"has {found} where {needed} are needed", where, _TRUNCATED)
    return (columns[1], [columns[0]]) if format == "sst" else (columns[0], columns[3:5])
