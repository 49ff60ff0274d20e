"""Looking things up ahead in threads, and leaving a source alone for a while when it does not answer."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Generic, TypeVar

from hncse_ray.negatives import SourceUnavailable

Answer = TypeVar("Answer")
_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 0.5, 30.0


class Prefetch(Generic[Answer]):
    """Answers by batch number, asked for in threads some batches before they are needed.

    Args:
        timeout_s: how long :meth:`take` waits for an answer that is not there yet.
        clock: seconds, monotonic.
    """

    def __init__(self, timeout_s: float, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._timeout_s, self._clock = timeout_s, clock
        self._threads = ThreadPoolExecutor(max_workers=2, thread_name_prefix="negatives")
        self._futures: dict[int, Future[Answer]] = {}
        self._pause_s = _FIRST_PAUSE_S
        self._paused_until: float | None = None

    def wanted(self, numbers: Iterable[int]) -> tuple[int, ...]:
        """Return which batches to look up now: those that have not been begun, none if the source is left alone."""
        return () if self.paused() else tuple(number for number in numbers if number not in self._futures)

    def start(self, number: int, look_up: Callable[[int], Answer]) -> None:
        """Begin to look up a batch."""
        self._futures[number] = self._threads.submit(look_up, number)

    def begun(self, number: int) -> Future[Answer] | None:
        """Return the answer to come for a batch; None if it was never asked for."""
        return self._futures.get(number)

    def take(self, number: int) -> tuple[Answer | None, bool]:
        """Return the answer for a batch, and whether it had to be waited for; None if it was never asked for.

        Raises:
            SourceUnavailable: no answer in time, or what the look-up raised.
        """
        future = self._futures.pop(number, None)
        if future is None:
            return None, False
        waited = not future.done()
        try:
            return future.result(self._timeout_s), waited
        except TimeoutError:
            raise SourceUnavailable(f"no answer within {self._timeout_s:g} s") from None

    def forget(self) -> None:
        """Drop all answers that have not been taken."""
        for future in self._futures.values():
            future.cancel()
        self._futures.clear()

    def pause(self) -> bool:
        """Leave the source alone, longer each time; whether it was answering until now."""
        newly_away = self._paused_until is None
        self._paused_until = self._clock() + self._pause_s
        self._pause_s = min(2 * self._pause_s, _LONGEST_PAUSE_S)
        self.forget()
        return newly_away

    def paused(self) -> bool:
        """Whether the source is left alone now."""
        return self._paused_until is not None and self._clock() < self._paused_until

    def try_again(self) -> None:
        """End a pause early: there is reason to think that the source answers."""
        if self._paused_until is not None:
            self._paused_until = self._clock()

    def returned(self) -> bool:
        """Take note that the source has answered; whether it had been away."""
        was_away = self._paused_until is not None
        self._paused_until, self._pause_s = None, _FIRST_PAUSE_S
        return was_away

    def close(self) -> None:
        """Drop everything; threads end when what they wait for returns."""
        self.forget()
        self._threads.shutdown(wait=False, cancel_futures=True)
