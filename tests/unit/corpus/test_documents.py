import gzip
import json
import os
import tracemalloc
from collections import Counter

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from hncse_ray.config import CorpusSettings
from hncse_ray.corpus.documents import count_words, document_labels
from hncse_ray.corpus.sources import read_examples, source_identity
from hncse_ray.corpus.text import name_hash
from hncse_ray.errors import DataError, SettingsError
from hncse_ray.reading import read_document

WORDS = "wing flow shock layer heat drag lift plate cone wake".split()


def sentence(i: int, words: int = 10) -> str:
    return f"The {' '.join(WORDS[(i * 7 + j * (1 + i % 9)) % 10] for j in range(words - 2))} {i}."


def sentences(first: int, count: int) -> str:
    return " ".join(sentence(i) for i in range(first, first + count))


def read(path, **settings):
    counts = Counter()
    return list(read_examples(CorpusSettings(path=str(path), **settings), counts)), dict(counts)


def write(folder, files):
    for name, data in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data if isinstance(data, bytes) else data.encode())
    return folder


PAGE = """<!DOCTYPE html><html><head><title>Boundary &amp; layer</title><style>p {}</style></head><body>
<nav><a href=x>Home page here</a></nav><header><h1>Site name</h1></header>
<main><h1>Boundary &amp; layer</h1><p>A <b>thin</b> layer of
fluid.<p>It grows<br>slowly. <script>alert("No.")</script><h2>In practice</h2><ul><li>First thing.<li>Second thing.</ul>
<pre>code = 1</pre></main><footer>All rights.</footer></body></html>"""
MARKDOWN = """---
date: today
---
# A *wing* in flow

It has [a link](http://x.y/z) and `code`,
on two lines.

## Part two

- One **bold** item.

```python
print("dropped.")
```
"""


def test_a_folder_is_its_text_markdown_and_html_in_the_order_of_their_paths(tmp_path):
    files = {
        "b.html": PAGE,
        "a/x.md": MARKDOWN,
        "a/.hidden.txt": "Not this.",
        ".git/y.txt": "Nor this.",
        "c.csv": "a,b\n",
    }
    files |= {"a/z.txt.gz": gzip.compress(b"A plain title\n\nOne paragraph\nof lines.\n\nAnd one more.")}
    files |= {"d.txt": "No title here is told. It goes on."}
    rows, counts = read(write(tmp_path, files))
    assert [(row.title, row.body) for row in rows] == [
        ("A wing in flow", "It has a link and code, on two lines. Part two. One bold item."),
        ("A plain title", "One paragraph of lines. And one more."),
        ("Boundary & layer", "A thin layer of fluid. It grows slowly. In practice. First thing. Second thing."),
        (None, "No title here is told. It goes on."),
    ]
    assert rows[0].text == f"A wing in flow. {rows[0].body}"
    assert rows[3].text == rows[3].body
    assert len({row.document for row in rows}) == counts["read"] == 4
    assert read(tmp_path, source="documents") == (rows, counts)
    assert read(tmp_path, unit="passage")[0][0].text == rows[0].body


@pytest.mark.parametrize(
    ("text", "title"),
    [
        ("a wing in a slipstream .\n\nAn experiment.", "a wing in a slipstream ."),
        ("What is a wing?\n\nAn answer.", "What is a wing?"),
        ("Dr. Smith on wings\n\nA talk.", "Dr. Smith on wings"),
        (f"{'word ' * 24}word.\n\nText.", f"{'word ' * 24}word."),
        (f"{'word ' * 25}word.\n\nText.", None),
        ("A wing. It lifts.\n\nText.", None),
        ("A wing in flow .\nIt lifts.\n\nText.", None),
        ("There are these:\n\nWings.", None),
        ("A wing alone .\n\n", None),
    ],
)
def test_the_title_of_a_text_is_a_short_line_of_one_sentence_with_an_empty_line_below(tmp_path, text, title):
    rows, _ = read(write(tmp_path, {"a.txt": text}))
    assert rows[0].title == title


def test_html_is_decoded_as_it_says_and_any_depth_is_read(tmp_path):
    latin = '<meta charset="iso-8859-1"><p>Ein schöner Satz.'.encode("latin-1")
    deep = "<div>" * 5000 + "<p>At the bottom.</p>"
    rows, _ = read(
        write(tmp_path, {"a.html": latin, "b.htm": "\ufeff<p>Drei schöne.".encode("utf-16"), "c.html": deep})
    )
    assert [row.body for row in rows] == ["Ein schöner Satz.", "Drei schöne.", "At the bottom."]


@pytest.mark.parametrize("kind", ["jsonl", "parquet", "csv"])
def test_tables_have_title_text_and_id_by_default_and_a_title_alone_is_a_document(tmp_path, kind):
    rows = [{"_id": "7", "title": "On wings", "text": "Lift is had."}, {"_id": "8", "title": "Drag alone", "text": ""},
            {"_id": "9", "title": "", "text": "No title."}, {"_id": "10", "title": "", "text": " "}]  # fmt: skip
    path = tmp_path / f"corpus.{kind}"
    if kind == "jsonl":
        path.write_text("\n".join(map(json.dumps, rows)))
    elif kind == "csv":
        path.write_text("_id,title,text\n" + "\n".join(f"{r['_id']},{r['title']},{r['text']}" for r in rows))
    else:
        pq.write_table(pa.Table.from_pylist(rows), path)
    found, counts = read(path, source="documents")
    assert [(row.text, row.title, row.body) for row in found] == [
        ("On wings. Lift is had.", "On wings", "Lift is had."),
        ("Drag alone", "Drag alone", ""),
        ("No title.", None, "No title."),
    ]
    assert counts == {"read": 4, "empty": 1}
    assert [row.text for row in read(path, source="documents", unit="passage")[0]][1] == "Drag alone"
    other = {"column": "title", "title_column": "text", "document_column": "_id"}
    assert read(path, source="documents", **other)[0][0].text == "Lift is had. On wings"
    with pytest.raises(DataError, match="has no column 'body'.*It has: _id, title, text"):
        read(path, source="documents", column="body")


def test_documents_are_split_at_ends_of_sentences_into_passages_of_like_length(tmp_path):
    text = sentences(0, 21)
    rows, _ = read(write(tmp_path, {"a.txt": text, "b.txt": sentences(50, 20)}), passage_words=200)
    bodies = [row.body for row in rows]
    assert " ".join(bodies[:2]) == text
    assert [count_words(body) for body in bodies] == [110, 100, 200]
    assert [len({row.document for row in part}) for part in (rows[:2], rows[1:])] == [1, 2]
    long, _ = read(write(tmp_path / "more", {"c.txt": "word " * 450 + "end. " + "字" * 900}), passage_words=200)
    assert max(count_words(row.body) for row in long) == 200
    assert "".join(row.body.replace(" ", "") for row in long) == "word" * 450 + "end." + "字" * 900


def test_a_huge_document_takes_little_memory(tmp_path):
    path = write(tmp_path, {"a.txt": " ".join(f"w{i}." for i in range(60_000))}) / "a.txt"
    tracemalloc.start()
    try:
        rows, _ = read(path, source="documents")
        assert tracemalloc.get_traced_memory()[1] < 45e6  # 61 MB are the hashes of all shingles at once
    finally:
        tracemalloc.stop()
    assert len(rows) == 300


def test_a_first_line_of_many_marks_is_looked_at_once(tmp_path):
    (tmp_path / "a.txt").write_text("One" + "." * 1_000_000 + "two\n\nThree.\n")
    assert read_document(tmp_path / "a.txt", "text").title is None


def test_xhtml_and_a_fifo_are_no_trouble(tmp_path, recwarn):
    os.mkfifo(tmp_path / "pipe.txt")
    (tmp_path / "gone.txt").symlink_to(tmp_path / "nowhere")
    page = '<?xml version="1.0"?><html xmlns="http://www.w3.org/1999/xhtml"><body><p>A sentence.</p></body></html>'
    assert [row.body for row in read(write(tmp_path, {"a.xhtml": page}))[0]] == ["A sentence."]
    assert not recwarn.list
    with pytest.raises(DataError, match="unknown kind '.html'.*corpus.source=documents"):
        read(write(tmp_path, {"b.html": page}) / "b.html")


def test_a_long_document_is_not_dropped_by_max_chars(tmp_path):
    rows, counts = read(write(tmp_path, {"a.txt": sentences(0, 500)}), max_chars=1000)
    assert counts == {"read": 1}
    assert len(rows) == 25


def test_near_duplicates_are_counted_and_dropped_unless_that_is_off(tmp_path):
    text = sentences(0, 15)
    files = {
        "a.txt": text,
        "b.txt": text.replace(sentence(14), sentence(99)),
        "c.txt": sentences(3, 15) + sentences(80, 9),
    }
    write(tmp_path, files)
    rows, counts = read(tmp_path, near_duplicates=0.8)
    assert counts == {"read": 3, "near_duplicate": 1}
    assert [row.body for row in rows][0] == text
    assert len({row.document for row in rows}) == 2
    assert read(tmp_path, near_duplicates=None)[1] == {"read": 3}
    cjk = "".join(chr(0x4E00 + i * 37 % 2000) for i in range(300))
    write(tmp_path / "cjk", {"a.txt": f"{cjk}。", "b.txt": f"{cjk[:-1]}。", "c.txt": cjk[::-1]})
    assert read(tmp_path / "cjk")[1] == {"read": 3, "near_duplicate": 1}


def test_rows_of_a_document_that_stand_apart_are_refused(tmp_path):
    rows = [("a", "One thing."), ("a", "Two things."), ("b", "Three."), ("a", "Four.")]
    path = tmp_path / "t.jsonl"
    path.write_text("\n".join(json.dumps({"id": name, "text": text}) for name, text in rows[:3]))
    assert len({row.document for row in read(path, source="documents")[0]}) == 2
    path.write_text("\n".join(json.dumps({"id": name, "text": text}) for name, text in rows))
    with pytest.raises(DataError, match="t.jsonl:4: a row of document 'a' stands apart"):
        read(path, source="documents")


def test_documents_are_called_by_their_path_or_the_name_of_their_row(tmp_path):
    def called(*paths):
        known = CorpusSettings(path=tuple(map(str, paths)), source="documents", near_duplicates=None)
        hashes = [name_hash(example.document) for example in read_examples(known, Counter())]
        labels = document_labels(known, hashes)
        return [labels[document] for document in hashes]

    write(tmp_path / "notes", {"a.txt": "One.", "b/a.md": "Two.", os.fsdecode(b"c\xff.txt"): "Three."})
    table = write(tmp_path, {"t.jsonl": '{"id": 7, "text": "Four."}\n{"title": "Five", "text": "Six."}\n'}) / "t.jsonl"
    assert called(tmp_path / "notes") == ["a.txt", "b/a.md", "c\ufffd.txt"]
    assert called(tmp_path / "notes" / "a.txt") == ["a.txt"]
    assert called(table) == ["7", "t.jsonl:2"]
    assert called(table, tmp_path / "notes" / "b") == ["t.jsonl 7", "t.jsonl:2", "notes/b/a.md"]
    settings = CorpusSettings(path=(str(tmp_path / "notes"),))
    with pytest.raises(DataError, match="changed while it was read"):
        document_labels(settings, [name_hash("3")])


BAD = {
    "empty.txt": (b"", "is empty", "empty"),
    "blank.txt": (b" \n\n \n", "is empty", "empty"),
    "bare.html": (b"<html><script>x</script></html>", "has no text but markup", "empty"),
    "plain.html": (b"just words", "is no HTML.*rename it to .txt", "malformed"),
    "bytes.md": (b"caf\xe9 au lait", "is not UTF-8", "undecodable"),
    "binary.html": (b"<p>a\0b", "is binary", "undecodable"),
    "giant.txt": (b"word " * 7_000_000, "is larger than the 32 MiB.*Split it", "too_long"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_file_that_is_no_document_is_refused_by_name_and_counted_in_a_folder(tmp_path, name, caplog):
    data, said, reason = BAD[name]
    write(tmp_path, {name: data, "good.txt": "One good sentence."})
    with pytest.raises(DataError, match=f"{name}: {said}"):
        read(tmp_path / name, source="documents")
    rows, counts = read(tmp_path)
    assert [row.body for row in rows] == ["One good sentence."]
    assert counts == {"read": 2, reason: 1}
    assert f"{name}: " in caplog.text


def test_files_of_other_kinds_in_a_folder_are_counted_by_their_ending(tmp_path, caplog):
    names = ["a.pdf", "b.PDF", "sub/c.pdf", "d.docx", "e.docx", "LICENSE", ".hidden", "x.png", "y.css"]
    write(tmp_path, dict.fromkeys(names, b"x") | {"a.txt": b"A text."})
    assert len(read(tmp_path)[0]) == 1
    said = "left out 8 files of other kinds: 3 .pdf, 2 .docx, 1 no ending, ..."
    assert [record.message for record in caplog.records] == [said]
    caplog.clear()
    (tmp_path / "alone").mkdir()
    write(tmp_path / "alone", {"a.txt": b"A text."})
    read(tmp_path / "alone")
    assert not caplog.records


def test_what_is_not_there_and_what_does_not_fit(tmp_path, prepare):
    with pytest.raises(DataError, match="has no documents, only 1 file of other kinds. A folder's .txt, .md and .html"):
        read(write(tmp_path / "tables", {"corpus.jsonl": "{}"}))
    with pytest.raises(DataError, match=r"no passage is left of 1 document \(dropped: empty 1\)"):
        prepare(path=str(write(tmp_path / "empty", {"a.txt": ""})))
    with pytest.raises(DataError, match="is a folder of documents, and corpus.positive_column is for a table"):
        read(tmp_path, positive_column="answer")
    write(tmp_path, {"lines.txt": "a line"})
    for setting in ({"unit": "passage"}, {"passage_words": 50}, {"repel_within_document": True}):
        with pytest.raises(DataError, match=f"read row by row, and corpus.{next(iter(setting))} is for documents"):
            read(tmp_path / "lines.txt", **setting)


@pytest.mark.parametrize("settings", [{"positive_column": "q"}, {"near_duplicates": 2.0}, {"unit": "title"}])
def test_settings_that_contradict_documents(settings):
    from hncse_ray.config import load_settings

    with pytest.raises(SettingsError):
        load_settings({"corpus": {"source": "documents", "path": "x"} | settings})


def test_the_identity_follows_content_and_how_it_is_read(tmp_path):
    def identity(folder, **settings):
        return source_identity(CorpusSettings(path=str(folder), **settings))

    one = write(tmp_path / "one", {"a.txt": "Text.", "b.md": "More."})
    same = write(tmp_path / "two", {"a.txt": "Text.", "b.md": "More.", "c.csv": "not read"})
    other = write(tmp_path / "three", {"a.txt": "Text.", "b.txt": "More."})
    assert identity(one) == identity(same)
    ways = [{}, {"unit": "passage"}, {"passage_words": 50}, {"near_duplicates": None}, {"column": "t"}]
    assert len({identity(other), *(identity(one, **way) for way in ways)}) == 1 + len(ways)


def test_a_corpus_of_passages_knows_titles_bodies_and_what_follows(prepare, tmp_path):
    files = {"a.md": "# Wings\n\n" + sentences(0, 6), "b.txt": sentences(20, 3), "c.md": "# Lone title"}
    corpus = prepare(path=str(write(tmp_path / "docs", files)), passage_words=30, max_length=64)
    ids = range(len(corpus))
    assert corpus.has_passages
    assert corpus.titles(ids) == ["Wings", "Wings", None, "Lone title"]
    assert corpus.bodies(ids) == [sentences(0, 3), sentences(3, 3), sentences(20, 3), ""]
    assert corpus.texts([1, 3]) == [f"Wings. {sentences(3, 3)}", "Lone title"]
    assert corpus.next_in_document([0, 1, 2, 3]).tolist() == [1, -1, -1, -1]
    assert corpus.documents[0] == corpus.documents[1]
    assert len(set(corpus.documents.tolist())) == corpus.report.documents == 3
    assert (corpus.report.read, corpus.report.rows) == (3, 4)
    with pytest.raises(IndexError):
        corpus.next_in_document([4])


def test_a_corpus_of_lines_has_no_passages(prepare, tmp_path):
    corpus = prepare(path=str(write(tmp_path, {"lines.txt": "a line\nanother line"}) / "lines.txt"))
    assert not corpus.has_passages
    assert corpus.documents is None
    assert corpus.report.documents is None


def test_a_sample_is_of_whole_documents_in_their_order(prepare, tmp_path):
    folder = write(tmp_path / "docs", {f"{i:02}.txt": sentences(20 * i, 9) for i in range(12)})
    settings = {"path": str(folder), "passage_words": 30, "max_length": 64}
    whole = prepare(**settings)
    drawn = Counter()
    for seed in range(6):
        corpus = prepare(**settings, max_sentences=7, seed=seed)
        assert len(corpus) == 7
        assert corpus.report.dropped == {"not_sampled": 29}
        positions = [whole.texts(range(36)).index(text) for text in corpus.texts(range(7))]
        assert positions == sorted(positions)
        _, sizes = np.unique(corpus.documents, return_counts=True)
        assert sorted(sizes.tolist()) == [1, 3, 3]
        drawn.update(np.unique(corpus.documents).tolist())
    assert len(drawn) > 8
