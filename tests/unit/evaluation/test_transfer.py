"""SentEval's transfer protocol on a tiny folder, against plain scikit-learn loops; broken files; the real data."""

import logging
import os
import warnings
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from scipy.special import softmax
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import f1_score
from sklearn.model_selection import StratifiedKFold

from hncse_ray.errors import DataError
from hncse_ray.evaluation import transfer
from hncse_ray.evaluation.logistic import logistic_regressions, principal_axes
from hncse_ray.evaluation.transfer import TRANSFER_TASKS, evaluate_transfer

FILES = {
    "MR": ("MR/rt-polarity.pos", "MR/rt-polarity.neg"),
    "CR": ("CR/custrev.pos", "CR/custrev.neg"),
    "SUBJ": ("SUBJ/subj.objective", "SUBJ/subj.subjective"),
    "MPQA": ("MPQA/mpqa.pos", "MPQA/mpqa.neg"),
}
QUESTIONS = ("ABBR", "DESC", "ENTY", "HUM", "LOC", "NUM")
D = 12
# How far apart the classes are: chance, overlapping, separable.
SEPARATION = {"MR": 0.0, "CR": 0.4, "SUBJ": 4.0, "MPQA": 0.7, "SST2": 0.5, "TREC": 0.7, "MRPC": 0.5}


class Vectors:
    """A fixed random vector a sentence, of any length, shifted by the number in its first word (its class)."""

    def __init__(self, dtype: type = np.float64) -> None:
        self.dtype = dtype
        self.calls: list[list[str]] = []

    def __call__(self, texts: list[str]) -> np.ndarray:
        self.calls.append(texts)
        return np.array([self.vector(text) for text in texts]).astype(self.dtype)

    def vector(self, text: str) -> np.ndarray:
        rng = np.random.default_rng(list(text.encode()))
        kind, _, strength = text.split()[0].partition("x")
        shift = np.random.default_rng(int(kind)).normal(size=D) * float(strength) if strength else np.zeros(D)
        return 3 * (rng.normal(size=D) + shift) + 1


def write(path: Path, lines: list[str], encoding: str = "utf-8") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes("".join(line + "\n" for line in lines).encode(encoding))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """All seven sets in SentEval's layout, a hundred or so rows each."""
    rng = np.random.default_rng(0)

    def sentence(task: str, label: int) -> str:
        words = [f"w{n}" for n in rng.integers(1000, size=rng.integers(1, 6))]
        return " ".join([f"{label}x{SEPARATION[task]}", *words])

    for task, files in FILES.items():
        for file, label, rows in zip(files, (1, 0), (70, 50), strict=True):
            write(tmp_path / file, [sentence(task, label) for _ in range(rows)], "latin-1")
    for split, rows in (("train", 150), ("dev", 60), ("test", 70)):
        labels = rng.integers(2, size=rows)
        write(tmp_path / f"SST/binary/sentiment-{split}", [f"{sentence('SST2', y)} \t{y}" for y in labels])
    for file, rows in (("train_5500", 150), ("TREC_10", 60)):
        labels = np.arange(rows) % 6
        write(
            tmp_path / f"TREC/{file}.label", [f"{QUESTIONS[y]}:fine {sentence('TREC', y)}" for y in labels], "latin-1"
        )
    for split, rows in (("train", 140), ("test", 60)):
        lines = ["\ufeffQuality\t#1 ID\t#2 ID\t#1 String\t#2 String"]
        for i, y in enumerate(rng.integers(2, size=rows)):
            first = sentence("MRPC", 1)
            second = sentence("MRPC", 1 if y else 0)
            lines.append(f"{y}\t{i}\t{i + 1}\t{first}\t{second}")
        write(tmp_path / f"MRPC/msr_paraphrase_{split}.txt", lines)
    return tmp_path


def rows_of(task: str, folder: Path) -> list[list[tuple[tuple[list[str], ...], int]]]:
    """SentEval's reading and order, restated."""

    def binary() -> Iterator[tuple[tuple[list[str], ...], int]]:
        for file, label in zip(FILES[task], (1, 0), strict=True):
            for line in (folder / file).read_text("latin-1").splitlines():
                yield (line.split(),), label

    def split(file: str) -> Iterator[tuple[tuple[list[str], ...], int]]:
        for line in (folder / file).read_text("latin-1" if task == "TREC" else "utf-8").splitlines():
            if task == "SST2":
                yield (line.split("\t")[0].split(),), int(line.split("\t")[1])
            elif task == "TREC":
                yield (line.split(":", 1)[1].split(" ", 1)[1].split(),), QUESTIONS.index(line.split(":")[0])
            elif "Quality" not in line:
                columns = line.split("\t")
                yield (columns[3].split(), columns[4].split()), int(columns[0])

    files = {
        "SST2": [f"SST/binary/sentiment-{name}" for name in ("train", "dev", "test")],
        "TREC": ["TREC/train_5500.label", "TREC/TREC_10.label"],
        "MRPC": [f"MRPC/msr_paraphrase_{name}.txt" for name in ("train", "test")],
    }
    splits = [list(binary())] if task in FILES else [list(split(file)) for file in files[task]]
    return [sorted(rows, key=lambda row: (*map(len, row[0]), row[1])) for rows in splits]


def naive_scores(task: str, folder: Path, encode: Vectors) -> dict[str, float]:
    """SentEval's protocol, fold by fold, with scikit-learn solving each problem to the end."""

    def features(rows: list[tuple[tuple[list[str], ...], int]]) -> tuple[np.ndarray, np.ndarray]:
        sides = [encode([" ".join(s) or "." for s in side]) for side in zip(*(row[0] for row in rows), strict=True)]
        x = sides[0] if len(sides) == 1 else np.hstack([np.abs(sides[0] - sides[1]), sides[0] * sides[1]])
        return x, np.array([row[1] for row in rows])

    def fit(x: np.ndarray, y: np.ndarray, power: int) -> LogisticRegression:
        return LogisticRegression(C=2.0**power, solver="newton-cholesky", tol=1e-10).fit(x, y)

    def accuracy(model: LogisticRegression, x: np.ndarray, y: np.ndarray) -> float:
        return round(100 * model.score(x, y), 2)

    def best_by_folds(x: np.ndarray, y: np.ndarray, powers: range) -> LogisticRegression:
        means = []
        for power in powers:
            folds = StratifiedKFold(10, shuffle=True, random_state=1111).split(x, y)
            means.append(round(100 * np.mean([fit(x[a], y[a], power).score(x[b], y[b]) for a, b in folds]), 2))
        return fit(x, y, powers[int(np.argmax(means))])

    data = [features(rows) for rows in rows_of(task, folder)]
    x, y = data[0]
    if task in FILES:
        outer = StratifiedKFold(10, shuffle=True, random_state=1111).split(x, y)
        return {
            task: round(np.mean([accuracy(best_by_folds(x[a], y[a], range(-2, 4)), x[b], y[b]) for a, b in outer]), 2)
        }
    if task == "SST2":
        models = [fit(x, y, power) for power in range(-2, 4)]
        return {task: accuracy(models[int(np.argmax([accuracy(model, *data[1]) for model in models]))], *data[2])}
    model = best_by_folds(x, y, range(-1, 6))
    f1 = {"MRPC_F1": round(100 * f1_score(data[1][1], model.predict(data[1][0])), 2)} if task == "MRPC" else {}
    return {task: accuracy(model, *data[1])} | f1


@pytest.mark.parametrize("task", ["CR", "SST2", "TREC", "MRPC"])
def test_scores_are_those_of_plain_scikit_learn_loops(folder: Path, task: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        expected = naive_scores(task, folder, Vectors())
    assert evaluate_transfer(Vectors(), folder, [task]) == expected
    assert 40 < expected[task] < 99


def test_all_seven_their_average_and_chance(folder: Path) -> None:
    scores = evaluate_transfer(Vectors(np.float32), folder, num_processes=2)
    assert list(scores) == [*TRANSFER_TASKS, "MRPC_F1", "avg"]
    assert scores["avg"] == pytest.approx(np.mean([scores[task] for task in TRANSFER_TASKS]))
    assert scores["SUBJ"] == 100 and 30 < scores["MR"] < 70
    assert all(type(score) is float for score in scores.values())


def test_the_number_of_processes_changes_nothing(folder: Path) -> None:
    tasks = ["TREC", "MRPC", "TREC"]
    one, three = (evaluate_transfer(Vectors(np.float32), folder, tasks, num_processes=n) for n in (1, 3))
    assert one == three and list(one) == ["TREC", "MRPC", "MRPC_F1"]


def test_sentences_of_a_task_are_encoded_once_as_tokens_joined_by_blanks(folder: Path) -> None:
    positive, negative = (folder / file for file in FILES["CR"])
    positive.write_bytes("caf\u00e9  na\u00efve\t!\r\n".encode("latin-1") + positive.read_bytes())
    negative.write_bytes(b"\n" + negative.read_bytes() * 2 + b" \n")
    encode, told = Vectors(), list[str]()
    evaluate_transfer(encode, str(folder), ["CR"], progress=told.append)
    rows = rows_of("CR", folder)[0]
    assert len(rows) == 70 + 1 + 2 * 50 + 2
    (texts,) = encode.calls
    assert len(texts) == len(set(texts)) and set(texts) == {" ".join(row[0][0]) or "." for row in rows}
    assert "café naïve !" in texts and "." in texts and "" not in texts
    assert len(told) == 3 and all(line.startswith("CR") for line in told)


def test_rows_are_in_sentevals_order(folder: Path) -> None:
    (folder / FILES["CR"][0]).write_bytes(b"\n" + (folder / FILES["CR"][0]).read_bytes())
    for task in TRANSFER_TASKS:
        splits = transfer._read_task(task, folder)
        ours = [[(row.sentences, row.label) for row in rows] for rows in splits.values()]
        expected = [[(tuple(map(" ".join, sides)), label) for sides, label in rows] for rows in rows_of(task, folder)]
        assert ours == expected, task


def test_the_length_of_the_vectors_matters_as_in_senteval(folder: Path) -> None:
    encode = Vectors()
    small = evaluate_transfer(lambda texts: encode(texts) / 1000, folder, ["MPQA"])
    assert small != evaluate_transfer(encode, folder, ["MPQA"])


def test_another_number_of_rows_than_published_is_told(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        evaluate_transfer(Vectors(), folder, ["SST2"])
    assert "SST2 dev has 60 rows where the published set has 872" in caplog.text


@pytest.mark.parametrize("classes", [2, 5])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("strength", [0.25, 32.0])
def test_a_batch_of_problems_has_scikit_learns_optima(classes: int, dtype: type, strength: float) -> None:
    rng = np.random.default_rng(classes)
    x_ND = (rng.normal(size=(300, 20)) * np.geomspace(3, 0.01, 20) + 2).astype(dtype)
    y_N = ((x_ND - 2) @ rng.normal(size=(20, classes)) + 2 * rng.gumbel(size=(300, classes))).argmax(axis=1)
    assert len(set(y_N)) == classes
    used_NP = (rng.random((300, 4)) < [1, 0.9, 0.8, 0.5]).astype(dtype)
    z_ND, spread_D = principal_axes(x_ND)
    w_DPM = logistic_regressions(z_ND, y_N, used_NP, spread_D, strength=strength)
    for problem, used_N in enumerate(used_NP.T > 0):
        model = LogisticRegression(C=strength, solver="newton-cholesky", tol=1e-10)
        model.fit(x_ND[used_N].astype(np.float64), y_N[used_N])
        logits = (z_ND @ w_DPM[:, problem]).astype(np.float64)
        p = softmax(np.hstack([0 * logits, logits]) if classes == 2 else logits, axis=1)
        assert np.abs(p - model.predict_proba(x_ND.astype(np.float64))).max() < 1e-4


def edit(path: Path, line: int, text: str) -> None:
    lines = path.read_text(encoding="latin-1").split("\n")
    lines[line - 1] = text
    path.write_text("\n".join(lines), encoding="latin-1")


SST, TREC, MRPC = "SST/binary/sentiment-dev", "TREC/train_5500.label", "MRPC/msr_paraphrase_test.txt"


@pytest.mark.parametrize(
    ("file", "line", "text", "message"),
    [
        (SST, 3, "good film", r"sentiment-dev:3: has 1 tab-separated column where 2 are needed.*truncated"),
        (SST, 3, "good film\t", r"sentiment-dev:3: the label '' is not one of 0, 1"),
        (SST, 3, "good film\t2", r"sentiment-dev:3: the label '2'"),
        (SST, 3, " \t1", r"sentiment-dev:3: has an empty sentence"),
        (TREC, 5, "WHAT:fine is it ?", r"train_5500\.label:5: the label 'WHAT' is not one of ABBR, DESC"),
        (TREC, 5, "what is it ?", r"train_5500\.label:5: the label 'what is it \?'"),
        (TREC, 5, "NUM:dist", r"train_5500\.label:5: has an empty sentence"),
        (TREC, 5, "", r"train_5500\.label:5: the label ''"),
        (MRPC, 1, "1\t2\t3\ta\tb", r"msr_paraphrase_test\.txt:1: does not start with its header line"),
        (MRPC, 4, "1\t2\t3\tcut of", r"msr_paraphrase_test\.txt:4: has 4 tab-separated columns where 5"),
        (MRPC, 4, "yes\t2\t3\ta\tb", r"msr_paraphrase_test\.txt:4: the label 'yes'"),
        (MRPC, 4, "1\t2\t3\ta\t ", r"msr_paraphrase_test\.txt:4: has an empty sentence"),
    ],
)
def test_broken_rows(folder: Path, file: str, line: int, text: str, message: str) -> None:
    edit(folder / file, line, text)
    encode = Vectors()
    with pytest.raises(DataError, match=message):
        evaluate_transfer(encode, folder)
    assert not encode.calls, "nothing is encoded before every file has been read"


@pytest.mark.parametrize("file", [*FILES["MPQA"], SST, TREC, MRPC])
def test_missing_and_empty_files(folder: Path, file: str) -> None:
    path = folder / file
    path.write_bytes(b"\n\n")
    with pytest.raises(DataError, match=rf"{path.name}: is empty"):
        evaluate_transfer(Vectors(), folder)
    path.unlink()
    with pytest.raises(DataError, match=rf"{path.name}: no such file"):
        evaluate_transfer(Vectors(), folder)


def test_foreign_encodings_and_missing_folders(folder: Path) -> None:
    (folder / SST).write_bytes(b"a\t1\n\xff\xfe\t0\n")
    with pytest.raises(DataError, match=r"sentiment-dev:2: is not UTF-8"):
        evaluate_transfer(Vectors(), folder, ["SST2"])
    with pytest.raises(DataError, match=r"MR: the folder of MR is missing.*evaluation\.senteval_path"):
        evaluate_transfer(Vectors(), folder / "nowhere")


def test_files_cut_too_short_for_the_folds(folder: Path) -> None:
    path = folder / FILES["MR"][1]
    path.write_text("".join(f"0 {i}\n" for i in range(11)))
    with pytest.raises(DataError, match=r"MR: has 11 training rows of label 0 where at least 12 are needed"):
        evaluate_transfer(Vectors(), folder, ["MR"])
    write(folder / TREC, [f"{QUESTIONS[i % 5]}:fine {i}" for i in range(100)])
    with pytest.raises(DataError, match=r"TREC: has 0 training rows of label NUM"):
        evaluate_transfer(Vectors(), folder, ["TREC"])
    (folder / MRPC).write_text("Quality\t#1 ID\t#2 ID\t#1 String\t#2 String\n")
    with pytest.raises(DataError, match=r"msr_paraphrase_test\.txt: holds no row"):
        evaluate_transfer(Vectors(), folder, ["MRPC"])


def test_unknown_names(folder: Path) -> None:
    with pytest.raises(DataError, match=r"unknown transfer task 'SST5'\. Choose from MR, CR"):
        evaluate_transfer(Vectors(), folder, ["SST5"])
    with pytest.raises(DataError, match="no transfer task is chosen"):
        evaluate_transfer(Vectors(), folder, [])


def test_broken_and_constant_encoders(folder: Path) -> None:
    with pytest.raises(DataError, match="NaN or infinity"):
        evaluate_transfer(lambda texts: np.full((len(texts), 4), np.nan), folder, ["CR"])
    with pytest.raises(DataError, match=r"shape \[1, 4\]"):
        evaluate_transfer(lambda texts: np.ones((1, 4)), folder, ["CR"])
    majority = evaluate_transfer(lambda texts: np.ones((len(texts), 4)), folder, ["CR"])
    assert majority["CR"] == pytest.approx(100 * 70 / 120, abs=0.01)


@pytest.mark.skipif("HNCSE_DATA" not in os.environ, reason="HNCSE_DATA is not set")
def test_real_row_counts(caplog: pytest.LogCaptureFixture) -> None:
    senteval = Path(os.environ["HNCSE_DATA"]) / "senteval"
    rows = {task: [len(split) for split in transfer._read_task(task, senteval).values()] for task in TRANSFER_TASKS}
    assert rows == {
        "MR": [5331 + 5331], "CR": [2407 + 1368], "SUBJ": [5000 + 5000], "MPQA": [3312 + 7294],
        "SST2": [67349, 872, 1821], "TREC": [5452, 500], "MRPC": [4076, 1725],
    }  # fmt: skip
    blank = [
        sum(row.lengths == (0,) for row in transfer._read_task(task, senteval)["train"]) for task in ("CR", "MPQA")
    ]
    assert blank == [4, 3]
    assert not caplog.records
