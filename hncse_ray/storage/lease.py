"""Who is at work at a URL. Object stores have no locks: a small file there is written again every few seconds.

Whoever finds such a file watches it: one that changes belongs to a live process, one that stays the same for a minute
to a dead one. No clocks of two machines are compared, except to pass over a file that is older than an hour.
"""

from __future__ import annotations

import json
import logging
import os
import socket
import threading
import time
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

from hncse_ray.errors import StorageError
from hncse_ray.storage.remote import Remote

logger = logging.getLogger(__name__)

BEAT_S, STALE_S, SETTLE_S = 10.0, 60.0, 2.0
_LONG_AGO_S = 3600.0
_NAME, _LENGTH = "lease.json", 1024
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
        settle_s: after taking over, time for another who does the same to be seen.
        each_beat: called after each sign of life.
    """

    def __init__(
        self,
        remote: Remote,
        folder: Path,
        *,
        beat_s: float = BEAT_S,
        stale_s: float = STALE_S,
        settle_s: float = SETTLE_S,
        each_beat: Callable[[], None] = lambda: None,
    ) -> None:
        self._remote, self._beat_s, self._stale_s, self._settle_s = remote, beat_s, stale_s, settle_s
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
        self._write()
        if found is not None:
            time.sleep(self._settle_s)
            if not holds(self._remote, self.token):
                raise self._in_use(_read(self._remote) or {})
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
                now = _read(self._remote)
                if now is None:
                    return
                if now != found:
                    raise self._in_use(now)
        logger.warning("taking %s over from a process on %s that shows no life", self._remote.url, holder)

    def _in_use(self, found: dict[str, Any]) -> StorageError:
        by = f"by another process on {found.get('host', '?')} (process {found.get('pid', '?')})"
        return StorageError(f"is in use {by}", self._remote.url, "Choose another run.name, or end that process")

    def _write(self) -> None:
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
        self._remote.write(_NAME, json.dumps(content).ljust(_LENGTH).encode())

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
