"""Who is at work at a URL. Object stores have no locks: a small file there is written again every few seconds.

Whoever finds the file of another watches it: one that changes belongs to a live process, one that stays the same for a
minute to a dead one. No clocks of two machines are compared, except to pass over a file that is older than an hour.

S3 and Google's storage could decide by conditional writes who is first, but pyarrow's clients for them offer none
(26.0), and a share has none. So each process has a file of its own, and all that is asked of a storage is that a file
which was written is listed from then on, as S3 and Google's are: a process has the URL when it has written its file,
and then listed no other. Of two, whoever lists second sees the file of the other. Two who see each other both remove
their files, and after pauses of random lengths the first to write its file again has it.
"""

from __future__ import annotations

import json
import logging
import math
import os
import random
import socket
import threading
import time
import uuid
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from hncse_ray.errors import StorageError
from hncse_ray.storage.local import write_atomically
from hncse_ray.storage.remote import Remote
from hncse_ray.storage.sending import LeaseLost, keep_trying

logger = logging.getLogger(__name__)

BEAT_S, STALE_S = 10.0, 60.0  # between two signs of life; after so long without any it is taken over
LEASES = "lease."  # how their names begin
LAST_LEASE = ".lease"  # the file in a local folder with the names of the last that were asked for from it
_MOST_KEPT = 20  # of these: the one that was had stands before those of starts that failed
_LONG_AGO_S, _PAUSE_S = 3600.0, 1.0
_Sign = tuple[str, str, float]  # of life: host, process, time


@dataclass(frozen=True)
class Lease:
    """The right to write at a URL, from :func:`leased`, and the name of its file there; travels to the workers."""

    remote: Remote
    name: str

    def check(self) -> None:
        """Make sure that nobody else has taken over.

        Raises:
            LeaseLost: somebody has.
            StorageError: the storage cannot be reached.
        """
        if self.remote.read(self.name) is None:
            raise LeaseLost("was taken over by another process, so this one stops", self.remote.url,
                            "Follow that one; nothing of its work was overwritten")  # fmt: skip


@contextmanager
def leased(remote: Remote, folder: Path, *, each_beat: Callable[[], None] = lambda: None) -> Iterator[Lease]:
    """Hold the right to write at a URL for as long as the context lasts, or until this process ends.

    Where somebody has it who may be dead, wait until that is certain.

    Args:
        remote: the place.
        folder: a local folder that only one process of this machine can hold, and this one does. So the lease that
            was last had from it is one of a dead process, and is taken over at once.
        each_beat: called after each sign of life.

    Raises:
        StorageError: it is held by a live process, or the storage cannot be reached.
    """
    lease, ended = Lease(remote, f"{LEASES}{uuid.uuid4().hex}.json"), threading.Event()
    kept = folder / LAST_LEASE
    last = kept.read_text(errors="replace").split()[-_MOST_KEPT:] if kept.exists() else []
    write_atomically(kept, "\n".join([*last, lease.name]))
    dead = _acquire(lease, last)

    def beat() -> None:
        lease.check()
        remote.write(lease.name, _sign())
        for name in dead:  # who was asleep, and not dead, may have written it once more before it knew
            remote.delete(name)
        each_beat()

    def keep_beating() -> None:
        try:
            while not ended.wait(BEAT_S):
                keep_trying(beat, ended=ended, notify=logger.warning)
        except LeaseLost as error:
            logger.warning("%s", error)

    thread = threading.Thread(target=keep_beating, name="lease", daemon=True)
    thread.start()
    try:
        yield lease
    finally:
        ended.set()
        thread.join(timeout=BEAT_S)
        try:
            remote.delete(lease.name)
        except StorageError as error:
            logger.warning("the lease stays, and is stale in %g s: %s", STALE_S, error)


def _acquire(lease: Lease, last: Collection[str]) -> list[str]:
    """Be the only one who has a lease; return the names of those that were taken over."""
    dead = _see_they_are_dead(lease, last)
    for name in dead:
        lease.remote.delete(name)
    while True:
        lease.remote.write(lease.name, _sign())
        if not _others(lease):
            return dead
        lease.remote.delete(lease.name)
        time.sleep(random.uniform(0, _PAUSE_S))
        if others := _others(lease):
            raise _in_use(lease, others)


def _see_they_are_dead(lease: Lease, last: Collection[str]) -> list[str]:
    """Return the names of the leases of others, once it is certain that these show no life; ``last`` show none."""
    found, end, here = _others(lease), time.monotonic() + STALE_S, socket.gethostname()
    sure = {
        name
        for name, (host, _, at) in found.items()
        if (name in last and host == here) or time.time() - at > _LONG_AGO_S
    }
    if found.keys() - sure:
        logger.warning("%s is or was in use by %s; seeing for up to %g s whether it lives",
                       lease.remote.url, _holders(found), STALE_S)  # fmt: skip
    while found.keys() - sure and time.monotonic() < end:
        time.sleep(min(_PAUSE_S, STALE_S / 10))
        now = _others(lease)
        if live := {name: sign for name, sign in now.items() if sign != found.get(name)}:
            raise _in_use(lease, live)
        found = now
    if found:
        logger.warning("taking %s over from %s that shows no life", lease.remote.url, _holders(found))
    return list(found)


def _others(lease: Lease) -> dict[str, _Sign]:
    """Return the signs of life of other processes, by the names of their leases."""
    names = [name for name in lease.remote.names() if name.startswith(LEASES) and name != lease.name]
    return {name: _read(content) for name in names if (content := lease.remote.read(name)) is not None}


def _sign() -> bytes:
    """Return a sign of life that differs from all before."""
    return json.dumps({"host": socket.gethostname(), "pid": os.getpid(), "time": time.time()}).encode()


def _read(content: bytes) -> _Sign:
    """Return what a sign of life says, as far as it can be read: it may be half written."""
    try:
        facts = json.loads(content)
        return str(facts["host"]), str(facts["pid"]), float(facts["time"])
    except (ValueError, TypeError, KeyError):
        return "?", "?", math.inf


def _holders(signs: Mapping[str, _Sign]) -> str:
    return ", ".join(f"another process on {host} (process {pid})" for host, pid, _ in signs.values())


def _in_use(lease: Lease, others: Mapping[str, _Sign]) -> StorageError:
    hint = "Choose another run.name, or end that process"
    return StorageError(f"is in use by {_holders(others)}", lease.remote.url, hint)
