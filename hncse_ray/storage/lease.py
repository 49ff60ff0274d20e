"""Who is at work at a URL. Object stores have no locks: a small file there is written again every few seconds.

Whoever finds such a file watches it: one that changes belongs to a live process, one that stays the same for a minute
to a dead one. No clocks of two machines are compared, except to pass over a file that is older than an hour.

Of several who find none, or a dead one, at the same time one gets it. S3 and Google's storage could decide that by
conditional writes, but pyarrow's clients for them offer none (26.0), and a share has none. So it is decided by claims,
and all that is asked of a storage is that a file which was written is listed from then on, as S3 and Google's are:

1. Write a claim, a file of one's own beside the lease, then list them.
2. While others are there: the first by name waits for them to withdraw; they withdraw, wait until it is gone, and begin
   again with a new claim.
3. Who is alone reads the lease: somebody may have written it meanwhile, and has it. Else it writes the lease, and only
   then removes its claim.

Two cannot both get past 3. Of two who each were alone, the one who looked first must have removed its claim before the
second looked, so its lease was there when the second read.
"""

from __future__ import annotations

import json
import logging
import os
import socket
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from hncse_ray.errors import StorageError
from hncse_ray.storage.remote import Remote

logger = logging.getLogger(__name__)

BEAT_S, STALE_S = 10.0, 60.0
_LONG_AGO_S = 3600.0
_NAME, _CLAIM, _LENGTH = "lease.json", "lease.claim-", 1024
_POLL_S = 0.2
_READS, _READ_PAUSE_S = 3, 0.2


class LeaseLost(StorageError):
    """Another process has taken over: this one must not write any more."""


class Lease:
    """The right to write at a URL, held by :meth:`acquire` until :meth:`release`, or until this process ends.

    Args:
        remote: the place.
        folder: a local folder that only one process of this machine can hold, and this one does. So a lease that
            names it is one of a dead process, and is taken over at once.
        beat_s: time between two signs of life.
        stale_s: a lease without any for so long is taken over.
        each_beat: called after each sign of life.
    """

    def __init__(
        self,
        remote: Remote,
        folder: Path,
        *,
        beat_s: float = BEAT_S,
        stale_s: float = STALE_S,
        each_beat: Callable[[], None] = lambda: None,
    ) -> None:
        self._remote, self._beat_s, self._stale_s = remote, beat_s, stale_s
        self._each_beat = each_beat
        self.token = uuid.uuid4().hex
        self._machine = f"{socket.gethostname()} {_boot()} {folder.absolute()}"
        self._beats = 0
        self._ended = threading.Event()
        self._thread: threading.Thread | None = None

    def acquire(self) -> None:
        """Take the lease, or wait until it is certain that its holder is dead, and take it then.

        Raises:
            StorageError: it is held by a live process, or the storage cannot be reached.
        """
        found = _read(self._remote)
        if found is not None:
            self._see_it_is_dead(found)
        with self._alone(found):
            self._is_still(found)
            self._write()
        self._thread = threading.Thread(target=self._keep_beating, name="lease", daemon=True)
        self._thread.start()

    def release(self) -> None:
        """Give the lease back; the storage's failure to take it is no error, as it goes stale by itself."""
        self._ended.set()
        if self._thread is not None:
            self._thread.join(timeout=self._beat_s)
        try:
            if holds(self._remote, self.token):
                self._remote.delete(_NAME)
        except StorageError as error:
            logger.warning("the lease stays, and is stale in %g s: %s", self._stale_s, error)

    def _see_it_is_dead(self, found: dict[str, Any]) -> None:
        holder = str(found.get("host", "?"))
        if found.get("machine") == self._machine:
            return
        last = found.get("time")
        if not isinstance(last, (int, float)) or time.time() - last < _LONG_AGO_S:
            logger.warning("%s is or was in use by a process on %s; seeing for up to %g s whether it lives",
                           self._remote.url, holder, self._stale_s)  # fmt: skip
            end = time.monotonic() + self._stale_s
            while time.monotonic() < end:
                time.sleep(min(1.0, self._stale_s / 10))
                if not self._is_still(found):
                    return
        logger.warning("taking %s over from a process on %s that shows no life", self._remote.url, holder)

    @contextmanager
    def _alone(self, found: dict[str, Any] | None) -> Iterator[None]:
        """Be the only one who claims the lease; see the head of this module."""
        while True:
            claim, end = f"{_CLAIM}{uuid.uuid4().hex}.json", time.monotonic() + self._stale_s / 2
            try:
                self._remote.write(claim, self._sign())
                while (others := self._claims() - {claim}) and claim < min(others) and time.monotonic() < end:
                    self._pause_while(found)
                if not others:
                    yield
                    return
            finally:
                self._remote.delete(claim)
            self._outlast(others, found)

    def _outlast(self, claims: set[str], found: dict[str, Any] | None) -> None:
        """Wait until claims are gone. Who lives keeps one for half of the time, so what is left is of the dead."""
        end = time.monotonic() + self._stale_s
        while left := claims & self._claims():
            self._pause_while(found)
            if time.monotonic() > end:
                for name in left:
                    self._remote.delete(name)

    def _claims(self) -> set[str]:
        return {name for name in self._remote.names() if name.startswith(_CLAIM)}

    def _pause_while(self, found: dict[str, Any] | None) -> None:
        time.sleep(min(_POLL_S, self._stale_s / 10))
        self._is_still(found)

    def _is_still(self, found: dict[str, Any] | None) -> bool:
        """Say whether the lease is there as it was found; one that somebody else has written is an error."""
        now = _read(self._remote)
        if now is not None and now != found:
            raise self._in_use(now)
        return now is not None

    def _in_use(self, found: dict[str, Any]) -> StorageError:
        by = f"by another process on {found.get('host', '?')} (process {found.get('pid', '?')})"
        return StorageError(f"is in use {by}", self._remote.url, "Choose another run.name, or end that process")

    def _write(self) -> None:
        self._remote.write(_NAME, self._sign())

    def _sign(self) -> bytes:
        """Return a sign of life that differs from all before."""
        self._beats += 1
        content = {
            "token": self.token,
            "machine": self._machine,
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "beat": self._beats,
            "time": time.time(),
        }
        # Of one length: clients ask for the size first, and would read one that was renewed in between by half.
        return json.dumps(content).ljust(_LENGTH).encode()

    def _keep_beating(self) -> None:
        failing = False
        while not self._ended.wait(self._beat_s):
            try:
                found = _read(self._remote)
                if not _may_be_of(found, self.token):
                    assert found is not None
                    logger.warning("%s was taken over by a process on %s", self._remote.url, found.get("host", "?"))
                    return
                self._write()
                self._each_beat()
                failing = False
            except StorageError as error:
                if not failing:
                    logger.warning("no sign of life can be left: %s", error)
                failing = True


def holds(remote: Remote, token: str) -> bool:
    """Say whether the lease at a URL is that of a token; one that nobody has, or nobody can read, counts too.

    Raises:
        StorageError: the storage cannot be reached.
    """
    return _may_be_of(_read(remote), token)


def _may_be_of(found: dict[str, Any] | None, token: str) -> bool:
    return found is None or found.get("token", token) == token


def check_lease(remote: Remote, token: str) -> None:
    """Make sure that nobody else has taken over.

    Raises:
        LeaseLost: somebody has.
        StorageError: the storage cannot be reached.
    """
    if not holds(remote, token):
        raise LeaseLost("was taken over by another process, so this one stops", remote.url,
                        "Follow that one; nothing of its work was overwritten")  # fmt: skip


def _read(remote: Remote) -> dict[str, Any] | None:
    """Return the lease; of one that cannot be read, in several attempts, what it is in hexadecimal."""
    content: bytes | None = b""
    for attempt in range(_READS):
        if attempt:
            time.sleep(_READ_PAUSE_S)
        content = remote.read(_NAME)
        if content is None:
            return None
        try:
            lease = json.loads(content)
        except ValueError:
            continue
        if isinstance(lease, dict):
            return lease
    return {"unreadable": (content or b"").hex()}


def _boot() -> str:
    """Return what tells two starts of a machine, and two machines of one name, apart."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    except OSError:
        return ""
