"""The batches of a rank, read and laid out in a thread while the present one trains."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

from hncse_ray.training.lookup import BatchNegatives, LookedUp
from hncse_ray.training.step import LocalBatch

Make = Callable[[int, BatchNegatives | None], LocalBatch]


@dataclass
class InputWindow:
    """What has been waited for since the last log: of so many batches."""

    batches: int = 0
    waited: int = 0


@dataclass(frozen=True)
class _Made:
    batch: LocalBatch
    found: BatchNegatives | None


class Input:
    """Makes this rank's part of batches ahead, in one thread; no more than it is told to begin.

    What it makes depends on the batch's number and on what was found for it alone. Should a step use something else,
    as when another rank has no answer for the batch, it is made anew.

    Args:
        make: makes a batch from what the index knows of it.
        nothing: what is known of a batch without an answer; None where the run looks nothing up.
    """

    def __init__(self, make: Make, nothing: Callable[[int], BatchNegatives] | None = None) -> None:
        self._make, self._nothing = make, nothing
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="input")
        self._lock = threading.Lock()
        self._begun: dict[int, Future[_Made] | None] = {}  # None: its look-up has not ended
        self._window = InputWindow()

    def begin(self, number: int, look_up: Future[LookedUp] | None) -> None:
        """Make a batch when the queue has a free slot for it; with an answer, as soon as its look-up has ended.

        Args:
            number: of the batch.
            look_up: that was begun for it; None: none was.
        """
        with self._lock:
            self._begun[number] = None
        if look_up is None:
            self._submit(number, None if self._nothing is None else self._nothing(number))
        else:
            look_up.add_done_callback(lambda ended: self._looked_up(number, ended))

    def take(self, number: int, found: BatchNegatives | None) -> LocalBatch:
        """Return a batch made from what was found for it, and count whether it had to be waited for."""
        with self._lock:
            future = self._begun.pop(number, None)
        self._window.batches += 1
        if future is not None:
            self._window.waited += not future.done()
            made = future.result()
            if made.found is found or (found is not None and made.found is not None and _is_nothing(made.found, found)):
                return made.batch
        else:
            self._window.waited += 1
        return self._make(number, found)

    def window(self) -> InputWindow:
        """Return what this rank has counted since the last call."""
        window, self._window = self._window, InputWindow()
        return window

    def close(self) -> None:
        """Begin no more; the thread ends with the batch that it is making."""
        with self._lock:
            self._begun.clear()
        self._thread.shutdown(wait=False, cancel_futures=True)

    def _looked_up(self, number: int, look_up: Future[LookedUp]) -> None:
        if not look_up.cancelled() and look_up.exception() is None:
            self._submit(number, look_up.result().negatives)

    def _submit(self, number: int, found: BatchNegatives | None) -> None:
        with self._lock:
            if number in self._begun:  # else it has been taken, or nothing is begun any more
                self._begun[number] = self._thread.submit(lambda: _Made(self._make(number, found), found))


def _is_nothing(*found: BatchNegatives) -> bool:
    return all(own.version is None for own in found)
