import gzip
import io
import sys

import pytest

from hncse_ray.errors import DataError
from hncse_ray.reading import is_blank, read_lines, read_records, text_lines


def write(path, data):
    path.write_bytes(data)
    return path


def test_lines_keep_their_place_whatever_ends_them(tmp_path):
    data = "one\n\n two \r\nthree\rfour\u2028still\x85four\n\nlast".encode("utf-8-sig")
    expected = ["one", "", " two ", "three", "four\u2028still\x85four", "", "last"]
    assert read_lines(write(tmp_path / "a.txt", data)) == expected
    assert read_lines(write(tmp_path / "a.gz", gzip.compress(data))) == expected


@pytest.mark.parametrize("end", [b"\n", b"\r\n", b"\r", b""])
@pytest.mark.parametrize("length", range(8, 13))
def test_the_limit_counts_characters_without_the_end(tmp_path, end, length):
    line = "\u00e9" * length
    path = write(tmp_path / "a.txt", line.encode() + end + b"x")
    first, *rest = text_lines(path, limit=10)
    if end:
        assert (first, rest) == (line if length <= 10 else None, ["x"])
    else:
        assert (first, rest) == (line + "x" if length < 10 else None, [])


def test_what_is_not_utf8_names_its_line(tmp_path):
    with pytest.raises(DataError, match=r"a\.txt:3: is not UTF-8"):
        read_lines(write(tmp_path / "a.txt", b"one\rtwo\r\n\xe9\nfour"))


@pytest.mark.parametrize("mark", ["utf-16-le", "utf-16-be"])
def test_utf16_is_named(tmp_path, mark):
    data = "\ufefftext,title\nA sentence.,b\n".encode(mark)
    for name, content in (("a.txt", data), ("a.txt.gz", gzip.compress(data))):
        with pytest.raises(DataError, match=r"a\.txt.*: is UTF-16, not UTF-8\. Convert it"):
            read_lines(write(tmp_path / name, content))
    with pytest.raises(DataError, match=r"a\.csv: is UTF-16"):
        [*read_records(write(tmp_path / "a.csv", data), ["text"])]


def test_standard_input_stays_open(monkeypatch):
    stream = io.TextIOWrapper(io.BytesIO(b"one\ntwo"))
    monkeypatch.setattr(sys, "stdin", stream)
    assert read_lines(None) == ["one", "two"]
    assert not stream.buffer.closed


def test_another_encoding(tmp_path):
    assert read_lines(write(tmp_path / "a", b"caf\xe9\n"), encoding="latin-1") == ["caf\u00e9"]


@pytest.mark.parametrize(
    "text", ["", " ", "\u200b", "\ufeff\u2060", "\ue000", "\u3164", "\u2800", "\u0301", "\x01\x7f", "\u00ad"]
)
def test_nothing_to_see(text):
    assert is_blank(text)


@pytest.mark.parametrize("text", ["a", "\u200ba", "1", ".", "\u4f60", "\U0001f600", "\u0915\u094d", "+"])
def test_something_to_see(text):
    assert not is_blank(text)
