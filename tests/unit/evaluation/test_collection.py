"""Search collections: what is read of the three files, and what is said of damaged ones."""

import json
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from tiny import make_collection

from hncse_ray.errors import DataError
from hncse_ray.evaluation import evaluate_retrieval, read_collection


def write(folder: Path, corpus: list[dict], queries: list[dict], **qrels: str) -> Path:
    (folder / "qrels").mkdir(parents=True, exist_ok=True)
    for name, rows in (("corpus", corpus), ("queries", queries)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    for split, text in qrels.items():
        (folder / "qrels" / f"{split}.tsv").write_text("query-id\tcorpus-id\tscore\n" + text, encoding="utf-8")
    return folder


CORPUS = [
    {"_id": "d1", "title": "Cats", "text": "They sleep."},
    {"_id": "d2", "title": "", "text": "No title"},
    {"_id": "d3", "title": "A title only", "text": ""},
    {"_id": "d5", "title": "A full stop .", "text": "and a text"},
    {"_id": "d4", "text": "The column title is missing", "metadata": {"url": "x"}},
]
QUERIES = [{"_id": "q1", "text": "who sleeps"}, {"_id": "q2", "text": "what lacks"}, {"_id": "q3", "text": "nothing"}]


def test_what_is_searched(tmp_path: Path) -> None:
    dev = "q2\td3\t1\nq2\td2\t2\nq2\td3\t1\nq3\td1\t0\nq2\td1\t-1\n"
    found = read_collection(write(tmp_path, CORPUS, QUERIES, dev=dev, test="q1\td1\t3\n"), ("dev", "test"))
    assert list(found) == ["dev", "test"]
    texts = ("Cats. They sleep.", "No title", "A title only", "A full stop . and a text", "The column title is missing")
    assert found["dev"].candidates == found["test"].candidates == texts
    assert (found["dev"].queries, found["dev"].grades) == (("what lacks",), ({2: 1, 1: 2},))
    assert (found["test"].queries, found["test"].grades) == (("who sleeps",), ({0: 3},))
    assert found["dev"].metrics == ("ndcg@10", "mrr@10", "recall@100")


def test_queries_without_a_relevant_document_are_left_out_and_told(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    write(tmp_path, CORPUS, QUERIES, test="q1\td1\t1\nq2\td1\t0\nq3\td2\t0\n")
    assert read_collection(tmp_path, ("test",))["test"].queries == ("who sleeps",)
    assert "no relevant document for 2 of 3 queries" in caplog.text


def test_a_split_without_judgements_is_left_out(tmp_path: Path) -> None:
    assert list(read_collection(write(tmp_path, CORPUS, QUERIES, test="q1\td1\t1\n"), ("dev", "test"))) == ["test"]


def lines(name: str, change: Callable[[list[str]], list[str]]) -> Callable[[Path], object]:
    def damage(folder: Path) -> None:
        path = folder / name
        path.write_text("".join(change(path.read_text().splitlines(keepends=True))))

    return damage


DAMAGED: dict[str, tuple[Callable[[Path], object], str]] = {
    "no corpus": (lambda f: (f / "corpus.jsonl").unlink(), r"corpus\.jsonl: no such file"),
    "no queries": (lambda f: (f / "queries.jsonl").unlink(), r"queries\.jsonl: no such file"),
    "no qrels": (lambda f: (f / "qrels/test.tsv").unlink(), r"qrels: has no test\.tsv.*corpus\.jsonl, queries\.jsonl"),
    "empty corpus": (lines("corpus.jsonl", lambda rows: []), r"corpus\.jsonl: is empty"),
    "empty queries": (lines("queries.jsonl", lambda rows: []), r"queries\.jsonl: is empty"),
    "empty qrels": (lines("qrels/test.tsv", lambda rows: []), r"test\.tsv: is empty"),
    "qrels of a header alone": (lines("qrels/test.tsv", lambda rows: rows[:1]), "judges no document as relevant"),
    "qrels without a header": (lines("qrels/test.tsv", lambda rows: rows[1:]), r"test\.tsv: has no column 'query-id'"),
    "an unknown query": (lines("qrels/test.tsv", lambda r: [*r, "q9\td1\t1\n"]), r"test\.tsv:4: judges 'q9', which is"),
    "an unknown document": (
        lines("qrels/test.tsv", lambda r: [*r, "q1\td9\t1\n"]),
        r"test\.tsv:4: judges 'd9', which is not in corpus",
    ),
    "a score in words": (lines("qrels/test.tsv", lambda r: [*r, "q1\td2\tyes\n"]), r"tsv:4: the score 'yes' is not"),
    "a score out of range": (
        lines("qrels/test.tsv", lambda r: [*r, f"q1\td2\t{'9' * 40}\n"]),
        r"tsv:4: the score '9+' is not",
    ),
    "two columns": (lines("qrels/test.tsv", lambda r: [*r, "q1\td2\n"]), r"tsv:4: has 2 columns where 3 are needed"),
    "two judgements": (lines("qrels/test.tsv", lambda r: [*r, "q1\td1\t2\n"]), r"tsv:4: judges document 'd1' a second"),
    "an id twice": (lines("corpus.jsonl", lambda r: [*r, r[0]]), r"corpus\.jsonl:6: the _id 'd1' comes twice"),
    "a query without text": (
        lines("queries.jsonl", lambda r: [*r, '{"_id": "q4", "text": " "}\n']),
        r"queries\.jsonl:4: the text is empty",
    ),
    "documents without ids": (
        lines("corpus.jsonl", lambda r: [row.replace("_id", "id") for row in r]),
        r"corpus\.jsonl:1: the _id is missing",
    ),
    "documents without text": (
        lines("corpus.jsonl", lambda r: [row.replace("text", "txt").replace("title", "ttl") for row in r]),
        r"corpus\.jsonl: no document has a title or a text",
    ),
}


@pytest.mark.parametrize("case", DAMAGED)
def test_a_damaged_collection_names_the_file(tmp_path: Path, case: str) -> None:
    damage, said = DAMAGED[case]
    damage(write(tmp_path, CORPUS, QUERIES, test="q1\td1\t1\nq2\td2\t1\n"))
    with pytest.raises(DataError, match=said):
        read_collection(tmp_path, ("test",))


def test_a_folder_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"none: no such folder.*corpus\.jsonl"):
        read_collection(tmp_path / "none", ("dev", "test"))


def test_a_collection_of_one_document_cannot_be_searched(tmp_path: Path) -> None:
    data = read_collection(write(tmp_path, CORPUS[:1], QUERIES, test="q1\td1\t1\n"), ("test",))["test"]
    with pytest.raises(DataError, match="two distinct candidates"):
        evaluate_retrieval(lambda texts: [[1.0]] * len(texts), data)  # type: ignore[arg-type,return-value]


def test_words_find_their_documents(tmp_path: Path) -> None:
    """A bag of words as encoder: far better than chance, and below what a perfect one has."""
    data = read_collection(make_collection(tmp_path / "tiny"), ("dev", "test"))["test"]
    words = {word: i for i, word in enumerate(sorted({w for text in data.candidates for w in text.split()}))}
    scores = evaluate_retrieval(lambda texts: _counts(texts, words), data)
    assert 0.5 < scores["ndcg@10"] < 1 and 0.5 < scores["mrr@10"] <= 1 and scores["recall@100"] == 1


def _counts(texts: list[str], words: dict[str, int]) -> np.ndarray:
    rows = np.zeros((len(texts), len(words)))
    for row, text in zip(rows, texts, strict=True):
        for word in text.split():
            row[words.get(word, 0)] += 1
    return rows


@pytest.mark.skipif("HNCSE_DATA" not in os.environ, reason="HNCSE_DATA is not set")
@pytest.mark.parametrize(("name", "documents", "dev", "test"), [("med", 1033, 14, 16), ("cran", 1398, 78, 147)])
def test_real_collections(name: str, documents: int, dev: int, test: int) -> None:
    found = read_collection(Path(os.environ["HNCSE_DATA"]) / "domains" / name, ("dev", "test"))
    assert [(len(s.queries), len(s.candidates)) for s in found.values()] == [(dev, documents), (test, documents)]
