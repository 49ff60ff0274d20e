"""Files at URLs: read on where a connection breaks, and what cannot be read is told with the URL and a way out."""

from __future__ import annotations

import gzip
from collections.abc import Iterator

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from object_stores import BUCKET, free_port
from web import Web, serve

from hncse_ray.config import CorpusSettings
from hncse_ray.corpus.documents import document_files
from hncse_ray.errors import DataError, HncseError
from hncse_ray.reading import expand_path, read_records, read_table, text_lines, urls
from hncse_ray.storage.remote import Remote

LINES = [f"line {i} of many" for i in range(20_000)]
TEXT = "\n".join(LINES).encode()


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Web]:
    monkeypatch.setattr(urls, "PAUSES_S", (0.0, 0.0))
    with serve(Web({"/a.txt": TEXT})) as web:
        yield web


def lines_at(url: str) -> list[str | None]:
    (file,) = expand_path(url)
    return list(text_lines(file))


@pytest.mark.parametrize("ranges", [True, False])
def test_it_is_read_on_where_a_connection_breaks(server: Web, ranges: bool) -> None:
    server.ranges = ranges
    server.breaks = [50_000, 1, 100_000]
    assert lines_at(f"{server.url}/a.txt") == LINES and not server.breaks
    last = server.asked[-1][1]
    assert last and int(last.removeprefix("bytes=")[:-1]) >= 50_001


def test_a_cut_file_is_never_taken_for_whole(server: Web) -> None:
    server.breaks = [50_000, 0, 0]
    with pytest.raises(DataError, match=r"a\.txt: cannot be read, 3 times \(it ends after 50,000 of its \d{3},\d{3} b"):
        lines_at(f"{server.url}/a.txt")
    packed = gzip.compress(TEXT)
    table = pa.BufferOutputStream()
    pq.write_table(pa.table({"text": LINES}), table)
    server.files = {"/b.txt.gz": packed[: len(packed) // 2], "/c.parquet": table.getvalue().to_pybytes()[:5000]}
    with pytest.raises(DataError, match=r"/b\.txt\.gz: is not a whole gzip file"):
        lines_at(f"{server.url}/b.txt.gz")
    with pytest.raises(DataError, match=r"/c\.parquet: is not a readable Parquet file"):
        list(read_records(*expand_path(f"{server.url}/c.parquet"), ["text"]))


def test_what_breaks_within_parquet_is_told_as_elsewhere(server: Web) -> None:
    table = pa.BufferOutputStream()
    pq.write_table(pa.table({"text": LINES}), table)
    server.files["/c.parquet"] = table.getvalue().to_pybytes()
    records = read_records(*expand_path(f"{server.url}/c.parquet"), ["text"])
    next(records)
    server.breaks = [10, *[0] * 9]
    (other,) = expand_path(f"{server.url}/c.parquet")
    with pytest.raises(DataError, match="it ends after"):
        list(read_records(other, ["text"]))


def test_a_file_that_changes_while_it_is_read(server: Web) -> None:
    (file,) = expand_path(f"{server.url}/a.txt")
    server.versions["/a.txt"] = "another"
    with pytest.raises(DataError, match="changed while it was read"):
        list(text_lines(file))


@pytest.mark.parametrize(
    ("change", "path", "said"),
    [
        ({}, "/b.txt", "/b.txt: no such file. Check the address"),
        ({"status": 403}, "/a.txt", "HTTP Error 403.*open to all"),
        ({"status": 503}, "/a.txt", "cannot be read, 3 times .*HTTP Error 503"),
        ({"headers": {"Content-Range": None}}, "/a.txt", "comes without its length"),
        ({"headers": {"Content-Type": "text/html; charset=utf-8"}}, "/a.txt", "is a web page"),
        ({"silent_s": 0.5}, "/a.txt", "no byte came within 0.1 s, 3 times"),
        ({}, "/", "Name its files"),
        ({}, "/*.txt", "Name its files"),
        ({}, "/a.txt?key=secret", "has a user, a password, a query or a fragment"),
    ],
)
def test_what_a_web_server_does_not_give(
    server: Web, change: dict, path: str, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(urls, "PATIENCE_S", 0.1 if "silent_s" in change else 30.0)
    for name, value in change.items():
        setattr(server, name, value)
    with pytest.raises(DataError, match=said) as caught:
        lines_at(server.url + path)
    assert caught.value.hint and "secret" not in str(caught.value)
    assert len(server.asked) == (3 if "3 times" in said else 0 if "Name" in said or "query" in said else 1)


def test_an_empty_file(server: Web) -> None:
    server.files["/a.txt"] = b""
    with pytest.raises(DataError, match="/a.txt: is empty"):
        lines_at(f"{server.url}/a.txt")


@pytest.mark.parametrize(
    ("url", "said"),
    [
        ("http://127.0.0.1:PORT/a.txt", "cannot be read, 3 times .*refused"),
        ("http://no-such-host.invalid/a.txt", "cannot be read.*[Nn]ame"),
        ("https://me:secret@host/a.txt", r"https://\.\.\./a.txt: has a user, a password"),
        ("s3://key:secret@bucket/a.txt", r"s3://\.\.\./a.txt: has a user, a password.*AWS_SECRET_ACCESS_KEY"),
        ("https://secret@host/a.txt", r"https://\.\.\./a.txt: has a user"),
        ("https://me:secret[@host/a.txt", r"https://\.\.\./a.txt: is no URL"),
        ("file://[host/a.txt", "is no URL"),
        ("s3://key:sec/secret@bucket/a.txt", r"s3://\.\.\./a.txt: has a user, a password"),
        ("file://host/a.txt", "of another machine"),
        ("nonsense://x/a.txt", "nonsense"),
        ("s3:///a.txt", "names no bucket"),
    ],
)
def test_a_url_that_leads_nowhere(url: str, said: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(urls, "PAUSES_S", (0.0, 0.0))
    with pytest.raises(HncseError, match=said) as caught:
        expand_path(url.replace("PORT", str(free_port())))
    assert caught.value.hint and "secret" not in str(caught.value)


def test_globs_and_folders(remote: Remote) -> None:
    for name in ("x/b.txt", "x/a.txt", "x/a.tsv", "x/y/c.md", "x/.hidden.md", "x/d [1] %.txt"):
        remote.write(name, b"text\tother\na\tb\n")

    def names(pattern: str) -> list[str]:
        return [str(file).rpartition("/x/")[2] for file in expand_path(f"{remote.url}/{pattern}")]

    assert names("x/*.txt") == ["a.txt", "b.txt", "d [1] %.txt"]
    assert names("x/**/*.md")[-1] == "y/c.md"
    assert names("x/[a-b].txt") == ["a.txt", "b.txt"] and names("x/d [1] %.txt") == ["d [1] %.txt"]
    settings = CorpusSettings(path=f"{remote.url}/x/")
    assert document_files(settings) == ["a.txt", "b.txt", "d [1] %.txt", "y/c.md"]
    (table,) = expand_path(f"{remote.url}/x/a.tsv")
    assert list(read_table(table, ["text"])) == [(2, ("a",))]


def test_what_a_bucket_does_not_have(amazon: None) -> None:
    Remote(f"s3://{BUCKET}/there").write("a.txt", b"1")
    for url, said in {
        f"s3://{BUCKET}/there/b.txt": "no such file. .*AWS_ACCESS_KEY_ID",
        f"s3://{BUCKET}/there": r"is a folder, not a file\. .*there/\*\.parquet",
        f"s3://{BUCKET}/there/*.tsv": "matches no file",
        f"s3://{BUCKET}/gone/": "has no file",
        "s3://no-such-bucket/a.txt": "AWS_ACCESS_KEY_ID",
    }.items():
        with pytest.raises(DataError, match=said):
            expand_path(url)
