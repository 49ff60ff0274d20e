"""Ranks against a naive reference, ties, shared answers, and the four file formats."""

import csv
import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from hncse_ray.errors import DataError
from hncse_ray.evaluation import evaluate_retrieval, read_pairs


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


def naive(encode, queries, answers):
    def cosine(a, b):
        x, y = encode([a])[0], encode([b])[0]
        return float(x @ y / np.linalg.norm(x) / np.linalg.norm(y))

    ranks = []
    for query, answer in zip(queries, answers, strict=True):
        own = cosine(query, answer)
        others = [cosine(query, other) for other in sorted(set(answers) - {answer})]
        ranks.append(1 + sum(score > own or abs(score - own) < 1e-9 for score in others))
    return {
        "recall@1": np.mean([rank <= 1 for rank in ranks]),
        "recall@10": np.mean([rank <= 10 for rank in ranks]),
        "mrr": np.mean([1 / rank for rank in ranks]),
        "ndcg@10": np.mean([1 / np.log2(rank + 1) if rank <= 10 else 0 for rank in ranks]),
    }


@pytest.mark.parametrize("levels", [None, 3])
@pytest.mark.parametrize("max_scores", [1, 100, 2**24])
def test_naive_reference(levels: int | None, max_scores: int) -> None:
    queries = [f"q{i % 50}" for i in range(60)]  # some queries come twice, with other answers
    answers = [f"a{i * 7 % 40}" for i in range(60)]  # many answers are shared
    encode = random_encoder(levels=levels)
    measured = evaluate_retrieval(encode, queries, answers, max_scores=max_scores)
    assert measured == pytest.approx(naive(encode, queries, answers))


def test_perfect_and_hopeless() -> None:
    queries, answers = [f"q{i}" for i in range(20)], [f"a{i}" for i in range(20)]
    rows = {name: np.eye(20)[int(name[1:])] for name in queries + answers}
    assert set(evaluate_retrieval(table_encoder(rows), queries, answers).values()) == {1.0}
    opposite = rows | {name: -rows[name] for name in queries}
    hopeless = evaluate_retrieval(table_encoder(opposite), queries, answers)
    assert hopeless == pytest.approx({"recall@1": 0, "recall@10": 0, "mrr": 1 / 20, "ndcg@10": 0})


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_a_constant_encoder_ranks_every_answer_last(dtype: type) -> None:
    constant = np.random.default_rng(3).normal(size=384).astype(dtype)
    queries, answers = [f"q{i}" for i in range(33)], [f"a{i}" for i in range(33)]
    scores = evaluate_retrieval(lambda texts: np.tile(constant, (len(texts), 1)), queries, answers)
    assert scores == pytest.approx({"recall@1": 0, "recall@10": 0, "mrr": 1 / 33, "ndcg@10": 0})


def test_an_equal_other_counts_before_the_right_answer() -> None:
    table = {"q": [1.0, 0], "right": [1.0, 0], "same": [2.0, 0], "wrong": [0.0, 1], "q2": [0.0, 1]}
    scores = evaluate_retrieval(table_encoder(table), ["q", "q2", "q2"], ["right", "wrong", "same"])
    # q: `right` ties with `same`, rank 2. q2: `wrong` is first, and `same` ties with `right` for rank 3.
    assert scores["mrr"] == pytest.approx((1 / 2 + 1 + 1 / 3) / 3)


def test_a_shared_answer_is_one_candidate_and_texts_are_encoded_once() -> None:
    calls = []
    table = {"q1": [1.0, 0.1], "q2": [1.0, -0.1], "shared": [1.0, 0.0], "other": [0.0, 1.0], "q3": [0.1, 1.0]}

    def encode(texts):
        calls.append(texts)
        return np.array([table[text] for text in texts])

    scores = evaluate_retrieval(encode, ["q1", "q2", "q3", "q1"], ["shared", "shared", "other", "shared"])
    assert scores["recall@1"] == 1.0
    assert len(calls) == 1 and sorted(calls[0]) == sorted(table)


def test_prefix() -> None:
    scores = evaluate_retrieval(random_encoder(), ["q", "r"], ["a", "b"], prefix="pairs/")
    assert list(scores) == ["pairs/recall@1", "pairs/recall@10", "pairs/mrr", "pairs/ndcg@10"]


@pytest.mark.parametrize(
    ("queries", "answers", "message"),
    [
        (["q"], ["a", "b"], "1 queries for 2 answers"),
        ([], [], "two distinct answers"),
        (["q", "r"], ["a", "a"], "two distinct answers at least, and there are 1"),
    ],
)
def test_nothing_to_rank(queries: list[str], answers: list[str], message: str) -> None:
    with pytest.raises(DataError, match=message):
        evaluate_retrieval(random_encoder(), queries, answers)


def test_a_broken_encoder() -> None:
    with pytest.raises(DataError, match="NaN"):
        evaluate_retrieval(lambda texts: np.full((len(texts), 2), np.nan), ["q", "r"], ["a", "b"])


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
    if suffix in (".tsv", ".txt"):
        answers = [answer.replace("\n", " ") for answer in answers]
    assert read_pairs(write(tmp_path / f"pairs{suffix}", queries, answers)) == (queries, answers)
    assert read_pairs(str(tmp_path / f"pairs{suffix}")) == (queries, answers)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.tsv", "q\ta\nq\n", r"a\.tsv:2: has 1 tab-separated columns"),
        ("a.tsv", "q\ta\n\nq\ta\tb\n", r"a\.tsv:3: has 3 tab-separated columns"),
        ("a.tsv", "q\t \n", r"a\.tsv:1: the answer is empty"),
        ("a.tsv", "", "holds no pairs"),
        ("a.tsv", b"q\ta\n\xe9\ta\n", r"a\.tsv:2: is not UTF-8"),
        ("a.csv", "query,text\nq,a\n", "has no column answer. Its columns: query, text"),
        ("a.csv", "", "has no column query and no column answer. Its columns: none"),
        ("a.csv", "query,answer\nq,a\nq\n", r"a\.csv:3: the answer is empty"),
        ("a.csv", 'query,answer\nq,"never closed\n', "is not valid CSV"),
        ("a.jsonl", '{"query": "q", "answer": "a"}\n{"query"', r"a\.jsonl:2: is not valid JSON"),
        ("a.jsonl", "[1, 2]", r"a\.jsonl:1: is not a JSON object"),
        ("a.jsonl", '{"query": "q"}', r"a\.jsonl:1: has no column answer"),
        ("a.jsonl", '{"query": 5, "answer": "a"}', r"a\.jsonl:1: the query is not text"),
        ("a.jsonl", '{"query": "q", "answer": null}', r"a\.jsonl:1: the answer is empty"),
        ("a.parquet", "not parquet at all", "is not valid Parquet"),
        ("a.parquet", "", "is not valid Parquet"),
        ("a.xlsx", "x", r"unknown kind '\.xlsx'"),
    ],
)
def test_broken_files(tmp_path: Path, name: str, content: str | bytes, message: str) -> None:
    path = tmp_path / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(DataError, match=message):
        read_pairs(path)


@pytest.mark.parametrize("suffix", [".csv", ".jsonl", ".parquet", ".tsv"])
def test_missing_files_and_folders(tmp_path: Path, suffix: str) -> None:
    with pytest.raises(DataError, match="cannot be read"):
        read_pairs(tmp_path / f"missing{suffix}")
    (tmp_path / f"folder{suffix}").mkdir()
    with pytest.raises(DataError, match="cannot be read"):
        read_pairs(tmp_path / f"folder{suffix}")


def test_parquet_columns_and_values(tmp_path: Path) -> None:
    pq.write_table(pa.table({"query": ["q"], "text": ["a"]}), tmp_path / "a.parquet")
    with pytest.raises(DataError, match="has no column answer"):
        read_pairs(tmp_path / "a.parquet")
    pq.write_table(pa.table({"query": ["q", "r"], "answer": ["a", None]}), tmp_path / "b.parquet")
    with pytest.raises(DataError, match=r"b\.parquet:2: the answer is empty"):
        read_pairs(tmp_path / "b.parquet")
    pq.write_table(pa.table({"query": ["q"], "answer": [5]}), tmp_path / "c.parquet")
    with pytest.raises(DataError, match="the answer is not text"):
        read_pairs(tmp_path / "c.parquet")
