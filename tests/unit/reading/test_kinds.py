import pytest

from hncse_ray.errors import DataError
from hncse_ray.reading import kind_of
from hncse_ray.reading.kinds import is_missing


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("a.txt", "text"), ("a.txt.gz", "text"), ("a", "text"), ("a.gz", "text"), ("news.2020.en", "text"),
        ("a.jsonl", "jsonl"), ("a.ndjson.gz", "jsonl"), ("a.json", "jsonl"), ("A.JSONL", "jsonl"),
        ("a.csv", "csv"), ("a.CSV.GZ", "csv"), ("a.tsv", "tsv"), ("a.tab", "tsv"), ("v1.2.tsv.gz", "tsv"),
        ("a.parquet", "parquet"), ("a.parq", "parquet"), ("a.pq", "parquet"),
    ],
)  # fmt: skip
def test_the_ending_says_the_kind(name, kind):
    assert kind_of(f"folder.csv/{name}") == kind
    assert kind_of(name, {"tsv": "csv"}.get(kind, kind)) == kind


@pytest.mark.parametrize("source", ["text", "jsonl", "csv", "parquet"])
def test_where_the_ending_says_nothing_the_source_does(source):
    assert kind_of("rows.dump", source) == kind_of("rows.zst", source) == source


@pytest.mark.parametrize(
    ("name", "source"),
    [("a.jsonl", "text"), ("a.txt", "jsonl"), ("a.csv", "parquet"), ("a.tsv", "text"), ("a.jsonl.gz", "csv")],
)
def test_a_contradiction_is_refused(name, source):
    with pytest.raises(DataError, match=rf"{name}: ends in .*corpus.source is '{source}'. Set corpus.source=auto"):
        kind_of(name, source)


@pytest.mark.parametrize("name", ["a.jsonl.zst", "a.xlsx", "a.zip", "a.tar.gz", "a.PDF"])
def test_what_is_not_read_is_not_taken_for_text(name):
    with pytest.raises(DataError, match="unknown kind"):
        kind_of(name)


def test_parquet_inside_gzip():
    with pytest.raises(DataError, match="Parquet inside gzip"):
        kind_of("a.parquet.gz")


def test_what_may_be_elsewhere_is_not_missing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "there.txt").write_text("x")
    assert is_missing("none.txt") and is_missing(str(tmp_path / "none")) and is_missing("~/no such folder/a.txt")
    assert not any(map(is_missing, ["there.txt", str(tmp_path), "*.none", "a[1].txt", "s3://bucket/a.txt"]))
