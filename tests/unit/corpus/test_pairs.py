"""Corpora of pairs: what of a table is kept, which rows are one, and what the parts of a row are made of."""

import json

import numpy as np
import pytest

from hncse_ray.corpus import Corpus, row_hash
from hncse_ray.errors import DataError

PAIRS = {"column": "q", "positive_column": "a", "negative_columns": ("n",), "document_column": "d"}
ROWS = [
    {"q": "who sat", "a": "the cat", "n": ["a dog", "a cow"], "d": "x"},
    {"q": "who ran", "a": " ", "n": None, "d": None},
    {"q": "who slept", "a": "the dog", "n": [], "d": "x"},
    {"q": "who sat", "a": "a dog", "n": [], "d": None},  # another answer to the first question
]


@pytest.fixture
def table(tmp_path):
    def write(rows):
        path = tmp_path / "pairs.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return str(path)

    return write


def sided(tokenize, prompts):
    """Tokenise with a prompt for each side, and keep what was asked for."""
    asked = []

    def token_rows(texts, max_length, *, side):
        asked.append((side, list(texts)))
        return tokenize([prompts.get(side, "") + text for text in texts], max_length, side=side)

    return token_rows, asked


def plain(rows):
    return [row.tolist() for row in rows]


def test_the_parts_of_a_row(prepare, table, tokenize):
    corpus = prepare(path=table(ROWS), **PAIRS)
    anchors = tokenize([row["q"] for row in ROWS], 16, side=None)
    targets = tokenize(["the cat", "who ran", "the dog", "a dog"], 16, side=None)
    ids = [3, 0, 2, 1]
    assert corpus.has_pairs and corpus.has_negatives
    assert corpus.texts(ids) == [ROWS[i]["q"] for i in ids]
    assert corpus.target_texts(ids) == ["a dog", "the cat", "the dog", "who ran"]
    assert plain(corpus.token_rows(ids)) == plain(anchors[i] for i in ids)
    assert plain(corpus.targets(ids)) == plain(targets[i] for i in ids)
    assert corpus.lengths.tolist() == [len(row) for row in anchors]
    assert corpus.target_lengths.tolist() == [len(row) for row in targets]
    assert corpus.hashes.tolist() == [row_hash(row) for row in anchors]
    assert corpus.target_hashes.tolist() == [row_hash(row) for row in targets]
    negatives = tokenize(["a dog", "a cow"], 16, side=None)
    assert [plain(rows) for rows in corpus.negative_rows(ids)] == [[], plain(negatives), [], []]
    assert [hashes.tolist() for hashes in corpus.negative_hashes([0, 1])] == [[row_hash(row) for row in negatives], []]
    np.testing.assert_array_equal(corpus.contents([2, 0]), np.stack([corpus.hashes, corpus.target_hashes], 1)[[2, 0]])
    assert corpus.report.rows == 4 and corpus.report.without_positive == 1
    assert Corpus.open(corpus.path).report == corpus.report


def test_parts_are_found_over_many_chunks(prepare, table, tokenize, monkeypatch):
    monkeypatch.setattr("hncse_ray.corpus.prepare._BATCH", 3)
    rows = [{"q": f"who {i}", "a": f"cat {i}" * (i % 3 > 0), "n": [f"dog {i} {n}" for n in range(i % 4)], "d": i // 5}
            for i in range(20)]  # fmt: skip
    corpus = prepare(path=table(rows), **PAIRS)
    ids = np.random.default_rng(0).permutation(20)
    assert corpus.target_texts(ids) == [rows[i]["a"] or rows[i]["q"] for i in ids]
    assert plain(corpus.targets(ids)) == plain(tokenize(corpus.target_texts(ids), 16, side=None))
    for i, found in zip(ids, corpus.negative_rows(ids), strict=True):
        assert plain(found) == plain(tokenize(rows[i]["n"], 16, side=None) if rows[i]["n"] else [])
    assert corpus.documents[::5].tolist() == corpus.documents[4::5].tolist()
    assert len(set(corpus.documents.tolist())) == 4


def test_documents_and_rows_that_have_none(prepare, table):
    corpus = prepare(path=table(ROWS), **PAIRS)
    assert corpus.documents[0] == corpus.documents[2]
    assert len(set(corpus.documents.tolist())) == 3  # who has none is alone
    from hncse_ray.config import CorpusSettings

    settings = CorpusSettings(path="x.jsonl", document_column="d")
    assert corpus.kept_apart(settings) is corpus.documents
    assert corpus.kept_apart(settings.model_copy(update={"repel_within_document": True})) is None


def test_a_corpus_of_sentences_may_have_documents_too(prepare, table):
    corpus = prepare(path=table(ROWS), column="q", document_column="d")
    assert not corpus.has_pairs and not corpus.has_negatives
    assert corpus.report.dropped == {"duplicate": 1} and corpus.report.without_positive is None
    assert corpus.targets([1])[0].tolist() == corpus.token_rows([1])[0].tolist()
    assert corpus.target_hashes is corpus.hashes and corpus.target_lengths is corpus.lengths
    assert corpus.documents[0] == corpus.documents[2] != corpus.documents[1]


def test_rows_are_one_if_all_of_them_is(prepare, table):
    twins = [ROWS[0], ROWS[0] | {"q": "WHO sat", "d": "y"}, ROWS[0] | {"n": ["a hen"]}, ROWS[0] | {"a": "a hen"}]
    corpus = prepare(path=table(twins), **PAIRS)
    assert len(corpus) == 3 and corpus.report.dropped == {"duplicate": 1}
    assert [len(rows) for rows in corpus.negative_rows(range(3))] == [2, 1, 2]
    without = prepare(path=table(twins), column="q", positive_column="a")
    assert without.target_texts(range(len(without))) == ["the cat", "a hen"]


def test_a_positive_that_is_the_sentence_itself_is_none(prepare, table):
    corpus = prepare(path=table([{"q": "the cat", "a": "The CAT"}, {"q": "the dog", "a": "a cow"}]), column="q",
                     positive_column="a")  # fmt: skip
    assert corpus.report.without_positive == 1
    assert corpus.target_texts([0, 1]) == ["the cat", "a cow"]


def test_each_side_has_its_prompt(prepare, table, tokenize):
    token_rows, asked = sided(tokenize, {"query": "q: ", "document": "d: "})
    corpus = prepare(path=table(ROWS), tokenize=token_rows, **PAIRS)
    assert plain(corpus.token_rows([0])) == plain(tokenize(["q: who sat"], 16, side=None))
    assert plain(corpus.targets([0])) == plain(tokenize(["d: the cat"], 16, side=None))
    assert plain(corpus.targets([1])) == plain(tokenize(["q: who ran"], 16, side=None))  # its own row
    assert plain(corpus.negative_rows([0])[0]) == plain(tokenize(["d: a dog", "d: a cow"], 16, side=None))
    assert {side for side, _ in asked} == {"query", "document"}
    token_rows, asked = sided(tokenize, {None: "p: "})
    corpus = prepare(path=table(ROWS), column="q", tokenizer_digest="prompts", tokenize=token_rows)
    assert {side for side, _ in asked} == {None}
    assert plain(corpus.token_rows([0])) == plain(tokenize(["p: who sat"], 16, side=None))


def test_a_text_without_a_token_beside_its_prompt_is_nothing(prepare, table, tokenize):

    def without_tildes(texts, max_length, *, side):
        return tokenize([text.replace("~", "") for text in texts], max_length, side=side)

    rows = [
        {"q": "who sat", "a": "~~", "n": ["~", "a dog"]},
        {"q": "~~~", "a": "the cat", "n": []},
        {"q": "who ran", "a": "the cat", "n": []},
    ]
    token_rows, _ = sided(without_tildes, {"query": "the ", "document": "a cat "})
    settings = {name: value for name, value in PAIRS.items() if name != "document_column"}
    corpus = prepare(path=table(rows), tokenize=token_rows, **settings)
    assert corpus.report.dropped == {"no_token": 1} and corpus.report.without_positive == 1
    assert corpus.target_texts([0, 1]) == ["who sat", "the cat"]
    assert [len(found) for found in corpus.negative_rows([0, 1])] == [1, 0]


def test_a_prompt_that_leaves_no_room_is_named(prepare, table, tokenize, tmp_path):
    token_rows, _ = sided(tokenize, {"document": "the cat sat the cat sat"})
    with pytest.raises(DataError, match=r"the prompt leaves no token.*encoder.max_length = 8|max_length = 8.*no token"):
        prepare(path=table(ROWS), max_length=8, tokenize=token_rows, **PAIRS)
    assert not list((tmp_path / "cache" / "corpora").iterdir())  # nothing half-written


def test_a_blank_column_leaves_nothing_behind(prepare, table, tmp_path):
    with pytest.raises(DataError, match="column 'a' has nothing in any row. See corpus.positive_column"):
        prepare(path=table([{"q": "who sat", "a": " "}, {"q": "who ran", "a": None}]), column="q", positive_column="a")
    assert not list((tmp_path / "cache" / "corpora").iterdir())


def test_a_sample_is_of_whole_rows(prepare, table):
    rows = [{"q": f"who {i}", "a": f"cat {i}" if i % 2 else "", "n": [f"dog {i}"]} for i in range(50)]
    settings = {name: value for name, value in PAIRS.items() if name != "document_column"}
    corpus = prepare(path=table(rows), max_sentences=10, **settings)
    assert len(corpus) == 10 and corpus.report.dropped == {"not_sampled": 40}
    numbers = [int(text.split()[1]) for text in corpus.texts(range(10))]
    assert corpus.target_texts(range(10)) == [f"cat {i}" if i % 2 else f"who {i}" for i in numbers]
    assert corpus.report.without_positive == sum(i % 2 == 0 for i in numbers)


def test_a_corpus_of_sentences_has_the_columns_that_it_had(prepare, table):
    import pyarrow as pa

    path = prepare(path=table(ROWS), column="q").path
    with pa.memory_map(str(path / "rows-00000.arrow")) as stream, pa.ipc.open_stream(stream) as reader:
        assert reader.schema.names == ["text", "input_ids"]
