import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from hncse_ray.errors import DataError, HncseError
from hncse_ray.reading import kind_of, read_lines, read_records, read_table

COLUMNS = ("query", "answer")


def write(path, data):
    path.write_bytes(data if isinstance(data, bytes) else data.encode())
    return path


def test_optional_columns(tmp_path):
    rows = [
        {"_id": "1", "title": "T", "text": " x "},
        {"_id": "2", "text": "y"},
        {"_id": "3", "title": None, "text": "z"},
    ]
    jsonl = write(tmp_path / "a.jsonl", "\n\n".join(map(json.dumps, rows)))
    expected = [(1, ("1", "x", "T")), (3, ("2", "y", "")), (5, ("3", "z", ""))]
    assert list(read_table(jsonl, ["_id", "text"], optional=["title"])) == expected
    tsv = write(tmp_path / "a.tsv", "text\t_id\nx\t1\n")
    assert list(read_table(tsv, ["_id", "text"], optional=["title"])) == [(2, ("1", "x", ""))]
    pq.write_table(pa.table({"text": ["x"], "_id": ["1"]}), tmp_path / "a.parquet")
    assert list(read_table(tmp_path / "a.parquet", ["_id", "text"], optional=["title"])) == [(1, ("1", "x", ""))]


def test_a_tsv_that_needs_a_header(tmp_path):
    path = write(tmp_path / "qrels.tsv", "query-id\tcorpus-id\tscore\nq1\td1\t2\n")
    assert list(read_table(path, ["query-id", "corpus-id", "score"])) == [(2, ("q1", "d1", "2"))]
    with pytest.raises(DataError, match="has no column 'qid'"):
        list(read_table(path, ["qid"]))


def test_numbers_are_those_of_the_lines_on_which_records_begin(tmp_path):
    path = write(tmp_path / "a.csv", 'query,answer\n\nq,"a\n\nb"\r\nq,c\n')
    assert list(read_table(path, COLUMNS)) == [(3, ("q", "a\n\nb")), (6, ("q", "c"))]


def test_two_columns_of_one_name_and_the_same_column_twice(tmp_path):
    path = write(tmp_path / "a.csv", "query,query,answer\nq,r,a\n")
    assert list(read_table(path, ["query", "query"])) == [(2, ("q", "q"))]


def test_a_broken_header_names_its_line(tmp_path):
    with pytest.raises(DataError, match=r"a\.csv:1: is not valid CSV"):
        list(read_table(write(tmp_path / "a.csv", '"que"ry,answer\nq,a\n'), COLUMNS))


# ------------------------------------------------------------------------------------------------ whatever goes in

cells = st.text(alphabet=st.characters(codec="utf-8", exclude_characters="\r\0"), max_size=8)
rows = st.lists(st.tuples(cells, cells), min_size=1, max_size=6)


@given(rows=rows)
@settings(max_examples=50, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
def test_what_the_csv_module_writes_is_read_back(tmp_path, rows):
    import csv

    with open(tmp_path / "a.csv", "w", encoding="utf-8", newline="") as stream:
        csv.writer(stream, quoting=csv.QUOTE_ALL).writerows([COLUMNS, *rows])
    assert [record.cells for record in read_records(tmp_path / "a.csv", COLUMNS)] == rows


pieces = st.sampled_from([
    b'"', b'""', b",", b"\t", b"\n", b"\r", b"\r\n", b"query", b"answer", b"query,answer\n", b"query\tanswer\n", b"\0",
    b"\xff", b"\xed\xa0\x80", b"\xef\xbb\xbf", b"{", b"}", b"[", b'{"query": "a", "answer": "b"}\n', b'"\\ud800"',
    b"1e999", b"9" * 30, b"NaN", b"null", b"\x1f\x8b\x08", b"PAR1", "\u2028".encode(), "é".encode(), b" ", b"word",
])  # fmt: skip
documents = st.one_of(st.binary(max_size=200), st.lists(pieces | st.binary(max_size=4), max_size=30).map(b"".join))
NAMES = ["a.csv", "a.tsv", "a.txt", "a.jsonl", "a.json.gz", "a.parquet", "a.csv.gz"]


def read_all_ways(path):
    """Every reader of a user's file returns or raises the project's own error, and text that can be encoded."""
    from collections import Counter

    from hncse_ray.config import CorpusSettings
    from hncse_ray.corpus.sources import read_examples, source_identity
    from hncse_ray.evaluation import read_pairs

    text = kind_of(path) == "text"
    corpus = CorpusSettings(path=str(path), column="query", positive_column=None if text else "answer")
    counts = Counter()
    ways = [
        lambda: [text for pair in zip(*read_pairs(path), strict=True) for text in pair],
        lambda: [text for e in read_examples(corpus, counts) for text in (e.text, e.positive or "", *e.negatives)],
        lambda: [source_identity(corpus)],
        lambda: read_lines(path),
        lambda: [text for _, cells in read_table(path, ["query"], optional=["answer"]) for text in cells],
    ]
    for way in ways:
        try:
            texts = way()
        except HncseError as error:
            str(error).encode()
        else:
            assert all(isinstance(text, str) and text.encode() is not None for text in texts)


def fuzz(examples):
    def wrap(function):
        quiet = settings(
            max_examples=examples, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None
        )
        return quiet(given(data=documents, name=st.sampled_from(NAMES), whole=st.booleans())(function))

    return wrap


def check_document(folder, data, name, whole):
    import gzip

    (folder / name).write_bytes(gzip.compress(data) if whole and name.endswith(".gz") else data)
    read_all_ways(folder / name)


@fuzz(100)
def test_whatever_is_in_a_file(tmp_path, data, name, whole):
    check_document(tmp_path, data, name, whole)


@pytest.mark.slow
@pytest.mark.timeout(600)
@fuzz(20_000)
def test_whatever_is_in_a_file_at_length(tmp_path, data, name, whole):
    check_document(tmp_path, data, name, whole)


def parquet_bytes():
    sink = pa.BufferOutputStream()
    table = pa.table({"query": ["a", None, "c"] * 20, "answer": [1, 2, 3] * 20, "n": [b"\xff", b"", None] * 20})
    pq.write_table(table, sink)
    return sink.getvalue().to_pybytes()


def check_damaged_parquet(folder, flips, cut):
    data = bytearray(parquet_bytes())
    for place, value in flips:
        data[place % len(data)] = value
    (folder / "a.parquet").write_bytes(bytes(data[: cut or None]))
    read_all_ways(folder / "a.parquet")


flips = st.lists(st.tuples(st.integers(0, 2**16), st.integers(0, 255)), min_size=1, max_size=4)
parquet_fuzz = given(flips=flips, cut=st.just(0) | st.integers(1, 2000))


@parquet_fuzz
@settings(max_examples=30, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
def test_damaged_parquet(tmp_path, flips, cut):
    check_damaged_parquet(tmp_path, flips, cut)


@pytest.mark.slow
@parquet_fuzz
@settings(max_examples=3000, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
def test_damaged_parquet_at_length(tmp_path, flips, cut):
    check_damaged_parquet(tmp_path, flips, cut)
