"""A folder at a URL: what is written is read back, what is not there is told from what cannot be reached."""

from __future__ import annotations

import pickle
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from pyarrow.fs import FileSelector, FileType

from hncse_ray.errors import StorageError
from hncse_ray.storage.remote import Remote, is_url


def test_a_url_is_told_from_a_folder() -> None:
    assert is_url("s3://bucket/x") and is_url("file:///x") and not is_url("/mnt/x") and not is_url("runs")


def test_what_is_written_is_read_back(remote: Remote, tmp_path: Path) -> None:
    assert remote.read("a/b.txt") is None and remote.names() == []
    remote.write("a/b.txt", b"one")
    remote.write("a/b.txt", b"two")
    (tmp_path / "local").write_bytes(b"x" * 3_000_000)
    remote.upload(tmp_path / "local", "a/c/d.bin")
    remote.upload(tmp_path / "local", "ab.bin")
    assert remote.read("a/b.txt") == b"two"
    assert remote.names() == ["a/b.txt", "a/c/d.bin", "ab.bin"]
    assert remote.names("a") == ["a/b.txt", "a/c/d.bin"]
    remote.download("a/c/d.bin", tmp_path / "back")
    assert (tmp_path / "back").read_bytes() == b"x" * 3_000_000
    remote.delete("a/c/d.bin")
    remote.delete("a/c/d.bin")
    assert remote.names("a") == ["a/b.txt"]


@pytest.mark.parametrize("name", ["../x", "a/../../x", "..", ".", "a//b", "/x", "a\nb", "\ud800"])
def test_a_name_that_is_no_path_below_is_not_listed(remote: Remote, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """No client writes such keys, but a bucket may hold them."""
    remote.write("a.txt", b"1")
    files, odd = remote._files, SimpleNamespace(path=name, type=FileType.File)

    class Listing:
        def get_file_info(self, selector: FileSelector) -> list[Any]:
            return [odd, *files.get_file_info(selector)]

    monkeypatch.setattr(remote, "_files", Listing())
    assert remote.names() == ["a.txt"]


def test_it_travels_as_its_url(remote: Remote) -> None:
    remote.write("a.txt", b"1")
    assert pickle.loads(pickle.dumps(remote)).read("a.txt") == b"1"


@pytest.mark.parametrize(
    ("url", "said"),
    [
        ("nonsense://x/y", "nonsense"),
        ("s3://", "names no bucket"),
        ("s3:///run", "names no bucket"),
        ("s3://bucket/x?endpoint_override=secret", "s3://bucket/x: has a user, a password, a query or a fragment"),
        ("s3://key:secret[@bucket/x", "s3://.../x: is no URL"),
        ("s3://key:secret@bucket/x", "AWS_SECRET_ACCESS_KEY"),
        ("oss://bucket/x", "Install what fsspec needs for oss://"),
    ],
)
def test_a_url_that_cannot_be_opened_is_named(url: str, said: str) -> None:
    with pytest.raises(StorageError) as caught:
        Remote(url)
    assert said in str(caught.value) and caught.value.hint and "secret" not in str(caught.value)


def test_a_bucket_that_is_not_there_is_named(amazon: None) -> None:
    with pytest.raises(StorageError, match=r"s3://no-such-bucket/run/a\.txt"):
        Remote("s3://no-such-bucket/run").write("a.txt", b"1")


def test_a_server_that_is_not_there_is_named(monkeypatch: pytest.MonkeyPatch, amazon: None) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    with pytest.raises(StorageError, match=r"cannot be read .*127\.0\.0\.1"):
        Remote("s3://bucket/run").read("settings.yaml")
