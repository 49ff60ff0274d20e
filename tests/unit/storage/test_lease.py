"""Who is at work at a URL: a live holder is respected, a dead one is not, and a holder that lost learns it."""

from __future__ import annotations

import json
import logging
import time
from pathlib import Path

import pytest

from hncse_ray.errors import StorageError
from hncse_ray.storage import Lease, LeaseLost, Remote, check_lease

BEAT_S, STALE_S = 0.2, 3.0


def lease(remote: Remote, folder: Path) -> Lease:
    return Lease(remote, folder, beat_s=BEAT_S, stale_s=STALE_S, settle_s=0.1)


def leave(remote: Remote, **facts: object) -> None:
    """Leave the lease of a process that is dead."""
    content = {"token": "x", "machine": "m", "host": "elsewhere", "pid": 7, "beat": 3, "time": time.time()}
    remote.write("lease.json", json.dumps(content | facts).encode())


def test_it_is_held_until_it_is_released(remote: Remote, tmp_path: Path) -> None:
    first = lease(remote, tmp_path / "a")
    first.acquire()
    check_lease(remote, first.token)
    started = time.monotonic()
    with pytest.raises(StorageError, match=r"is in use by another process on .* \(process \d+\)") as caught:
        lease(remote, tmp_path / "b").acquire()
    assert time.monotonic() - started < STALE_S and caught.value.hint
    first.release()
    assert remote.names() == []
    second = lease(remote, tmp_path / "b")
    second.acquire()
    second.release()


def test_one_that_shows_no_life_is_taken_over_and_it_is_said(
    remote: Remote, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    leave(remote, time=time.time() + 500)  # a clock that is ahead is no sign of life
    mine = lease(remote, tmp_path)
    started = time.monotonic()
    with caplog.at_level(logging.WARNING):
        mine.acquire()
    assert STALE_S <= time.monotonic() - started < 3 * STALE_S
    assert "over from a process on elsewhere that shows no life" in caplog.text
    mine.release()


def test_one_of_long_ago_is_taken_over_at_once(remote: Remote, tmp_path: Path) -> None:
    leave(remote, time=time.time() - 7200)
    started = time.monotonic()
    mine = lease(remote, tmp_path)
    mine.acquire()
    assert time.monotonic() - started < STALE_S
    mine.release()


def test_one_of_a_process_that_died_in_this_very_folder_is_taken_over_at_once(remote: Remote, tmp_path: Path) -> None:
    dead = lease(remote, tmp_path)
    dead._write()
    started = time.monotonic()
    mine = lease(remote, tmp_path)
    mine.acquire()
    assert time.monotonic() - started < STALE_S
    mine.release()


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b'{"time": "x"}', b"\xff"])
def test_one_that_cannot_be_read_is_watched_like_any_other(remote: Remote, tmp_path: Path, content: bytes) -> None:
    remote.write("lease.json", content)
    mine = lease(remote, tmp_path)
    mine.acquire()
    check_lease(remote, mine.token)
    mine.release()


def test_one_that_was_read_by_half_is_not_a_sign_that_another_took_over(
    remote: Remote, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mine = lease(remote, tmp_path)
    mine.acquire()
    whole, really, reads = len(remote.read("lease.json") or b""), Remote.read, []

    def read_by_half(self: Remote, name: str) -> bytes | None:
        content = really(self, name)
        reads.append(content)
        return content[:30] if content and len(reads) % 3 == 1 else content

    monkeypatch.setattr(Remote, "read", read_by_half)
    for _ in range(5):
        check_lease(remote, mine.token)
        time.sleep(BEAT_S)
    monkeypatch.setattr(Remote, "read", really)
    before = remote.read("lease.json")
    assert before is not None and len(before) == whole
    time.sleep(4 * BEAT_S)
    assert remote.read("lease.json") != before  # it goes on beating
    mine.release()


def test_of_two_who_take_over_at_once_one_gives_way(
    remote: Remote, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    leave(remote, time=0)
    mine, really = lease(remote, tmp_path), Lease._write

    def write_then_be_overwritten(self: Lease) -> None:
        really(self)
        leave(remote, token="other", host="rival")

    monkeypatch.setattr(Lease, "_write", write_then_be_overwritten)
    with pytest.raises(StorageError, match="in use by another process on rival"):
        mine.acquire()


def test_a_holder_that_was_taken_over_learns_it_and_leaves_the_other_s_alone(remote: Remote, tmp_path: Path) -> None:
    mine = lease(remote, tmp_path)
    mine.acquire()
    leave(remote, token="other")
    time.sleep(4 * BEAT_S)
    with pytest.raises(LeaseLost, match="was taken over"):
        check_lease(remote, mine.token)
    mine.release()
    assert json.loads(remote.read("lease.json") or b"")["token"] == "other"


def test_it_survives_an_outage(remote: Remote, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mine, really, failures = lease(remote, tmp_path), Remote.write, []
    mine.acquire()

    def fail(self: Remote, name: str, content: bytes) -> None:
        failures.append(name)
        raise StorageError("no connection", self.url)

    monkeypatch.setattr(Remote, "write", fail)
    end = time.monotonic() + 30
    while len(failures) < 2 and time.monotonic() < end:
        time.sleep(0.05)
    assert len(failures) >= 2
    before = remote.read("lease.json")
    monkeypatch.setattr(Remote, "write", really)
    while remote.read("lease.json") == before and time.monotonic() < end:
        time.sleep(0.05)
    assert remote.read("lease.json") != before
    mine.release()
