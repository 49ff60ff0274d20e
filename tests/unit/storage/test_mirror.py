"""Folders at a URL are whole or not there; sending goes on behind the back of the caller, and through failures."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from waits import seconds, soon

from hncse_ray.errors import StorageError
from hncse_ray.storage import (
    Damaged,
    LeaseLost,
    Remote,
    Uploader,
    delete_folder,
    fetch_folder,
    keep_trying,
    send_folder,
    whole_folders,
)


def fill(folder: Path, **files: str) -> Path:
    folder.mkdir(parents=True)
    (folder / "sub").mkdir()
    (folder / "sub/inner.txt").write_text("inner")
    for name, text in files.items():
        (folder / name).write_text(text)
    return folder


def listing(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


class TestFolders:
    def test_one_comes_back_as_it_was_sent(self, remote: Remote, tmp_path: Path) -> None:
        sent = fill(tmp_path / "here", weights="w" * 100_000, empty="")
        send_folder(remote, "checkpoints/step_1", sent)
        assert whole_folders(remote, "checkpoints") == ["step_1"]
        assert fetch_folder(remote, "checkpoints/step_1", tmp_path / "there/step_1")
        assert listing(tmp_path / "there") == {f"step_1/{name}": data for name, data in listing(sent).items()}
        assert not fetch_folder(remote, "checkpoints/step_1", tmp_path / "there/step_1")

    def test_a_local_one_that_differs_is_replaced(self, remote: Remote, tmp_path: Path) -> None:
        send_folder(remote, "model", fill(tmp_path / "here", weights="right"))
        fill(tmp_path / "there", weights="wrong", more="more")
        assert fetch_folder(remote, "model", tmp_path / "there")
        assert listing(tmp_path / "there") == listing(tmp_path / "here")

    def test_sending_again_replaces_all_of_it(self, remote: Remote, tmp_path: Path) -> None:
        send_folder(remote, "model", fill(tmp_path / "old", weights="old", gone="gone"))
        send_folder(remote, "model", fill(tmp_path / "new", weights="new"))
        fetch_folder(remote, "model", tmp_path / "back")
        assert listing(tmp_path / "back") == listing(tmp_path / "new")
        assert "model/gone" not in remote.names()

    def test_one_that_was_sent_by_half_is_not_there(
        self, remote: Remote, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        send_folder(remote, "checkpoints/step_1", fill(tmp_path / "one", weights="one"))
        send_folder(remote, "checkpoints/step_2", fill(tmp_path / "two", weights="two"))
        uploads, really = [], Remote.upload

        def break_off(self: Remote, file: Path, name: str) -> None:
            uploads.append(name)
            if len(uploads) == 2:
                raise StorageError("the connection is gone", self.url)
            really(self, file, name)

        monkeypatch.setattr(Remote, "upload", break_off)
        for name in ("step_2", "step_3"):  # over a whole one, and a new one
            uploads.clear()
            with pytest.raises(StorageError, match="gone"):
                send_folder(remote, f"checkpoints/{name}", tmp_path / "two")
            assert whole_folders(remote, "checkpoints") == ["step_1"]
            with pytest.raises(Damaged, match="not sent to the end"):
                fetch_folder(remote, f"checkpoints/{name}", tmp_path / "back")
        assert not (tmp_path / "back").exists()

    @pytest.mark.parametrize("content", [b"on", b"onE", b"one more"])
    def test_a_damaged_one_is_told(self, remote: Remote, tmp_path: Path, content: bytes) -> None:
        send_folder(remote, "model", fill(tmp_path / "here", weights="one"))
        remote.write("model/weights", content)
        with pytest.raises(Damaged, match=r"is damaged \(weights differs from what was sent\)"):
            fetch_folder(remote, "model", tmp_path / "there")
        assert sorted(path.name for path in tmp_path.iterdir() if path.name.startswith((".", "there"))) == []

    @pytest.mark.parametrize(
        "manifest",
        [
            b"",
            b"{",
            b"[]",
            b'{"files": {"a": 1}}',
            b"\xff",
            *(
                json.dumps({"files": {name: [1, "x"]}}).encode()
                for name in ("../a", "/a", "", ".", "a//b", "a/./b", "a\0", "\ud800")
            ),
        ],
    )
    def test_a_damaged_manifest_is_told(self, remote: Remote, tmp_path: Path, manifest: bytes) -> None:
        send_folder(remote, "model", fill(tmp_path / "here", weights="one"))
        remote.write("model.manifest.json", manifest)
        with pytest.raises(Damaged):
            fetch_folder(remote, "model", tmp_path / "there")

    @pytest.mark.parametrize("name", ["", ".", "..", "step_", "step_x", "step_1x", "a/step_1"])
    def test_what_others_have_named_otherwise_is_none(self, remote: Remote, tmp_path: Path, name: str) -> None:
        send_folder(remote, "checkpoints/step_1", fill(tmp_path / "one", weights="one"))
        remote.write(f"checkpoints/{name}.manifest.json", b'{"files": {}}')
        assert whole_folders(remote, "checkpoints") == ["step_1"]

    def test_a_deleted_one_leaves_nothing(self, remote: Remote, tmp_path: Path) -> None:
        for number in (1, 2, 10):
            send_folder(remote, f"checkpoints/step_{number:03}", fill(tmp_path / str(number), n=str(number)))
        delete_folder(remote, "checkpoints/step_002")
        assert whole_folders(remote, "checkpoints") == ["step_010", "step_001"]
        assert not [name for name in remote.names() if "step_002" in name]


class Notices(list[str]):
    def __call__(self, text: str) -> None:
        self.append(text)


@pytest.fixture
def notices() -> Notices:
    return Notices()


@pytest.fixture
def uploader(notices: Notices) -> Uploader:
    return Uploader("s3://x/run", "/local/run", notices, first_pause_s=0.01)


def failing(times: int, done: list[str]) -> Callable[[], None]:
    left = iter(range(times))

    def send() -> None:
        if next(left, None) is not None:
            raise StorageError("no connection", "s3://x")
        done.append("sent")

    return send


class TestUploader:
    def test_the_caller_does_not_wait_and_only_the_latest_is_kept(self, uploader: Uploader) -> None:
        begun, free, sent = threading.Event(), threading.Event(), []

        def slow() -> None:
            begun.set()
            free.wait(seconds(30))
            sent.append("1")

        uploader.submit("1", slow)
        assert begun.wait(seconds(30))
        started = time.monotonic()
        for name in "234":
            uploader.submit(name, lambda name=name: sent.append(name))  # type: ignore[misc]
        assert time.monotonic() - started < seconds(1) and uploader.sending == "1"
        free.set()
        uploader.finish(seconds(30))
        assert sent == ["1", "4"] and uploader.sending is None

    def test_a_failure_is_said_once_and_tried_again(self, uploader: Uploader, notices: Notices) -> None:
        done: list[str] = []
        uploader.submit("step 4", failing(4, done))
        uploader.finish(seconds(30))
        assert done == ["sent"]
        soon(lambda: len(notices) >= 2, within_s=30, what="the second notice")  # just after the end
        assert "step 4 could not be stored yet" in notices[0] and "no connection" in notices[0]
        assert notices[1:] == ["step 4 is stored; the storage works again"]

    def test_what_fails_gives_way_to_what_is_later(self, uploader: Uploader) -> None:
        done: list[str] = []
        uploader.submit("1", failing(10**9, done))
        time.sleep(0.05)
        uploader.submit("2", lambda: done.append("2"))
        uploader.finish(seconds(30))
        assert done == ["2"]

    def test_what_cannot_be_sent_to_the_end_is_an_error_that_says_where_it_is(self, uploader: Uploader) -> None:
        uploader.submit("1", failing(10**9, []))
        with pytest.raises(StorageError) as caught:
            uploader.finish(0.3)
        assert "no connection" in str(caught.value) and "all of it is in /local/run" in str(caught.value)

    def test_whatever_is_raised_the_thread_lives(self, uploader: Uploader, notices: Notices) -> None:
        done: list[str] = []
        uploader.submit("1", lambda: done.append("x") if done else (done.append("y"), 1 / 0))  # type: ignore[func-returns-value]
        uploader.finish(seconds(30))
        assert done == ["y", "x"] and "division by zero" in notices[0]

    def test_a_run_that_was_taken_over_sends_no_more(self, uploader: Uploader) -> None:
        def lost() -> None:
            raise LeaseLost("was taken over", "s3://x")

        uploader.submit("1", lost)
        with pytest.raises(LeaseLost):
            uploader.finish(seconds(30))
        with pytest.raises(LeaseLost):
            uploader.submit("2", lambda: None)


def test_trying_goes_on_for_a_time_and_no_longer() -> None:
    done: list[str] = []
    keep_trying(failing(3, done), timeout_s=seconds(30), first_pause_s=0.01)
    assert done == ["sent"]
    with pytest.raises(StorageError, match="no connection"):
        keep_trying(failing(10**9, done), timeout_s=0.1, first_pause_s=0.01)
