"""Sending behind the back of whoever computes, and through failures."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor

from hncse_ray.errors import StorageError
from hncse_ray.storage.lease import LeaseLost

_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 1.0, 30.0


class Sender:
    """Calls ``send`` in a thread of its own, again and again until it succeeds: each time, all that there is to send.

    Args:
        send: sends what is new.
        notify: told once when sending begins to fail, and when it works again; called from the thread.
        first_pause_s: before the first retry; doubled each time.
    """

    def __init__(
        self, send: Callable[[], None], notify: Callable[[str], None], *, first_pause_s: float = _FIRST_PAUSE_S
    ) -> None:
        self._send, self._notify, self._first_pause_s = send, notify, first_pause_s
        self._ended = threading.Event()
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
        """Wait until all is sent, and end the thread.

        Raises:
            TimeoutError: it could not be sent in that time.
            LeaseLost: another process has taken the run over.
        """
        try:
            self._last.result(timeout_s)
        finally:
            self._ended.set()
            self._thread.shutdown(wait=False, cancel_futures=True)

    def _keep_sending(self) -> None:
        keep_trying(self._send, ended=self._ended, notify=self._notify, first_pause_s=self._first_pause_s)


def keep_trying(
    do: Callable[[], None],
    *,
    timeout_s: float = math.inf,
    ended: threading.Event | None = None,
    notify: Callable[[str], None] = lambda text: None,
    first_pause_s: float = _FIRST_PAUSE_S,
) -> None:
    """Call ``do`` until it succeeds, with growing pauses.

    Args:
        do: may fail.
        timeout_s: how long to go on.
        ended: when it is set, nobody waits any more.
        notify: told of the first failure, and when it works again.
        first_pause_s: before the second call; doubled each time.

    Raises:
        StorageError: the last failure, when the time is over.
        LeaseLost: at once.
    """
    end, pause_s, failing, ended = time.monotonic() + timeout_s, first_pause_s, False, ended or threading.Event()
    while True:
        try:
            do()
            break
        except LeaseLost:
            raise
        except (StorageError, OSError) as error:
            if not failing:
                notify(f"the storage fails, and is tried again: {error}")
            failing = True
            if time.monotonic() + pause_s > end or ended.wait(pause_s):
                raise
        pause_s = min(2 * pause_s, _LONGEST_PAUSE_S)
    if failing:
        notify("the storage works again")
