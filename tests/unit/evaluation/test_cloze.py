"""The label-free set: which documents are held out, what is asked of them, and what is searched."""

from __future__ import annotations

import re

import numpy as np
import pytest
from tiny import make_sentences

from hncse_ray.errors import DataError
from hncse_ray.evaluation import Gaps, cloze_set, draw_gaps, evaluate_retrieval
from hncse_ray.evaluation.retrieval import RetrievalSet

Documents = list[list[str]]  # of each document its passages


class Texts:
    """A corpus of documents whose passages are rows; the titles stand before them in what is searched."""

    def __init__(self, documents: Documents) -> None:
        rows = [(i, passage) for i, passages in enumerate(documents) for passage in passages]
        self.documents_N = np.array([i for i, _ in rows], dtype=np.int64)
        self.passages = [passage for _, passage in rows]

    def bodies(self, ids: np.ndarray) -> list[str]:
        return [self.passages[i] for i in ids]

    def texts(self, ids: np.ndarray) -> list[str]:
        return [f"On {self.documents_N[i]}. {self.passages[i]}" for i in ids]

    def gaps(self, *, count: int = 300, seed: int = 0) -> Gaps:
        order = np.random.default_rng(seed).permutation(len(self.documents_N))
        return draw_gaps(
            self.documents_N, self.bodies, split, order=order.take, count=count, seed=seed, where="corpus x"
        )

    def set(self, gaps: Gaps, *, most: int = 5000, seed: int = 0) -> RetrievalSet:
        return cloze_set(self.texts, gaps, rows=len(self.passages), most_candidates=most, seed=seed)


def split(body: str) -> list[str]:
    return re.findall(r"[^.]+\.", body)


def documents(count: int, *, passages: int = 1, seed: int = 0) -> Documents:
    """Documents of passages of three long sentences, none of which comes twice."""
    sentences = iter(s for s in make_sentences(9 * count * passages, seed=seed) if len(s) > 25)
    return [["".join(f" {next(sentences)}" for _ in range(3)).strip() for _ in range(passages)] for _ in range(count)]


def test_every_sentence_was_taken_out_of_the_one_candidate_that_is_right() -> None:
    corpus = Texts(documents(100))
    gaps = corpus.gaps()
    found = corpus.set(gaps)
    assert len(found.queries) == len(gaps.rows) == 20  # a fifth of the rows
    assert len(found.candidates) == 100 and found.sides
    for query, grades in zip(found.queries, found.grades, strict=True):
        ((right, grade),) = grades.items()
        assert grade == 1 and right in gaps.rows and query in corpus.passages[right]
        assert all(query not in candidate for candidate in found.candidates)
        rest = corpus.passages[right].replace(query, "")
        assert found.candidates[right].split() == f"On {right}. {rest}".split()
    for row in set(range(100)) - set(gaps.rows.tolist()):
        assert found.candidates[row] == f"On {row}. {corpus.passages[row]}"


def test_it_is_a_function_of_the_seed() -> None:
    corpus = Texts(documents(100))
    assert corpus.gaps().sentences == corpus.gaps().sentences
    assert corpus.set(corpus.gaps()) == corpus.set(corpus.gaps())
    assert corpus.gaps(seed=1).sentences != corpus.gaps().sentences


def test_whole_documents_are_held_out_and_each_asks_once_if_there_are_enough() -> None:
    corpus = Texts(documents(200, passages=2))
    gaps = corpus.gaps(count=12)
    of_documents = set(corpus.documents_N[gaps.rows].tolist())
    assert len(of_documents) == 12 == len(gaps.sentences)
    assert gaps.rows.tolist() == [i for i, d in enumerate(corpus.documents_N) if d in of_documents]


def test_where_few_documents_can_be_held_out_they_ask_more_often() -> None:
    corpus = Texts(documents(12, passages=20))
    gaps = corpus.gaps(count=30)
    assert len(gaps.rows) == 40 and len(gaps.sentences) == 30  # two of 12 documents are a sixth, three too much
    per_document = np.unique(corpus.documents_N[list(gaps.sentences)], return_counts=True)[1]
    assert per_document.tolist() == [15, 15]


def test_of_a_large_corpus_a_sample_is_searched_with_all_that_is_asked_for() -> None:
    corpus = Texts(documents(200))
    found = corpus.set(corpus.gaps(), most=100)
    assert len(found.candidates) == 100 and len(found.queries) == 40
    for query, grades in zip(found.queries, found.grades, strict=True):
        number = int(found.candidates[next(iter(grades))].split()[1].rstrip("."))
        assert query in corpus.passages[number]


def test_what_other_documents_say_too_asks_nothing() -> None:
    said = documents(100)
    licence = "All rights of this text are reserved."
    corpus = Texts([[f"{licence} {passages[0]}"] for passages in said])
    gaps = corpus.gaps()
    asked = corpus.set(gaps).queries
    assert licence in gaps.sentences.values() and licence not in asked
    assert len(asked) == sum(sentence != licence for sentence in gaps.sentences.values())


def test_what_is_searched_otherwise_written_asks_nothing() -> None:
    corpus = Texts(documents(100))
    gaps = corpus.gaps()
    odd = sorted(gaps.sentences)[:3]
    plain = corpus.texts
    corpus.texts = lambda ids: [  # type: ignore[method-assign]
        text.upper() if i in odd else text for i, text in zip(ids, plain(ids), strict=True)
    ]
    assert set(corpus.set(gaps).queries) == {s for row, s in gaps.sentences.items() if row not in odd}


def test_a_title_of_the_same_words_stays() -> None:
    corpus = Texts(documents(60))
    row, sentence = next((i, s) for i, s in corpus.gaps().sentences.items() if corpus.passages[i].startswith(s))
    corpus.texts = lambda ids: [  # type: ignore[method-assign]
        f"{sentence} {corpus.passages[i]}" if i == row else corpus.passages[i] for i in ids
    ]
    found = corpus.set(corpus.gaps())
    assert found.candidates[row].startswith(sentence) and found.candidates[row].count(sentence) == 1
    assert sentence not in found.queries  # its document would give it away


@pytest.mark.parametrize(
    "passage", ["One sentence alone stands here.", "Yes. No. Or so it was said to him long ago.", "Title"]
)
def test_where_nothing_can_be_asked_the_suite_is_refused(passage: str) -> None:
    with pytest.raises(DataError, match=r"corpus x: only 0 sentences .* without labels needs 10.*evaluation\.suites"):
        Texts([[passage]] * 80).gaps()
    some = documents(30)  # six of 30 are a fifth
    with pytest.raises(DataError, match="only 6 sentences"):
        Texts(some).gaps()
    assert len(Texts(some + [[passage]] * 30).gaps().sentences) == 12


def test_an_encoder_that_knows_words_finds_more_than_one_that_does_not() -> None:
    corpus = Texts([[passage.replace(".", f" of word{i}.") for passage in p] for i, p in enumerate(documents(150))])
    corpus.texts = corpus.bodies  # type: ignore[method-assign]
    data = corpus.set(corpus.gaps())
    words = [f"word{i}" for i in range(150)]

    def counts(texts: list[str]) -> np.ndarray:
        found = [text.lower().replace(".", "").split() for text in texts]
        return np.array([[text.count(word) for word in words] for text in found], dtype=np.float32)

    def noise(texts: list[str]) -> np.ndarray:
        return np.random.default_rng(0).normal(size=(len(texts), 16)).astype(np.float32)

    knows, guesses = evaluate_retrieval(counts, data), evaluate_retrieval(noise, data)
    assert set(knows) == {"recall@1", "recall@10", "mrr", "ndcg@10"}
    assert knows["mrr"] == 1 and guesses["mrr"] < 0.2
