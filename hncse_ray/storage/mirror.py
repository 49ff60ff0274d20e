"""Copies of local folders at a URL: whole or not there, sent behind the back of whoever computes.

A folder's manifest, ``<folder>.manifest.json``, names its files with size and SHA-256. It is written last and deleted
first, so a folder that was sent by half has none, and one that was damaged differs from it.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import threading
import time
import uuid
from collections.abc import Callable
from pathlib import Path

from hncse_ray.errors import StorageError
from hncse_ray.storage.lease import LeaseLost
from hncse_ray.storage.remote import Remote, is_inside

_SUFFIX = ".manifest.json"
_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 1.0, 30.0


class Damaged(StorageError):
    """What is at the URL is not what was sent."""


def send_folder(remote: Remote, name: str, folder: Path) -> None:
    """Copy a local folder; until the end there is none of that name.

    Raises:
        StorageError: it could not be written.
    """
    files = {str(p.relative_to(folder)): [p.stat().st_size, _digest(p)] for p in _files(folder)}
    remote.delete(name + _SUFFIX)
    for file in files:
        remote.upload(folder / file, f"{name}/{file}")
    remote.write(name + _SUFFIX, json.dumps({"files": files}, indent=1).encode())
    for left in set(remote.names(name)) - {f"{name}/{file}" for file in files}:
        remote.delete(left)


def whole_folders(remote: Remote, parent: str) -> list[str]:
    """Return the names of the folders in ``parent`` that were sent to the end, the last step first.

    Those of checkpoints only, ``step_`` and digits: the names become local paths, and whoever writes to a bucket could
    have made up any.

    Raises:
        StorageError: the storage cannot be reached.
    """
    pattern = re.compile(re.escape(f"{parent}/") + r"(step_[0-9]+)" + re.escape(_SUFFIX))
    found = [match[1] for name in remote.names(parent) if (match := pattern.fullmatch(name))]
    return sorted(found, reverse=True)


def fetch_folder(remote: Remote, name: str, target: Path) -> bool:
    """Bring a folder that was sent; one that is there already, as it was sent, is left as it is.

    Args:
        remote: where it was sent to.
        name: what it is called there.
        target: the local folder, replaced by it.

    Returns:
        Whether it had to be fetched.

    Raises:
        Damaged: it differs from what was sent.
        StorageError: it cannot be reached, or not be written here.
    """
    files = _manifest(remote, name)
    if target.is_dir() and _difference(target, files) is None:
        return False
    partial = target.with_name(f".{target.name}.{uuid.uuid4().hex[:8]}")
    try:
        for file in files:
            (partial / file).parent.mkdir(parents=True, exist_ok=True)
            remote.download(f"{name}/{file}", partial / file)
        if (different := _difference(partial, files)) is not None:
            raise Damaged(f"is damaged ({different} differs from what was sent)", f"{remote.url}/{name}")
        shutil.rmtree(target, ignore_errors=True)
        os.replace(partial, target)
    except OSError as error:
        raise StorageError(f"cannot be written ({error.strerror})", str(target), "Is the disk full?") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return True


def delete_folder(remote: Remote, name: str) -> None:
    """Delete a folder that was sent, its manifest first.

    Raises:
        StorageError: the storage cannot be reached.
    """
    remote.delete(name + _SUFFIX)
    for file in remote.names(name):
        remote.delete(file)


def _manifest(remote: Remote, name: str) -> dict[str, tuple[int, str]]:
    text = remote.read(name + _SUFFIX)
    if text is None:
        raise Damaged("was not sent to the end", f"{remote.url}/{name}")
    try:
        files = {str(file): (int(size), str(digest)) for file, (size, digest) in json.loads(text)["files"].items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise Damaged(f"is damaged ({type(error).__name__}: {error})", f"{remote.url}/{name}{_SUFFIX}") from error
    if outside := [file for file in files if not is_inside(file)]:
        raise Damaged(f"names files outside of its folder ({outside[0]!r})", f"{remote.url}/{name}{_SUFFIX}")
    return files


def _difference(folder: Path, files: dict[str, tuple[int, str]]) -> str | None:
    """Name a file that is not as the manifest says; None if all are."""
    there = {str(path.relative_to(folder)): path for path in _files(folder)}
    if odd := sorted(there.keys() ^ files.keys()):
        return odd[0]
    return next((f for f, told in files.items() if (there[f].stat().st_size, _digest(there[f])) != told), None)


def _files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


class Uploader:
    """Sends in a thread of its own: one thing at a time, and of those that wait only the latest.

    What fails is tried again, with growing pauses, until it succeeds or something later takes its place.

    Args:
        where: the URL, for messages.
        local: where all that is sent is kept locally, for messages.
        notify: told once when sending begins to fail, and when it works again; called from the thread.
        first_pause_s: before the first retry; doubled each time.
    """

    def __init__(
        self, where: str, local: str, notify: Callable[[str], None], *, first_pause_s: float = _FIRST_PAUSE_S
    ) -> None:
        self._where, self._local, self._notify, self._first_pause_s = where, local, notify, first_pause_s
        self._changed = threading.Condition()
        self._waiting: tuple[str, Callable[[], None]] | None = None
        self._sending: str | None = None
        self._cause = ""
        self._lost: LeaseLost | None = None
        self._closed = False
        threading.Thread(target=self._work, name="uploads", daemon=True).start()

    @property
    def sending(self) -> str | None:
        """What is being sent now."""
        return self._sending

    def submit(self, name: str, send: Callable[[], None]) -> None:
        """Have something sent; what waits, and is not begun, is not sent any more. Returns at once.

        Raises:
            LeaseLost: another process has taken the run over.
        """
        with self._changed:
            if self._lost is not None:
                raise self._lost
            self._waiting = (name, send)
            self._changed.notify_all()

    def finish(self, timeout_s: float) -> None:
        """Wait until all is sent, and end the thread.

        Raises:
            StorageError: it could not be sent in that time, or another process has taken the run over.
        """
        with self._changed:
            sent = self._changed.wait_for(
                lambda: self._lost is not None or (self._waiting is None and self._sending is None), timeout_s
            )
            self._closed = True
            self._changed.notify_all()
        if self._lost is not None:
            raise self._lost
        if not sent:
            cause = f"; the last failure was: {self._cause}" if self._cause else ""
            raise StorageError(
                f"the last state could not be stored in {timeout_s:g} s{cause}",
                self._where,
                f"Nothing is lost: all of it is in {self._local}; the same command on this machine stores it",
            )

    def _work(self) -> None:
        pause_s, failing = self._first_pause_s, False
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._waiting is not None or self._closed)
                if self._closed:
                    return
                assert self._waiting is not None
                (name, send), self._waiting = self._waiting, None
                self._sending = name
            error: Exception | None = None
            try:
                send()
            except Exception as caught:  # whatever it is: the thread must not die unseen
                error = caught
            with self._changed:
                self._sending = None
                if isinstance(error, LeaseLost):
                    self._lost = error
                elif error is not None:
                    self._cause = error.what if isinstance(error, StorageError) else f"{type(error).__name__}: {error}"
                    self._waiting = self._waiting or (name, send)
                self._changed.notify_all()
            if isinstance(error, LeaseLost):
                return
            if error is not None:
                if not failing:
                    self._notify(f"{name} could not be stored yet, and is tried again: {error}")
                with self._changed:
                    self._changed.wait_for(lambda: self._closed, pause_s)
                pause_s, failing = min(2 * pause_s, _LONGEST_PAUSE_S), True
            elif failing:
                self._notify(f"{name} is stored; the storage works again")
                pause_s, failing = self._first_pause_s, False


def keep_trying(send: Callable[[], None], *, timeout_s: float, first_pause_s: float = _FIRST_PAUSE_S) -> None:
    """Call ``send`` until it succeeds.

    Raises:
        StorageError: the last failure, after ``timeout_s``.
        LeaseLost: at once.
    """
    end, pause_s = time.monotonic() + timeout_s, first_pause_s
    while True:
        try:
            return send()
        except LeaseLost:
            raise
        except StorageError:
            if time.monotonic() + pause_s > end:
                raise
        time.sleep(pause_s)
        pause_s = min(2 * pause_s, _LONGEST_PAUSE_S)
