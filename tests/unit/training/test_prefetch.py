"""Looking ahead, and leaving a silent source alone, by a clock that the test sets."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from waits import seconds

from hncse_ray.negatives import SourceUnavailable
from hncse_ray.training.prefetch import _FIRST_PAUSE_S, _LONGEST_PAUSE_S, Prefetch


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


class LookUps:
    """Answers a number with ten times it, and keeps what it was asked; ``gate`` holds it back, ``error`` ends it."""

    def __init__(self) -> None:
        self.asked: list[int] = []
        self.gate, self.error = threading.Event(), None
        self.gate.set()

    def __call__(self, number: int) -> int:
        self.asked.append(number)
        assert self.gate.wait(seconds(30))
        if self.error is not None:
            raise self.error
        return 10 * number


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def look_up() -> Iterator[LookUps]:
    look_ups = LookUps()
    yield look_ups
    look_ups.gate.set()


@pytest.fixture
def prefetch(clock: Clock, look_up: LookUps) -> Iterator[Prefetch[int]]:
    made: Prefetch[int] = Prefetch(20.0, clock=clock)
    yield made
    look_up.gate.set()
    made.close()


def begin(prefetch: Prefetch[int], look_up: LookUps, number: int) -> None:
    """As the loop does."""
    for wanted in prefetch.wanted([number]):
        prefetch.start(wanted, look_up)


def settled(prefetch: Prefetch[Any]) -> None:
    """Return when everything that was begun is done."""
    for future in list(prefetch._futures.values()):
        future.exception(30)


def test_an_answer_that_is_there_is_not_waited_for(prefetch: Prefetch[int], look_up: LookUps) -> None:
    for number in (3, 4):
        begin(prefetch, look_up, number)
    settled(prefetch)
    assert prefetch.take(3) == (30, False)
    assert prefetch.take(4) == (40, False)


def test_an_answer_that_is_not_there_is_waited_for(prefetch: Prefetch[int], look_up: LookUps) -> None:
    look_up.gate.clear()
    begin(prefetch, look_up, 3)
    timer = threading.Timer(0.05, look_up.gate.set)
    timer.start()
    assert prefetch.take(3) == (30, True)
    timer.join()


def test_what_was_never_asked_for_is_none_at_once(prefetch: Prefetch[int], look_up: LookUps) -> None:
    assert prefetch.take(3) == (None, False)
    begin(prefetch, look_up, 3)
    prefetch.take(3)
    assert prefetch.take(3) == (None, False)  # an answer is taken once


def test_a_batch_is_looked_up_once_however_often_it_is_started(prefetch: Prefetch[int], look_up: LookUps) -> None:
    for _ in range(3):
        begin(prefetch, look_up, 3)
    settled(prefetch)
    begin(prefetch, look_up, 3)
    assert prefetch.take(3) == (30, False)
    assert look_up.asked == [3]


def test_no_answer_in_time_is_a_source_that_is_away(clock: Clock, look_up: LookUps) -> None:
    prefetch: Prefetch[int] = Prefetch(0.02, clock=clock)
    look_up.gate.clear()
    begin(prefetch, look_up, 3)
    with pytest.raises(SourceUnavailable, match=r"no answer within 0\.02 s"):
        prefetch.take(3)
    look_up.gate.set()
    prefetch.close()


@pytest.mark.parametrize("error", [SourceUnavailable("the shard is gone"), ValueError("a mistake")])
def test_what_the_look_up_raised_is_raised(prefetch: Prefetch[int], look_up: LookUps, error: Exception) -> None:
    look_up.error = error
    begin(prefetch, look_up, 3)
    with pytest.raises(type(error), match=str(error)):
        prefetch.take(3)


def test_a_time_out_that_the_look_up_itself_raised_is_told_as_such(prefetch: Prefetch[int], look_up: LookUps) -> None:
    look_up.error = SourceUnavailable("timed out inside")
    begin(prefetch, look_up, 3)
    with pytest.raises(SourceUnavailable, match="timed out inside"):
        prefetch.take(3)


def test_a_source_left_alone_is_not_asked_until_the_pause_is_over(
    prefetch: Prefetch[int], look_up: LookUps, clock: Clock
) -> None:
    assert not prefetch.paused()
    assert prefetch.pause()
    begin(prefetch, look_up, 3)
    assert prefetch.paused() and prefetch.take(3) == (None, False)
    clock.now += _FIRST_PAUSE_S - 0.01
    begin(prefetch, look_up, 4)
    assert prefetch.paused() and prefetch.take(4) == (None, False)
    clock.now += 0.01
    assert not prefetch.paused()
    begin(prefetch, look_up, 5)
    assert prefetch.take(5)[0] == 50
    assert look_up.asked == [5]


def pause_length(prefetch: Prefetch[int], clock: Clock) -> float:
    """Sit a pause out."""
    start, low, high = clock.now, 0.0, 1000.0
    while high - low > 1e-6:
        clock.now = start + (low + high) / 2
        low, high = ((low + high) / 2, high) if prefetch.paused() else (low, (low + high) / 2)
    clock.now = start + high
    return high


def test_pauses_double_up_to_a_bound_and_start_again_after_an_answer(prefetch: Prefetch[int], clock: Clock) -> None:
    expected, lengths = [], []
    for n in range(9):
        assert prefetch.pause() == (n == 0)  # only the first is news
        lengths.append(pause_length(prefetch, clock))
        expected.append(min(_FIRST_PAUSE_S * 2**n, _LONGEST_PAUSE_S))
    assert lengths == pytest.approx(expected, abs=1e-5)
    assert lengths[-1] == lengths[-2] == pytest.approx(_LONGEST_PAUSE_S, abs=1e-5)
    assert prefetch.returned()
    assert not prefetch.returned()  # that it is back is news once
    assert prefetch.pause()
    assert pause_length(prefetch, clock) == pytest.approx(_FIRST_PAUSE_S, abs=1e-5)


def test_an_answer_ends_a_pause(prefetch: Prefetch[int], look_up: LookUps) -> None:
    prefetch.pause()
    assert prefetch.returned()
    begin(prefetch, look_up, 3)
    assert prefetch.take(3)[0] == 30


@pytest.mark.parametrize("how", ["forget", "pause"])
def test_what_is_forgotten_is_looked_up_anew(prefetch: Prefetch[int], look_up: LookUps, clock: Clock, how: str) -> None:
    begin(prefetch, look_up, 3)
    settled(prefetch)
    getattr(prefetch, how)()
    assert prefetch.take(3) == (None, False)
    clock.now += 1000
    begin(prefetch, look_up, 3)
    assert prefetch.take(3)[0] == 30
    assert look_up.asked == [3, 3]


def test_what_waits_for_a_thread_is_never_looked_up_once_it_is_forgotten(
    prefetch: Prefetch[int], look_up: LookUps
) -> None:
    look_up.gate.clear()
    for number in range(5):
        begin(prefetch, look_up, number)
    prefetch.forget()
    look_up.gate.set()
    begin(prefetch, look_up, 9)
    assert prefetch.take(9)[0] == 90
    assert not set(look_up.asked) & {2, 3, 4}  # there are two threads


def test_closing_neither_waits_nor_begins_anything(look_up: LookUps, clock: Clock) -> None:
    prefetch: Prefetch[int] = Prefetch(20.0, clock=clock)
    look_up.gate.clear()
    for number in range(5):
        begin(prefetch, look_up, number)
    closing = threading.Thread(target=prefetch.close)
    closing.start()
    closing.join(seconds(10))
    assert not closing.is_alive()
    threads: Callable[[], list[threading.Thread]] = lambda: list(prefetch._threads._threads)  # noqa: E731
    look_up.gate.set()
    for thread in threads():
        thread.join(seconds(10))
        assert not thread.is_alive()
    assert not set(look_up.asked) & {2, 3, 4}
