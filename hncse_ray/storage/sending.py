"""Sending behind the back of whoever computes, and through failures."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial

from hncse_ray.errors import StorageError

_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 1.0, 30.0


class LeaseLost(StorageError):
    """Another process has taken over: this one must not write any more."""


class Sender:
    """Calls ``send`` in a thread of its own, again and again until it succeeds: each time, all that there is to send.

    Args:
        send: sends what is new.
        notify: told once when sending begins to fail, and when it works again; called from the thread.
    """

    def __init__(self, send: Callable[[], None], notify: Callable[[str], None]) -> None:
        self._ended = threading.Event()
        self._keep_sending = partial(keep_trying, send, ended=self._ended, notify=notify)
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="uploads")
        self._last: Future[None] = self._thread.submit(lambda: None)

    def wake(self) -> None:
        """Have what is new sent; returns at once.

        Raises:
            LeaseLost: another process has taken the run over.
        """
        if self._last.done():
            self._last.result()
        if self._last.done() or self._last.running():  # else it has not begun, and will send this too
            self._last = self._thread.submit(self._keep_sending)

    def finish(self, timeout_s: float) -> None:
        """Have all sent that is left, wait for it, and end the thread.

        Raises:
            TimeoutError: it could not be sent in that time.
            LeaseLost: another process has taken the run over.
        """
        try:
            self.wake()
            self._last.result(timeout_s)
        finally:
            self._ended.set()
            self._thread.shutdown(wait=False, cancel_futures=True)


def keep_trying(
    do: Callable[[], None],
    *,
    timeout_s: float = math.inf,
    ended: threading.Event | None = None,
    notify: Callable[[str], None] = lambda text: None,
) -> None:
    """Call ``do`` until it succeeds, with growing pauses.

    Args:
        do: may fail.
        timeout_s: how long to go on.
        ended: when it is set, nobody waits any more.
        notify: told of the first failure, and when it works again.

    Raises:
        StorageError: the last failure, when the time is over.
        LeaseLost: at once.
    """
    end, pause_s, ended = time.monotonic() + timeout_s, _FIRST_PAUSE_S, ended or threading.Event()
    while True:
        try:
            do()
            break
        except LeaseLost:
            raise
        except (StorageError, OSError) as error:
            if time.monotonic() + pause_s > end:
                raise
            if pause_s == _FIRST_PAUSE_S:
                notify(f"the storage fails, and is tried again: {error}")
        if ended.wait(pause_s):
            return
        pause_s = min(2 * pause_s, _LONGEST_PAUSE_S)
    if pause_s > _FIRST_PAUSE_S:
        notify("the storage works again")
