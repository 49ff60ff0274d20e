"""Ranks against a naive reference and trec_eval, ties, several right answers, and the four file formats of pairs."""

import csv
import gzip
import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import pytrec_eval

from hncse_ray.config import COLLECTION_METRICS, RETRIEVAL_METRICS
from hncse_ray.errors import DataError
from hncse_ray.evaluation import METRICS, RetrievalSet, evaluate_retrieval, paired_set, read_pairs


def table_encoder(table: dict[str, list[float]]):
    return lambda texts: np.array([table[text] for text in texts])


def random_encoder(dim: int = 6, levels: int | None = None):
    """A vector a text, drawn once; few ``levels`` make exact ties of the cosine likely."""
    rng, seen = np.random.default_rng(0), {}

    def encode(texts):
        for text in texts:
            draw = rng.normal(size=dim) if levels is None else rng.integers(0, levels, size=dim) + 0.0
            seen.setdefault(text, draw + (0 if draw.any() else 1))
        return np.array([seen[text] for text in texts])

    return encode


def naive(encode, data: RetrievalSet):
    """The metrics by their definitions; of equal scores the worse candidate comes first."""

    def cosine(a, b):
        x, y = encode([a])[0], encode([b])[0]
        return round(float(x @ y / np.linalg.norm(x) / np.linalg.norm(y)), 9)

    def dcg(gains):
        return sum(gain / np.log2(rank + 1) for rank, gain in enumerate(gains[:10], start=1))

    earned = {name: [] for name in ("recall@1", "recall@10", "recall@100", "mrr", "mrr@10", "ndcg@10")}
    for query, grades in zip(data.queries, data.grades, strict=True):
        order = sorted(
            range(len(data.candidates)), key=lambda i: (-cosine(query, data.candidates[i]), grades.get(i, 0))
        )
        gains = [grades.get(i, 0) for i in order]
        found = [rank for rank, gain in enumerate(gains, start=1) if gain]
        for k in (1, 10):
            earned[f"recall@{k}"].append(sum(rank <= k for rank in found) / min(k, len(found)))
        earned["recall@100"].append(sum(rank <= 100 for rank in found) / len(found))
        earned["mrr"].append(1 / found[0])
        earned["mrr@10"].append(1 / found[0] if found[0] <= 10 else 0)
        earned["ndcg@10"].append(dcg(gains) / dcg(sorted(gains, reverse=True)))
    return {name: np.mean(values) for name, values in earned.items()}


def judged(candidates: int = 150, queries: int = 20, seed: int = 0, most: int = 3) -> RetrievalSet:
    """Queries with 1 to 30 right candidates of grades 1 to ``most``, all metrics asked for."""
    rng = np.random.default_rng(seed)
    grades = []
    for _ in range(queries):
        right = rng.choice(candidates, rng.integers(1, 30), replace=False)
        grades.append({int(i): int(rng.integers(1, most + 1)) for i in right})
    texts = tuple(f"d{i}" for i in range(candidates))
    return RetrievalSet(tuple(f"q{i}" for i in range(queries)), texts, tuple(grades), tuple(METRICS))


@pytest.mark.parametrize("levels", [None, 3])
@pytest.mark.parametrize("max_scores", [1, 1000, 2**24])
def test_naive_reference(levels: int | None, max_scores: int) -> None:
    data, encode = judged(), random_encoder(levels=levels)
    assert evaluate_retrieval(encode, data, max_scores=max_scores) == pytest.approx(naive(encode, data))


def test_naive_reference_of_pairs() -> None:
    queries = [f"q{i % 50}" for i in range(60)]  # some queries come twice, with other answers
    answers = [f"a{i * 7 % 40}" for i in range(60)]  # many answers are shared
    data, encode = paired_set(queries, answers), random_encoder()
    assert len(data.queries) == 50 and len(data.candidates) == 40
    expected = naive(encode, data)
    scores = evaluate_retrieval(encode, data)
    assert list(scores) == ["recall@1", "recall@10", "mrr", "ndcg@10"]
    assert scores == pytest.approx({name: expected[name] for name in scores})


def test_trec_eval_finds_the_same() -> None:
    data, encode = judged(candidates=400, queries=40), random_encoder(dim=4)
    z = {text: row / np.linalg.norm(row) for text, row in ((t, encode([t])[0]) for t in data.queries + data.candidates)}
    run = {q: {d: float(z[q] @ z[d]) for d in data.candidates} for q in data.queries}
    of_query = zip(data.queries, data.grades, strict=True)
    qrels = {q: {data.candidates[i]: grade for i, grade in grades.items()} for q, grades in of_query}
    found = pytrec_eval.RelevanceEvaluator(qrels, {"ndcg_cut_10", "recall_100", "recip_rank"}).evaluate(run)
    top = {q: dict(sorted(scores.items(), key=lambda item: -item[1])[:10]) for q, scores in run.items()}
    found_of_ten = pytrec_eval.RelevanceEvaluator(qrels, {"recip_rank"}).evaluate(top)
    theirs = {
        "ndcg@10": np.mean([query["ndcg_cut_10"] for query in found.values()]),
        "recall@100": np.mean([query["recall_100"] for query in found.values()]),
        "mrr": np.mean([query["recip_rank"] for query in found.values()]),
        "mrr@10": np.mean([query["recip_rank"] for query in found_of_ten.values()]),
    }
    ours = evaluate_retrieval(encode, data)
    assert {name: ours[name] for name in theirs} == pytest.approx(theirs, abs=1e-6)
    assert 0.01 < ours["mrr@10"] < ours["mrr"] < 1


def test_perfect_and_hopeless() -> None:
    queries, answers = [f"q{i}" for i in range(20)], [f"a{i}" for i in range(20)]
    rows = {name: np.eye(20)[int(name[1:])] for name in queries + answers}
    data = paired_set(queries, answers)
    assert set(evaluate_retrieval(table_encoder(rows), data).values()) == {1.0}
    opposite = rows | {name: -rows[name] for name in queries}
    hopeless = evaluate_retrieval(table_encoder(opposite), data)
    assert hopeless == pytest.approx({"recall@1": 0, "recall@10": 0, "mrr": 1 / 20, "ndcg@10": 0})


def test_a_query_with_three_right_answers_is_one_query_that_a_perfect_encoder_answers() -> None:
    queries, answers = ["q0", "q0", "q1", "q0"], ["a", "b", "c", "d"]
    rows = {"q0": [1.0, 0], "a": [1.0, 0.1], "b": [1.0, 0.2], "d": [1.0, 0.3], "q1": [0.0, 1], "c": [0.0, 1]}
    assert set(evaluate_retrieval(table_encoder(rows), paired_set(queries, answers)).values()) == {1.0}
    # One of the three is missed: first right answer at rank 1, two of three among the first three.
    missed = rows | {"d": [-1.0, 0]}
    scores = evaluate_retrieval(table_encoder(missed), paired_set(queries, answers))
    assert scores["recall@1"] == scores["recall@10"] == scores["mrr"] == 1.0
    assert scores["ndcg@10"] == pytest.approx(
        (1 + (1 + 1 / np.log2(3) + 1 / np.log2(5)) / (1 + 1 / np.log2(3) + 1 / 2)) / 2
    )


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_a_constant_encoder_ranks_every_answer_last(dtype: type) -> None:
    constant = np.random.default_rng(3).normal(size=384).astype(dtype)
    data = paired_set([f"q{i}" for i in range(33)], [f"a{i}" for i in range(33)])
    scores = evaluate_retrieval(lambda texts: np.tile(constant, (len(texts), 1)), data)
    assert scores == pytest.approx({"recall@1": 0, "recall@10": 0, "mrr": 1 / 33, "ndcg@10": 0})


def test_an_equal_other_counts_before_the_right_answer() -> None:
    table = {"q": [1.0, 0], "right": [1.0, 0], "same": [2.0, 0], "wrong": [0.0, 1], "q2": [0.0, 1]}
    scores = evaluate_retrieval(table_encoder(table), paired_set(["q", "q2"], ["right", "same"]))
    # q: `right` ties with `same`, rank 2. q2: `same` ties with `right` for rank 2.
    assert scores["mrr"] == pytest.approx(1 / 2)


def test_a_better_candidate_that_ties_with_a_worse_one_comes_after_it() -> None:
    table = {"q": [1.0, 0], "grade 3": [1.0, 0], "grade 1": [2.0, 0], "nothing": [0.0, 1]}
    data = RetrievalSet(("q",), ("grade 3", "grade 1", "nothing"), ({0: 3, 1: 1},))
    worst_first = (1 + 3 / np.log2(3)) / (3 + 1 / np.log2(3))
    assert evaluate_retrieval(table_encoder(table), data)["ndcg@10"] == pytest.approx(worst_first)


def test_a_shared_answer_is_one_candidate_and_texts_are_encoded_once() -> None:
    calls = []
    table = {"q1": [1.0, 0.1], "q2": [1.0, -0.1], "shared": [1.0, 0.0], "other": [0.0, 1.0], "q3": [0.1, 1.0]}

    def encode(texts):
        calls.append(texts)
        return np.array([table[text] for text in texts])

    data = paired_set(["q1", "q2", "q3", "q1"], ["shared", "shared", "other", "shared"])
    assert evaluate_retrieval(encode, data)["recall@1"] == 1.0
    assert [sorted(texts) for texts in calls] == [["other", "shared"], ["q1", "q2", "q3"]]


@pytest.mark.parametrize("sides", [True, False])
def test_queries_and_documents_get_the_prompts_of_their_sides(sides: bool) -> None:
    class Prompted:
        """Tells queries from documents; for the side of neither it is blind."""

        def __init__(self, side: str | None = None) -> None:
            self.side = side

        def on_side(self, side: str) -> "Prompted":
            return Prompted(side)

        def __call__(self, texts: list[str]) -> np.ndarray:
            place = {"query": 1, "document": 3, None: 0}[self.side]
            return np.array([np.eye(10)[int(text[place])] for text in texts])

    data = paired_set(["01__", "02__", "03__"], ["0__1", "0__2", "0__3"], sides=sides)
    assert evaluate_retrieval(Prompted(), data)["recall@1"] == (1.0 if sides else 0.0)


def test_the_length_of_a_vector_does_not_matter() -> None:
    data, encode = judged(), random_encoder()

    def stretched(texts):
        return encode(texts) * np.array([[float(1 + sum(map(ord, text)) % 7)] for text in texts])

    assert evaluate_retrieval(stretched, data) == pytest.approx(evaluate_retrieval(encode, data))


def test_every_metric_of_the_settings_is_known() -> None:
    assert {*RETRIEVAL_METRICS, *COLLECTION_METRICS} == {*METRICS}


@pytest.mark.parametrize(
    ("queries", "answers", "message"),
    [
        (["q"], ["a", "b"], "1 queries for 2 answers"),
        ([], [], "two distinct candidates"),
        (["q", "r"], ["a", "a"], "two distinct candidates at least, and there are 1"),
    ],
)
def test_nothing_to_rank(queries: list[str], answers: list[str], message: str) -> None:
    with pytest.raises(DataError, match=message):
        evaluate_retrieval(random_encoder(), paired_set(queries, answers))


def test_a_broken_encoder() -> None:
    with pytest.raises(DataError, match="NaN"):
        evaluate_retrieval(lambda texts: np.full((len(texts), 2), np.nan), paired_set(["q", "r"], ["a", "b"]))


PAIRS = (["où est-ce ?", "a, b"], ["là", 'say "yes"\nor no'])


def write(path: Path, queries: list[str], answers: list[str]) -> Path:
    rows = list(zip(queries, answers, strict=True))
    match path.suffix:
        case ".csv":
            with path.open("w", encoding="utf-8", newline="") as file:
                csv.writer(file).writerows([("id", "answer", "query"), *((7, a, q) for q, a in rows)])
        case ".jsonl":
            objects = [json.dumps({"id": 7, "answer": a, "query": q}) for q, a in rows]
            path.write_text("\n".join(objects) + "\n\n", encoding="utf-8")
        case ".parquet":
            pq.write_table(pa.table({"answer": answers, "id": [7] * len(rows), "query": queries}), path)
        case _:
            path.write_bytes("".join(f"{q}\t {a}\r\n" for q, a in rows).encode("utf-8-sig"))
    return path


@pytest.mark.parametrize("suffix", [".csv", ".jsonl", ".parquet", ".tsv", ".txt"])
def test_formats(tmp_path: Path, suffix: str) -> None:
    queries, answers = PAIRS
    if suffix in (".tsv", ".txt"):  # no quoting there: a line is a pair
        answers = [answer.replace("\n", " ") for answer in answers]
    assert read_pairs(write(tmp_path / f"pairs{suffix}", queries, answers)) == (queries, answers)
    assert read_pairs(str(tmp_path / f"pairs{suffix}")) == (queries, answers)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.tsv", "q\ta\nq\n", r"a\.tsv:2: has 1 column where 2 are needed"),
        ("a.tsv", "q\ta\n\nq\ta\tb\n", r"a\.tsv:3: has 3 columns where 2 are needed"),
        ("a.tsv", "q\t \n", r"a\.tsv:1: the answer is empty"),
        ("a.tsv", "q\t\u200b\n", r"a\.tsv:1: the answer is empty"),
        ("a.tsv", "\n", "holds no pairs"),
        ("a.tsv", b"q\ta\n\xe9\ta\n", r"a\.tsv:2: the query is not UTF-8"),
        ("a.csv", "query,text\nq,a\n", "has no column 'answer'. It has: query, text"),
        ("a.csv", "\n", "has no column 'query'. It has: none"),
        ("a.csv", "query,answer\nq,a\nq\n", r"a\.csv:3: has 1 column where 2 are needed"),
        ("a.csv", 'query,answer\nq,"never closed\n', r"a\.csv:2: a quote that is opened here is not closed"),
        ("a.jsonl", '{"query": "q", "answer": "a"}\n{"query"', r"a\.jsonl:2: is not valid JSON"),
        ("a.jsonl", "[1, 2]", r"a\.jsonl:1: is not a JSON object"),
        ("a.jsonl", '{"query": "q"}', r"a\.jsonl:1: the answer is missing"),
        ("a.jsonl", '{"query": 5, "answer": "a"}', r"a\.jsonl:1: the query is not text"),
        ("a.jsonl", '{"query": "q", "answer": null}', r"a\.jsonl:1: the answer is missing"),
        ("a.parquet", "not parquet at all", "is not a readable Parquet"),
        ("a.parquet", "", "is empty"),
        ("a.xlsx", "x", r"unknown kind '\.xlsx'"),
        ("a.jsonl", '{"query": "q\\ud800", "answer": "a"}', r"a\.jsonl:1: the query is not UTF-8"),
        ("a.csv", 'query,answer\nq,"a" b\n', r"a\.csv:2: is not valid CSV"),
    ],
)
def test_broken_files(tmp_path: Path, name: str, content: str | bytes, message: str) -> None:
    path = tmp_path / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(DataError, match=message):
        read_pairs(path)


@pytest.mark.parametrize("suffix", [".csv", ".jsonl", ".parquet", ".tsv"])
def test_missing_files_and_folders(tmp_path: Path, suffix: str) -> None:
    with pytest.raises(DataError, match="no such file"):
        read_pairs(tmp_path / f"missing{suffix}")
    (tmp_path / f"folder{suffix}").mkdir()
    with pytest.raises(DataError, match="is a directory"):
        read_pairs(tmp_path / f"folder{suffix}")


def test_parquet_columns_and_values(tmp_path: Path) -> None:
    pq.write_table(pa.table({"query": ["q"], "text": ["a"]}), tmp_path / "a.parquet")
    with pytest.raises(DataError, match="has no column 'answer'"):
        read_pairs(tmp_path / "a.parquet")
    pq.write_table(pa.table({"query": ["q", "r"], "answer": ["a", None]}), tmp_path / "b.parquet")
    with pytest.raises(DataError, match=r"b\.parquet:2: the answer is missing"):
        read_pairs(tmp_path / "b.parquet")
    pq.write_table(pa.table({"query": ["q"], "answer": [5]}), tmp_path / "c.parquet")
    with pytest.raises(DataError, match="the answer is not text"):
        read_pairs(tmp_path / "c.parquet")


def test_a_tsv_may_name_its_columns_and_may_be_packed(tmp_path: Path) -> None:
    (tmp_path / "a.tsv.gz").write_bytes(gzip.compress(b'id\tanswer\tquery\n1\t"a\tq\n2\tb"\tr\n'))
    assert read_pairs(tmp_path / "a.tsv.gz") == (["q", "r"], ['"a', 'b"'])
