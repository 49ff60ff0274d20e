"""How long tests wait for what they wait for: in seconds of a quiet machine, stretched by how slow this one is now.

All bounds in tests are written as they hold on two quiet cores. Here they become those of this machine and moment: by a
short computation on two threads at the start of a session, compared with what it takes there, and once more before a
wait fails, as other work may have come meanwhile. The factor is never below one.
"""

from __future__ import annotations

import hashlib
import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

Value = TypeVar("Value")
REFERENCE_S = 0.45  # what the computation takes on two quiet cores (EPYC) such as the bounds were written on
_ENVIRONMENT = "HNCSE_TEST_SLOWNESS"  # so that the processes of one session, xdist's workers too, have one factor


def slowness() -> float:
    """How many times slower this machine is than the reference; measured once per session, see :func:`_measure`."""
    if _ENVIRONMENT not in os.environ:
        os.environ[_ENVIRONMENT] = str(_measure())
    return float(os.environ[_ENVIRONMENT])


def seconds(quiet_s: float) -> float:
    """The seconds here for what takes ``quiet_s`` at most on two quiet cores."""
    return quiet_s * slowness()


def soon(
    condition: Callable[[], Value], *, within_s: float, what: str | Callable[[], object], every_s: float = 0.1
) -> Value:
    """Return the first true value of a condition; fail if there is none in time.

    Args:
        condition: asked again and again.
        within_s: how long on two quiet cores.
        what: the state that is waited for; a function is asked when it has not come.
        every_s: the pause between two questions.
    """
    started = time.monotonic()
    while not (value := condition()):
        assert not _is_over(started, within_s), (
            f"not within {seconds(within_s):.3g} s: {what() if callable(what) else what}"
        )
        time.sleep(every_s)
    return value


@contextmanager
def within(limit_s: float, what: str) -> Iterator[None]:
    """Fail if what is done in the context takes longer than ``limit_s`` on two quiet cores."""
    started = time.monotonic()
    yield
    taken = time.monotonic() - started
    assert taken <= limit_s or not _is_over(time.monotonic() - taken, limit_s), f"{what} took {taken:.3g} s"


def _is_over(started: float, quiet_s: float) -> bool:
    """Whether more has passed; where it has, the machine is measured again before that counts."""
    waited = time.monotonic() - started
    if waited <= seconds(quiet_s):
        return False
    os.environ[_ENVIRONMENT] = str(max(slowness(), _measure()))
    return waited > seconds(quiet_s)


def _measure() -> float:
    """Digest 600 MiB on each of two threads, outside of Python's lock, and compare with the reference."""
    block = bytes(1 << 20)

    def digest() -> None:
        running = hashlib.blake2b()
        for _ in range(600):
            running.update(block)

    threads = [threading.Thread(target=digest) for _ in range(2)]
    started = time.monotonic()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return max(1.0, (time.monotonic() - started) / REFERENCE_S)
