"""Who is at work at a URL: a live holder is respected, a dead one is not, and a holder that lost learns it."""

from __future__ import annotations

import json
import logging
import os
import random
import socket
import threading
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack
from pathlib import Path
from typing import Any

import pytest
from waits import seconds, soon

from hncse_ray.errors import StorageError
from hncse_ray.storage.lease import Lease, leased
from hncse_ray.storage.remote import Remote
from hncse_ray.storage.sending import LeaseLost

BEAT_S, STALE_S = seconds(0.2), seconds(3.0)  # a live one must come to beat in time
DEAD_S = 0.5


@pytest.fixture
def nobody_lives(quicker: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hncse_ray.storage.lease.STALE_S", DEAD_S)


@pytest.fixture(autouse=True)
def quicker(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hncse_ray.storage.lease.BEAT_S", BEAT_S)
    monkeypatch.setattr("hncse_ray.storage.lease.STALE_S", STALE_S)


def lease(remote: Remote, folder: Path) -> AbstractContextManager[Lease]:
    folder.mkdir(parents=True, exist_ok=True)
    return leased(remote, folder)


def leave(remote: Remote, **facts: object) -> None:
    """Leave the lease of a process that is dead."""
    content = {"host": "elsewhere", "pid": 7, "time": time.time()}
    remote.write("lease.dead.json", json.dumps(content | facts).encode())


def take_over(remote: Remote, lost: Lease) -> None:
    """Do what a process does that takes a lease over."""
    remote.write("lease.other.json", b"{}")
    remote.delete(lost.name)


def test_it_is_held_until_it_is_released(remote: Remote, tmp_path: Path) -> None:
    with lease(remote, tmp_path / "a") as first:
        first.check()
        started = time.monotonic()
        with (
            pytest.raises(StorageError, match=r"is in use by another process on .* \(process \d+\)") as caught,
            lease(remote, tmp_path / "b"),
        ):
            pytest.fail("both have it")
        assert time.monotonic() - started < STALE_S and caught.value.hint
    assert remote.names() == []
    with lease(remote, tmp_path / "b"):
        pass


def test_one_that_shows_no_life_is_taken_over_and_it_is_said(
    remote: Remote, tmp_path: Path, caplog: pytest.LogCaptureFixture, nobody_lives: None
) -> None:
    leave(remote, time=time.time() + 500)  # a clock that is ahead is no sign of life
    started = time.monotonic()
    with caplog.at_level(logging.WARNING), lease(remote, tmp_path) as mine:
        assert time.monotonic() - started >= DEAD_S and remote.names() == [mine.name]
    assert "over from another process on elsewhere (process 7) that shows no life" in caplog.text


def test_one_of_long_ago_is_taken_over_at_once(remote: Remote, tmp_path: Path) -> None:
    leave(remote, time=time.time() - 7200)
    started = time.monotonic()
    with lease(remote, tmp_path):
        assert time.monotonic() - started < STALE_S


def test_one_of_a_process_that_died_in_this_very_folder_is_taken_over_at_once(remote: Remote, tmp_path: Path) -> None:
    with lease(remote, tmp_path) as dead:
        content = remote.read(dead.name)
    assert content is not None
    remote.write(dead.name, content)
    started = time.monotonic()
    with lease(remote, tmp_path):
        assert time.monotonic() - started < STALE_S


def test_so_is_it_after_a_start_that_failed(remote: Remote, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with lease(remote, tmp_path) as dead:
        content = remote.read(dead.name)
    assert content is not None
    remote.write(dead.name, content)
    with monkeypatch.context() as patch:
        patch.setattr(Remote, "names", lambda self: (_ for _ in ()).throw(StorageError("no connection", self.url)))
        with pytest.raises(StorageError, match="no connection"), lease(remote, tmp_path):
            pytest.fail("it was had")
    monkeypatch.setattr("hncse_ray.storage.lease.STALE_S", 3600)
    with lease(remote, tmp_path) as mine:
        assert remote.names() == [mine.name]


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b'{"time": "x"}', b"\xff"])
def test_one_that_cannot_be_read_is_watched_like_any_other(
    remote: Remote, tmp_path: Path, content: bytes, nobody_lives: None
) -> None:
    remote.write("lease.json", content)
    with lease(remote, tmp_path) as mine:
        mine.check()


class Turns:
    """Lets two threads use the storage in an order that is given, one operation at a time; later as it comes."""

    def __init__(self, order: list[int]) -> None:
        self._order, self._ended = order, set[int]()
        self._changed = threading.Condition()

    def remote(self, remote: Remote, number: int) -> Remote:
        """The same place for one of the threads."""
        copy = Remote(remote.url)
        for name in ("read", "write", "names", "delete"):
            setattr(copy, name, self._in_turn(getattr(copy, name), number))
        return copy

    def _in_turn(self, operation: Callable[..., Any], number: int) -> Callable[..., Any]:
        def run(*args: Any) -> Any:
            with self._changed:
                assert self._changed.wait_for(
                    lambda: not self._order or self._order[0] == number or self._order[0] in self._ended, seconds(60)
                )
                if self._order:
                    self._order.pop(0)
                try:
                    return operation(*args)
                finally:
                    self._changed.notify_all()

        return run

    def end(self, number: int) -> None:
        with self._changed:
            self._ended.add(number)
            self._changed.notify_all()


def start_two(remote: Remote, folder: Path, order: list[int], held: ExitStack) -> list[Lease | StorageError]:
    """Have two processes of different machines start at once; return the lease of each, or why it was refused."""
    turns, results = Turns(order), list[Lease | StorageError | None]([None, None])

    def start(number: int) -> None:
        try:
            results[number] = held.enter_context(lease(turns.remote(remote, number), folder / str(number)))
        except StorageError as error:
            results[number] = error
        finally:
            turns.end(number)

    threads = [threading.Thread(target=start, args=(number,)) for number in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert None not in results
    return results  # type: ignore[return-value]


# In which order two starters read, write and look: in step, one far ahead, and at random.
ORDERS = [[0, 1] * 20, [0] + [1] * 20, [0, 0] + [1] * 20, [0] * 3 + [1] * 20, [0] * 4 + [1] * 20]
ORDERS += [random.Random(seed).choices([0, 1], k=40) for seed in range(8)]


@pytest.mark.parametrize("is_left", [False, True], ids=["nobody has it", "a dead one has it"])
def test_of_two_who_start_at_once_one_gets_it(
    remote: Remote, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, is_left: bool
) -> None:
    monkeypatch.setattr("hncse_ray.storage.lease._PAUSE_S", 0.05)
    for number, order in enumerate(ORDERS):
        if is_left:
            leave(remote, time=0)
        with ExitStack() as stack:
            results = start_two(remote, tmp_path / str(number), list(order), stack)
            held = [result for result in results if isinstance(result, Lease)]
            refused = [str(result) for result in results if isinstance(result, StorageError)]
            assert len(held) == len(refused) == 1, (order, results)
            assert f"is in use by another process on {socket.gethostname()} (process {os.getpid()})" in refused[0]
            held[0].check()
            assert remote.names() == [held[0].name]
        assert remote.names() == []


def test_a_holder_that_was_taken_over_learns_it_and_leaves_the_other_s_alone(
    remote: Remote, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING), lease(remote, tmp_path) as mine:
        take_over(remote, mine)
        soon(lambda: "was taken over" in caplog.text, within_s=30, what="the end of its beats")
        with pytest.raises(LeaseLost, match="was taken over"):
            mine.check()
    assert remote.names() == ["lease.other.json"]


def test_a_lease_that_one_who_was_asleep_wrote_once_more_is_removed(remote: Remote, tmp_path: Path) -> None:
    leave(remote, time=0)
    with lease(remote, tmp_path) as mine:
        leave(remote)
        soon(lambda: remote.names() == [mine.name], within_s=30, what="its removal")


def test_it_survives_an_outage(remote: Remote, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    really, failures = Remote.write, list[str]()

    def fail(self: Remote, name: str, content: bytes) -> None:
        failures.append(name)
        raise StorageError("no connection", self.url)

    with lease(remote, tmp_path) as mine:
        monkeypatch.setattr(Remote, "write", fail)
        soon(lambda: len(failures) >= 2, within_s=30, what="two beats that fail")
        before = remote.read(mine.name)
        monkeypatch.setattr(Remote, "write", really)
        soon(lambda: remote.read(mine.name) != before, within_s=30, what="a beat")
