"""Semantic textual similarity: Spearman correlation of cosine and human score, by the protocol of the field.

The protocol is that of SentEval (Conneau & Kiela 2018, arXiv 1803.05449) as SimCSE uses it (arXiv 2104.08821,
appendix B): all pairs of a task in one list (the "all" setting), no regressor, Spearman rather than Pearson,
STS13 without SMT, the test splits of STS-Benchmark and SICK-R, sentences as tokens joined by single blanks.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from hncse_ray.errors import DataError, counted
from hncse_ray.evaluation.senteval_files import GET_THE_DATA, read_lines
from hncse_ray.evaluation.vectors import Encode, FloatArray, encode_unit

logger = logging.getLogger(__name__)

GOLD_MIN, GOLD_MAX = 0.0, 5.0
# A smaller spread of cosines is the rounding of 32 bits, not a ranking of pairs.
MIN_COSINE_SPREAD = 1e-6


class StsPair(NamedTuple):
    """Two sentences and how similar people find them, from 0 (unrelated) to 5 (the same)."""

    sentence1: str
    sentence2: str
    gold: float


@dataclass(frozen=True)
class StsPairs:
    """The scored pairs of one split of a task, files concatenated; plain data that pickles."""

    name: str
    pairs: tuple[StsPair, ...]

    def __len__(self) -> int:
        """Return the number of scored pairs."""
        return len(self.pairs)


@dataclass(frozen=True)
class _Split:
    files: tuple[str, ...]
    pairs: int  # as published; another number is worth a warning


@dataclass(frozen=True)
class _StsSet:
    """Where a task lies below the data folder, and which columns of its tab-separated files matter."""

    folder: str
    splits: Mapping[str, _Split]
    sentence_columns: tuple[int, int]
    gold_column: int | None  # None: gold scores are the lines of a file of their own, empty where unscored
    header: tuple[str, ...] = ()


def _semeval(year: int, pairs: int, *names: str) -> _StsSet:
    files = tuple(f"STS.input.{name}.txt" for name in names)
    return _StsSet(f"STS/STS{year}-en-test", {"test": _Split(files, pairs)}, (0, 1), None)


_SETS: dict[str, _StsSet] = {
    "STS12": _semeval(12, 3108, "MSRpar", "MSRvid", "SMTeuroparl", "surprise.OnWN", "surprise.SMTnews"),
    "STS13": _semeval(13, 1500, "FNWN", "headlines", "OnWN"),  # SMT is not free to share, and not scored
    "STS14": _semeval(14, 3750, "deft-forum", "deft-news", "headlines", "images", "OnWN", "tweet-news"),
    "STS15": _semeval(15, 3000, "answers-forums", "answers-students", "belief", "headlines", "images"),
    "STS16": _semeval(16, 1186, "answer-answer", "headlines", "plagiarism", "postediting", "question-question"),
    "STSBenchmark": _StsSet(
        "STS/STSBenchmark",
        {
            "train": _Split(("sts-train.csv",), 5749),
            "dev": _Split(("sts-dev.csv",), 1500),
            "test": _Split(("sts-test.csv",), 1379),
        },
        sentence_columns=(5, 6),
        gold_column=4,
    ),
    "SICKRelatedness": _StsSet(
        "SICK",
        {
            "train": _Split(("SICK_train.txt",), 4500),
            "dev": _Split(("SICK_trial.txt",), 500),
            "test": _Split(("SICK_test_annotated.txt",), 4927),
        },
        sentence_columns=(1, 2),
        gold_column=3,
        header=("pair_ID", "sentence_A", "sentence_B", "relatedness_score"),
    ),
}
STS_TASKS = tuple(_SETS)


def sts_files() -> dict[str, tuple[str, ...]]:
    """Return the files of each task, relative to the data folder; train and dev splits included."""
    files: dict[str, tuple[str, ...]] = {}
    for task, sts_set in _SETS.items():
        names = [name for split in sts_set.splits.values() for name in split.files]
        golds = [_gold_path(Path(name)).name for name in names] if sts_set.gold_column is None else []
        files[task] = tuple(f"{sts_set.folder}/{name}" for name in (*names, *golds))
    return files


def evaluate_sts(encode: Encode, data_dir: str | Path, tasks: Sequence[str] | None = None) -> dict[str, float]:
    """Score an encoder on the test splits of the STS tasks.

    Every file is read before anything is encoded, and a sentence that several tasks share is encoded once.

    Args:
        encode: the encoder to score.
        data_dir: SentEval's ``data/downstream`` folder.
        tasks: some of :data:`STS_TASKS`; default all seven.

    Returns:
        Spearman correlation times 100 for each task, and under ``avg`` their mean if all seven were scored
        (the field's "Avg."; a mean of fewer would not compare to it, and is left out).

    Raises:
        DataError: an unknown task, a missing or broken file, or vectors that cannot be scored.
    """
    chosen = tuple(dict.fromkeys(STS_TASKS if tasks is None else tasks))
    if not chosen:
        raise DataError("no STS task is chosen", hint=f"Choose from {', '.join(STS_TASKS)}")
    scores = dict(zip(chosen, _score(encode, [read_sts(task, "test", data_dir) for task in chosen]), strict=True))
    if set(chosen) == set(STS_TASKS):
        scores["avg"] = sum(scores.values()) / len(STS_TASKS)
    return scores


def spearman(encode: Encode, pairs: StsPairs) -> float:
    """Spearman correlation times 100 of the encoder's cosines and the gold scores.

    Raises:
        DataError: the encoder's vectors cannot be scored, or the correlation is undefined since all cosines or
            all gold scores are the same.
    """
    return _score(encode, [pairs])[0]


def read_sts(task: str, split: str, data_dir: str | Path) -> StsPairs:
    """Read the scored pairs of a task.

    Args:
        task: one of :data:`STS_TASKS`.
        split: ``test``; STSBenchmark and SICKRelatedness also have ``train`` and ``dev``.
        data_dir: SentEval's ``data/downstream`` folder.

    Raises:
        DataError: an unknown task or split, or a file that is missing or broken; it names the file and line.
    """
    if task not in _SETS:
        raise DataError(f"unknown STS task {task!r}", hint=f"Choose from {', '.join(STS_TASKS)}")
    sts_set = _SETS[task]
    if split not in sts_set.splits:
        raise DataError(f"{task} has no split {split!r}", hint=f"Choose from {', '.join(sts_set.splits)}")
    folder = Path(data_dir) / sts_set.folder
    if not folder.is_dir():
        raise DataError(f"the folder of {task} is missing", str(folder), GET_THE_DATA)
    published = sts_set.splits[split]
    pairs = tuple(pair for name in published.files for pair in _read_file(folder / name, sts_set))
    if not pairs:
        raise DataError(f"holds no scored pair of {task}", str(folder), GET_THE_DATA)
    if len(pairs) != published.pairs:
        logger.warning(
            "%s: %s %s has %d scored pairs where the published set has %d; its score does not compare",
            folder, task, split, len(pairs), published.pairs,
        )  # fmt: skip
    return StsPairs(f"{task} {split}", pairs)


def _read_file(path: Path, sts_set: _StsSet) -> Iterator[StsPair]:
    rows = [line.split("\t") for line in read_lines(path)]
    start = 1 if sts_set.header else 0
    if tuple(rows[0][: len(sts_set.header)]) != sts_set.header:
        hint = f"Expected {' '.join(sts_set.header)}"
        raise DataError("does not start with its header line", f"{path}:1", hint)
    golds = _gold_lines(path, rows=len(rows)) if sts_set.gold_column is None else None
    columns = max(*sts_set.sentence_columns, sts_set.gold_column or 0) + 1
    for number, row in enumerate(rows[start:], start=start + 1):
        where = f"{path}:{number}"
        if len(row) < columns:
            hint = "Is the file truncated? Fetch it again"
            raise DataError(f"has {counted(len(row), 'tab-separated column')} where {columns} are needed", where, hint)
        if golds is None:
            assert sts_set.gold_column is not None
            gold = _parse_gold(row[sts_set.gold_column], where)
        elif not golds[number - 1].strip():
            continue
        else:
            gold = _parse_gold(golds[number - 1], f"{_gold_path(path)}:{number}")
        # Tokens joined by single blanks: what SentEval hands to an encoder.
        sentence1, sentence2 = (" ".join(row[column].split()) for column in sts_set.sentence_columns)
        if not sentence1 or not sentence2:
            raise DataError("has an empty sentence", where)
        yield StsPair(sentence1, sentence2, gold)


def _gold_path(path: Path) -> Path:
    return path.with_name(path.name.replace("STS.input.", "STS.gs."))


def _gold_lines(path: Path, *, rows: int) -> list[str]:
    gold_path = _gold_path(path)
    golds = read_lines(gold_path)
    if len(golds) != rows:
        what = f"has {counted(len(golds), 'score')} for {counted(rows, 'pair')} of {path.name}"
        raise DataError(what, str(gold_path), "One of the two is truncated; fetch both again")
    return golds


def _parse_gold(text: str, where: str) -> float:
    try:
        gold = float(text)
    except ValueError:
        gold = math.nan
    if not GOLD_MIN <= gold <= GOLD_MAX:
        raise DataError(f"the score {text!r} is not a number from {GOLD_MIN:g} to {GOLD_MAX:g}", where)
    return gold


def cosines(encode: Encode, sets: Sequence[StsPairs]) -> list[FloatArray]:
    """Return the encoder's cosine of every pair, one array for each set; each distinct sentence is encoded once.

    Raises:
        DataError: the encoder's vectors cannot be scored.
    """
    pairs = [pair for one in sets for pair in one.pairs]
    z_ND = encode_unit(encode, [pair.sentence1 for pair in pairs] + [pair.sentence2 for pair in pairs])
    cosine_N = np.einsum("nd,nd->n", z_ND[: len(pairs)], z_ND[len(pairs) :])
    ends = np.cumsum([len(one) for one in sets])[:-1]
    return np.split(cosine_N, ends)


def _score(encode: Encode, sets: Sequence[StsPairs]) -> list[float]:
    return [correlation(own_N, one) for own_N, one in zip(cosines(encode, sets), sets, strict=True)]


def correlation(cosine_N: FloatArray, pairs: StsPairs) -> float:
    """Return Spearman's correlation of the cosines of pairs with their gold scores, x 100.

    Raises:
        DataError: it is undefined, since all cosines or all gold scores are the same.
    """
    gold_N = [pair.gold for pair in pairs.pairs]
    if min(gold_N) == max(gold_N):
        what = f"every scored pair ({len(gold_N)}) has the same gold score, so that Spearman is undefined"
        raise DataError(what, pairs.name, "The data are incomplete; fetch them again")
    if np.ptp(cosine_N) < MIN_COSINE_SPREAD:
        what = f"the encoder gives all {len(gold_N)} pairs the same cosine, so that Spearman is undefined"
        hint = "Its embeddings have collapsed to one direction, or it ignores its input"
        raise DataError(what, pairs.name, hint)
    from scipy.stats import spearmanr  # takes a second to import, in every process of a run

    score = 100 * float(spearmanr(cosine_N, gold_N).statistic)
    logger.info("%s: %.2f over %d pairs", pairs.name, score, len(gold_N))
    return score
