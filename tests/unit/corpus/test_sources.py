import csv
import gzip
import json
import os
import time
import tracemalloc
from collections import Counter

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from waits import seconds

from hncse_ray.config import CorpusSettings
from hncse_ray.corpus.sources import Example, read_examples, source_identity
from hncse_ray.errors import DataError

A, B = "the cat sat here", "a dog ran away"


def read(**settings):
    counts = Counter()
    texts = [example.text for example in read_examples(CorpusSettings(**settings), counts)]
    return texts, dict(counts)


def write(path, data):
    path.write_bytes(data if isinstance(data, bytes) else data.encode())
    return str(path)


def test_text_lines_are_filtered_and_every_drop_is_counted(tmp_path):
    lines = [
        b"\xef\xbb\xbf" + A.encode(),
        b"",
        b"   ",
        b"two words",
        b"bad \xff bytes here",
        b"a nul \0 in it",
    ]
    lines += [b"word " * 50, B.encode() + b"\r"]
    texts, counts = read(path=write(tmp_path / "a.txt", b"\n".join(lines)), max_chars=100, min_words=3)
    assert texts == [A, B]
    assert counts == {"read": 8, "empty": 2, "too_short": 1, "undecodable": 2, "too_long": 1}


def test_max_chars_counts_characters_not_bytes(tmp_path):
    line = "\u00e9\u00e9 \u00e9\u00e9 \u00e9\u00e9\u00e9\u00e9"
    assert read(path=write(tmp_path / "a.txt", line), max_chars=10)[0] == [line]
    assert read(path=write(tmp_path / "a.txt", line + "\u00e9"), max_chars=10)[1]["too_long"] == 1


def test_gz_and_glob_and_order(tmp_path):
    with gzip.open(tmp_path / "b.txt.gz", "wb") as stream:
        stream.write(B.encode())
    write(tmp_path / "a.txt", A)
    (tmp_path / "dir.txt").mkdir()
    assert read(path=f"{tmp_path}/*.txt*")[0] == [A, B]
    assert read(path=(f"{tmp_path}/b.txt.gz", f"{tmp_path}/a.txt"))[0] == [B, A]


def test_a_name_with_brackets_is_a_file_not_a_pattern(tmp_path):
    assert read(path=write(tmp_path / "a[1].txt", A))[0] == [A]


@pytest.mark.parametrize("suffix", ["txt", "txt.gz"])
def test_a_huge_line_is_dropped_without_being_held(tmp_path, suffix):
    path = tmp_path / f"a.{suffix}"
    with (gzip.open if suffix.endswith("gz") else open)(path, "wb") as stream:
        stream.write(A.encode() + b"\n")
        for _ in range(64):
            stream.write(b"x" * 2**20)
        stream.write(b"\n" + B.encode() + b"\n")
    tracemalloc.start()
    texts, counts = read(path=str(path))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert texts == [A, B]
    assert counts == {"read": 3, "too_long": 1}
    assert peak < 4 * 2**20


@pytest.mark.parametrize("end", [b"", b"\n"])
def test_lines_at_the_limit(tmp_path, end):
    line = b"a b " + b"c" * 36  # 40 characters = bytes, the reader's own limit for max_chars 10 is 40 bytes
    assert read(path=write(tmp_path / "a.txt", line + end + b""), max_chars=40)[0] == [line.decode()]
    texts, counts = read(path=write(tmp_path / "b.txt", line * 4 + b"\n" + b"x y z" + end), max_chars=39)
    assert (texts, counts["too_long"]) == (["x y z"], 1)


def test_jsonl(tmp_path):
    rows = [json.dumps({"text": A, "n": 1}), "{broken", "", '["list"]', json.dumps({"text": None})]
    rows += [json.dumps({"text": 3}), json.dumps({"text": B}), '{"text": "lone \\ud800 surrogate here"}']
    texts, counts = read(path=write(tmp_path / "a.jsonl", "\n".join(rows)))
    assert texts == [A, B]
    assert counts == {"read": 8, "undecodable": 3, "not_text": 1, "empty": 2}


def test_csv(tmp_path):
    with open(tmp_path / "a.csv", "w", newline="", encoding="utf-8-sig") as stream:
        writer = csv.writer(stream)
        writer.writerows([["body", "id"], [f"{A}, {B}\t1", "1"], ["two\nlines in one", "2"], []])
    assert read(column="body", path=str(tmp_path / "a.csv")) == (
        [f"{A}, {B} 1", "two lines in one"],
        {"read": 3, "empty": 1},
    )


def test_a_stray_quote_in_tsv_swallows_no_row(tmp_path):
    rows = ["id\ttext", f'1\t"{A}', f'2\t5" disk and {B}', f'3\t""{A}""', "4", "5\ta\tb", f"6\t{B}"]
    texts, counts = read(path=write(tmp_path / "a.tsv", "\n".join(rows)))
    assert texts == [f'"{A}', f'5" disk and {B}', f'""{A}""', B]
    assert counts == {"read": 6, "malformed": 2}


def test_bad_bytes_drop_their_record_and_no_other(tmp_path):
    data = b'id,text\n1,"first line\nwith \xff inside\nand an end"\n2,' + A.encode() + b'\n3,"\xfe"\n4,' + B.encode()
    assert read(path=write(tmp_path / "a.csv", data)) == ([A, B], {"read": 4, "undecodable": 2})
    header = b"i\xffd,text\n1," + A.encode() + b"\n"
    assert read(path=write(tmp_path / "b.csv", header))[0] == [A]


def test_a_record_with_other_columns_than_the_header_is_not_torn(tmp_path):
    data = f"text\nbread, butter and jam\n{A}\n"
    assert read(path=write(tmp_path / "a.csv", data)) == ([A], {"read": 2, "malformed": 1})


@pytest.mark.parametrize(
    ("data", "line"),
    [
        ('text\n"' + "word " * 200_000 + "\n" + A + "\n", 2),
        (f'id,text\n1,{A}\n2,"{B}\n3,{A}\n4,"{B}"\n', 3),
        (f'id,text\n1,{A}\n2,"{B}', 3),
    ],
)
def test_a_quote_that_is_not_closed_names_its_line(tmp_path, data, line):
    with pytest.raises(DataError, match=rf"a\.csv:{line}: a quote that is opened here is not closed"):
        read(path=write(tmp_path / "a.csv", data))


def test_a_csv_with_an_open_quote_is_refused_in_bounded_memory(tmp_path):
    path = tmp_path / "a.csv"
    with open(path, "wb") as stream:
        stream.write(b'text\n"')
        for _ in range(64):
            stream.write(b"words and words\n" * 2**16)
    tracemalloc.start()
    with pytest.raises(DataError, match=r"a\.csv:2: a quote"):
        read(path=str(path))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 256 * 2**20  # a field of 16 M characters, four bytes each, and its copy


def test_jsonl_whose_first_objects_lack_the_column(tmp_path):
    rows = [{"title": "x"}, {"title": "y", "text": A}, {"text": B}, {"other": 1}]
    path = write(tmp_path / "a.jsonl", "\n".join(map(json.dumps, rows)))
    assert read(path=path) == ([A, B], {"read": 4, "empty": 2})
    with pytest.raises(DataError, match=r"no column 'titel'. Did you mean 'title'\? It has: title, text, other"):
        read(path=path, column="titel")


@pytest.mark.parametrize("name", ["a.jsonl.gz", "a.ndjson", "a.json", "a.JSONL", "a.Json.GZ"])
def test_the_ending_says_how_a_file_is_read(tmp_path, name):
    data = json.dumps({"text": A}).encode()
    assert read(path=write(tmp_path / name, gzip.compress(data) if name.lower().endswith("gz") else data))[0] == [A]


def test_files_of_several_kinds_make_one_corpus(tmp_path):
    write(tmp_path / "a.jsonl", json.dumps({"text": A}))
    write(tmp_path / "b.csv.gz", gzip.compress(f"text\n{B}\n".encode()))
    write(tmp_path / "c.tab", "id\ttext\n1\tthird one here\n")
    write(tmp_path / "d", "fourth one here")
    pq.write_table(pa.table({"text": ["fifth one here"]}), tmp_path / "e.parq")
    assert read(path=f"{tmp_path}/*")[0] == [A, B, "third one here", "fourth one here", "fifth one here"]


@pytest.mark.parametrize("end", ["\r", "\n", "\r\n"])
@pytest.mark.parametrize("name", ["a.txt", "a.jsonl", "a.csv", "a.tsv"])
def test_every_line_end_ends_a_line(tmp_path, end, name):
    lines = {"a.jsonl": [json.dumps({"text": A}), json.dumps({"text": B})], "a.txt": [A, B]}.get(name, ["text", A, B])
    assert read(path=write(tmp_path / name, end.join(lines) + end)) == ([A, B], {"read": 2})


def test_what_cannot_be_seen_is_no_sentence(tmp_path):
    lines = [
        "\u200b\u200d",
        "\ufeff\u2060 \u200e",
        "\ue000\ue001",
        "\u3164 \u2800",
        "\u0301",
        "\x01\x02",
        A,
        "\u4f60\u597d",
    ]
    texts, counts = read(path=write(tmp_path / "a.txt", "\n".join(lines)))
    assert texts == [A, "\u4f60\u597d"]
    assert counts == {"read": 8, "empty": 6}


def test_parquet(tmp_path):
    pq.write_table(pa.table({"n": [1, 2, 3], "text": [A, None, B]}), tmp_path / "a.parquet")
    assert read(path=f"{tmp_path}/*.parquet") == ([A, B], {"read": 3, "empty": 1})


def test_a_parquet_file_that_is_none(tmp_path):
    with pytest.raises(DataError, match=r"a\.parquet: is not a readable Parquet"):
        read(path=write(tmp_path / "a.parquet", A))


@pytest.mark.parametrize("source", ["jsonl", "csv", "parquet"])
def test_a_wrong_column_names_the_right_ones(tmp_path, source):
    path = tmp_path / f"a.{source}"
    if source == "jsonl":
        write(path, json.dumps({"sentence": A, "id": 1}))
    elif source == "csv":
        write(path, f"sentence,id\n{A},1\n")
    else:
        pq.write_table(pa.table({"sentence": [A], "id": [1]}), path)
    with pytest.raises(DataError, match=r"no column 'sentense'.*Did you mean 'sentence'\? It has: sentence, id"):
        read(column="sentense", path=str(path))


def test_a_csv_whose_columns_are_parted_by_something_else(tmp_path):
    with pytest.raises(DataError, match=r"no column 'text'\. Its columns are parted by ';'.*It has: text;title"):
        read(column="text", path=write(tmp_path / "a.csv", f"text;title\n{A};b\n"))


@pytest.mark.parametrize("keep", [0.5, 0.99])
def test_a_truncated_gz_is_an_error_that_names_it(tmp_path, keep):
    whole = gzip.compress("\n".join(f"{A} {i}" for i in range(5000)).encode())
    with pytest.raises(DataError, match=r"a\.txt\.gz: is not a whole gzip file"):
        read(path=write(tmp_path / "a.txt.gz", whole[: int(keep * len(whole))]))


def test_a_gz_that_is_none(tmp_path):
    with pytest.raises(DataError, match="is not a whole gzip file"):
        read(path=write(tmp_path / "a.txt.gz", A))


@pytest.mark.parametrize("read_it", [read, lambda **s: source_identity(CorpusSettings(**s))])
def test_missing_directory_empty_and_no_match(tmp_path, read_it):
    with pytest.raises(DataError, match="gone.txt: no such file"):
        read_it(path=f"{tmp_path}/gone.txt")
    with pytest.raises(DataError, match="is a directory"):
        read_it(path=str(tmp_path), source="text")
    with pytest.raises(DataError, match="is empty"):
        read_it(path=write(tmp_path / "empty.txt", ""))
    with pytest.raises(DataError, match="matches no file"):
        read_it(path=f"{tmp_path}/*.nothing")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_unreadable(tmp_path):
    path = write(tmp_path / "a.txt", A)
    os.chmod(path, 0)
    with pytest.raises(DataError, match="cannot be read"):
        read(path=path)


@pytest.mark.parametrize("offline", [False, True])
def test_an_unreachable_hub_fails_soon_and_names_ways_out(monkeypatch, tmp_path, offline):
    for name in ("HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
    if offline:
        monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    else:
        monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    started = time.monotonic()
    with pytest.raises(DataError, match=r"corpus.source=python-docs.*HF_HOME") as raised:
        read(source="hub", path="nobody/nothing-such")
    assert time.monotonic() - started < seconds(10)
    assert raised.value.where == "nobody/nothing-such"


def test_a_local_data_set_through_the_hub_source(monkeypatch, tmp_path):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "hf"))
    folder = tmp_path / "data"
    folder.mkdir()
    pq.write_table(pa.table({"text": [A, B]}), folder / "train.parquet")
    assert read(source="hub", path=str(folder))[0] == [A, B]
    assert not list((tmp_path / "hf").rglob("*.arrow"))  # it was read where it is
    assert read(source="hub", path=str(folder), split="train[1:]")[0] == [B]
    with pytest.raises(DataError, match="It has: text"):
        read(source="hub", path=str(folder), column="txt")


def test_identity_follows_contents_not_names(tmp_path):
    def identity(**settings):
        return source_identity(CorpusSettings(**settings))

    a, b = write(tmp_path / "a.txt", A), write(tmp_path / "b.txt", A)
    other = write(tmp_path / "c.txt", B)
    assert identity(path=a) == identity(path=b) == identity(path=a, column="ignored")
    assert len({identity(path=a), identity(path=other), identity(path=(a, other)), identity(path=(other, a))}) == 4
    table = write(tmp_path / "a.csv", "x,y\n1,2\n")
    assert identity(path=table, column="x") != identity(path=table, column="y")
    assert identity(path=table) == identity(path=table, source="csv")
    assert identity(path=a) != identity(path=write(tmp_path / "a.tsv", A))


# ------------------------------------------------------------------------------------------------ pairs

PAIRS = {"column": "q", "positive_column": "a"}
ROWS = [
    {"q": "Who sat?", "a": " The  cat. ", "n": ["A dog.", " ", None, "A cow."], "m": "A hen.", "d": 7},
    {"q": "Who ran?", "a": "\u200b", "n": None, "m": None, "d": "7"},
    {"q": "Who slept?", "a": None, "n": [], "m": "", "d": None},
    {"q": "Who ate?", "a": "The mouse.", "n": "One alone.", "m": None, "d": 7.0},
]
EXAMPLES = [
    Example("Who sat?", "The cat.", ("A dog.", "A cow.", "A hen."), "7"),
    Example("Who ran?", None, (), "7"),
    Example("Who slept?", None, (), None),
    Example("Who ate?", "The mouse.", ("One alone.",), "7"),
]


def read_pairs(**settings):
    counts = Counter()
    return list(read_examples(CorpusSettings(**PAIRS | settings), counts)), dict(counts)


def jsonl(path, rows):
    return write(path, "".join(json.dumps(row) + "\n" for row in rows))


def test_pairs_of_jsonl(tmp_path):
    path = jsonl(tmp_path / "a.jsonl", ROWS)
    assert read_pairs(path=path, negative_columns=("n", "m"), document_column="d") == (EXAMPLES, {"read": 4})
    assert read_pairs(path=path)[0] == [Example(e.text, e.positive) for e in EXAMPLES]


def test_pairs_of_parquet_and_the_hub(tmp_path):
    rows = [
        row | {"n": [row["n"]] if isinstance(row["n"], str) else row["n"], "d": "7" if row["d"] else None}
        for row in ROWS
    ]
    columns = {name: [row[name] for row in rows] for name in rows[0]}
    pq.write_table(pa.table(columns), tmp_path / "a.parquet")
    settings = {"negative_columns": ("n", "m"), "document_column": "d"}
    assert read_pairs(path=str(tmp_path / "a.parquet"), **settings) == (EXAMPLES, {"read": 4})
    (tmp_path / "set").mkdir()
    (tmp_path / "a.parquet").rename(tmp_path / "set" / "train.parquet")
    assert read_pairs(source="hub", path=str(tmp_path / "set"), **settings) == (EXAMPLES, {"read": 4})


@pytest.mark.parametrize(("name", "sign"), [("a.tsv", "\t"), ("a.csv", ",")])
def test_pairs_of_a_table_with_a_header(tmp_path, name, sign):
    rows = [["n", "q", "a"], ["A dog.", "Who sat?", "The cat."], ["", "Who ran?", ""], [" ", "", "Lost."]]
    path = write(tmp_path / name, "\n".join(sign.join(row) for row in rows))
    found = [Example("Who sat?", "The cat.", ("A dog.",)), Example("Who ran?")]
    assert read_pairs(path=path, negative_columns="n") == (found, {"read": 3, "empty": 1})


def test_one_column_may_be_the_positive_and_the_document(tmp_path):
    path = write(tmp_path / "a.tsv", "q\ta\nWho sat?\tThe cat.\n")
    assert read_pairs(path=path, document_column="a")[0] == [Example("Who sat?", "The cat.", (), "The cat.")]


def test_a_row_with_a_cell_that_cannot_be_used_is_dropped_and_counted(tmp_path):
    rows = [
        {"q": "Who?", "a": "x" * 101, "n": None},
        {"q": "Who?", "a": "\0", "n": None},
        {"q": "Who?", "a": ["The cat."], "n": None},
        {"q": "Who?", "a": "The cat.", "n": ["A dog.", 3]},
        {"q": "Who?", "a": "The cat.", "n": [["A dog."]]},
        {"q": "Who?", "a": "The cat.", "n": "A dog.", "d": True},
        {"q": "Who?", "a": "The cat.", "n": "A dog.", "d": float("nan")},
    ]
    path = jsonl(tmp_path / "a.jsonl", [{"d": 1}, *rows])
    found, counts = read_pairs(path=path, negative_columns="n", document_column="d", max_chars=100)
    assert found == [Example("Who?", "The cat.", ("A dog.",), None)]
    assert counts == {"read": 8, "empty": 1, "too_long": 1, "undecodable": 1, "not_text": 3, "malformed": 1}


def test_the_words_of_positives_and_negatives_are_not_counted(tmp_path):
    path = write(tmp_path / "a.tsv", "q\ta\nWho sat on it?\tCats.\nWho?\tNobody did that.\n")
    found, counts = read_pairs(path=path, min_words=3)
    assert found == [Example("Who sat on it?", "Cats.")] and counts["too_short"] == 1


@pytest.mark.parametrize("blank", ["a", "n", "m", "d"])
def test_a_column_with_nothing_in_it_is_named(tmp_path, blank):
    path = jsonl(tmp_path / "a.jsonl", [row | {blank: [" ", "\u200b"][: i + 1] and " "} for i, row in enumerate(ROWS)])
    setting = {"a": "positive_column", "d": "document_column"}.get(blank, "negative_columns")
    with pytest.raises(DataError, match=rf"a.jsonl: column '{blank}' has nothing in any row. See corpus.{setting}"):
        read_pairs(path=path, negative_columns=("n", "m"), document_column="d")


@pytest.mark.parametrize("name", ["a.tsv", "a.csv", "a.jsonl", "a.parquet"])
def test_a_column_that_is_missing_is_named(tmp_path, name):
    path = tmp_path / name
    if name.endswith("parquet"):
        pq.write_table(pa.table({"q": ["Who?"], "answer": ["The cat."]}), path)
    elif name.endswith("jsonl"):
        jsonl(path, [{"q": "Who?", "answer": "The cat."}])
    else:
        write(path, "q{0}answer\nWho?{0}The cat.\n".format("\t" if name.endswith("tsv") else ","))
    with pytest.raises(DataError, match=r"has no column 'answers'. Did you mean 'answer'"):
        read_pairs(path=str(path), positive_column="answers")


def test_text_has_no_columns(tmp_path):
    path = write(tmp_path / "a.txt", "Who sat?\n")
    for read_it in (lambda: read_pairs(path=path), lambda: source_identity(CorpusSettings(path=path, **PAIRS))):
        with pytest.raises(DataError, match=r"a.txt: is plain text and has no columns.*positive_column.*Give a table"):
            read_it()


def test_what_the_columns_are_for_is_part_of_what_a_source_is(tmp_path):
    path = jsonl(tmp_path / "a.jsonl", ROWS)
    kinds = [
        {"column": "q"},
        {"column": "q", "positive_column": "m"},
        {"column": "q", "document_column": "m"},
        {"column": "q", "positive_column": "m", "document_column": "d"},
        {"column": "q", "positive_column": "a", "negative_columns": ("m", "n")},
        {"column": "q", "positive_column": "a", "negative_columns": ("n", "m")},
    ]
    assert len({source_identity(CorpusSettings(path=path, **kind)) for kind in kinds}) == len(kinds)
    plain = CorpusSettings(path=path, column="q", repel_within_document=False)
    assert " q " in source_identity(plain) and "[" not in source_identity(plain)  # prepared before, it is found
