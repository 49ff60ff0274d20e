"""Sending goes on behind the back of the caller, and through failures."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

import pytest
from waits import seconds, soon

from hncse_ray.errors import StorageError
from hncse_ray.storage.sending import LeaseLost, Sender, keep_trying


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hncse_ray.storage.sending._FIRST_PAUSE_S", 0.01)


def failing(times: int, done: list[str]) -> Callable[[], None]:
    left = iter(range(times))

    def send() -> None:
        if next(left, None) is not None:
            raise StorageError("no connection", "s3://x")
        done.append("sent")

    return send


class TestSender:
    def test_the_caller_does_not_wait_and_what_comes_meanwhile_is_sent_at_once(self) -> None:
        begun, free, sent, there = threading.Event(), threading.Event(), list[list[str]](), ["1"]

        def slow() -> None:
            now = list(there)
            begun.set()
            free.wait(seconds(30))
            sent.append(now)

        sender = Sender(slow, pytest.fail)
        sender.wake()
        assert begun.wait(seconds(30))
        started = time.monotonic()
        for name in "234":
            there.append(name)
            sender.wake()
        assert time.monotonic() - started < seconds(1)
        free.set()
        sender.finish(seconds(30))
        assert sent[0] == ["1"] and sent[1] == sent[-1] == ["1", "2", "3", "4"] and len(sent) <= 3

    def test_a_failure_is_said_once_and_tried_again(self) -> None:
        done, notices = list[str](), list[str]()
        sender = Sender(failing(4, done), notices.append)
        sender.wake()
        sender.finish(seconds(30))
        assert done == ["sent"]
        assert "the storage fails, and is tried again" in notices[0] and "no connection" in notices[0]
        assert notices[1:] == ["the storage works again"]

    def test_what_cannot_be_sent_to_the_end_is_an_error_and_the_thread_ends(self) -> None:
        notices = list[str]()
        sender = Sender(failing(10**9, []), notices.append)
        sender.wake()
        with pytest.raises(TimeoutError):
            sender.finish(0.3)
        soon(
            lambda: not [t for t in threading.enumerate() if t.name.startswith("uploads")], within_s=30, what="its end"
        )

    def test_what_nobody_expects_is_raised_to_the_caller(self) -> None:
        sender = Sender(lambda: 1 / 0, pytest.fail)  # type: ignore[arg-type, return-value]
        sender.wake()
        with pytest.raises(ZeroDivisionError):
            sender.finish(seconds(30))

    def test_a_run_that_was_taken_over_sends_no_more(self) -> None:
        tries = list[int]()

        def lost() -> None:
            tries.append(1)
            raise LeaseLost("was taken over", "s3://x")

        sender = Sender(lost, pytest.fail)
        sender.wake()
        soon(lambda: tries, within_s=30, what="the first try")
        with pytest.raises(LeaseLost):
            soon(lambda: sender.wake(), within_s=30, what="its end")  # type: ignore[func-returns-value]
        with pytest.raises(LeaseLost):
            sender.finish(seconds(30))


def test_trying_goes_on_for_a_time_and_no_longer() -> None:
    done: list[str] = []
    keep_trying(failing(3, done), timeout_s=seconds(30))
    assert done == ["sent"]
    with pytest.raises(StorageError, match="no connection"):
        keep_trying(failing(10**9, done), timeout_s=0.1)
