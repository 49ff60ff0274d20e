"""Writing files and folders so that nobody ever finds half of one, and where they stay."""

from __future__ import annotations

import errno
import fcntl
import os
import re
import shutil
import tempfile
import time
import uuid
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

from hncse_ray.errors import StorageError

BLOCK = 4096  # bytes; what goes past the cache is a multiple of it, in memory too
_SMALL, _PIECE = 1 << 20, 64 << 20
_OF_A_JOB = "RAY_JOB_CONFIG_JSON_ENV_VAR"  # set by Ray for the command of a submitted job
_TRIES, _PAUSE_S = 5, 0.02  # of a lock


def is_job() -> bool:
    """Say whether this process is the command of a job that was submitted to a cluster."""
    return _OF_A_JOB in os.environ


def check_outlasts_job(path: str | Path, setting: str, *, in_job: bool | None = None) -> None:
    """Refuse a place for results that is gone when this process, a job that was submitted to a cluster, has ended.

    Such a job starts in a copy of the folder that was uploaded, which Ray removes after it.

    Args:
        path: a path, or a URL.
        setting: what names it, for the message.
        in_job: whether it is one; default: whether this process is.

    Raises:
        StorageError: it is relative, or within that copy.
    """
    scheme, separator, below = str(path).rpartition("://")
    if not (is_job() if in_job is None else in_job) or (separator and scheme not in ("file", "local")):
        return
    if not Path(below).is_absolute() or "working_dir_files" in Path(below).parts:
        raise StorageError(
            "lies in the folder of a submitted job, which is removed when the job ends",
            f"{setting} {path}" if setting.startswith("-") else f"{setting}={path}",
            "Give an absolute path that the nodes keep, such as /mnt/runs, or for a run s3://BUCKET/runs",
        )


def check_writable(file: Path, hint: str) -> None:
    """Refuse a file that cannot be written, before there is work to lose; its folder is made if need be.

    Raises:
        StorageError: it is a folder, or nothing can be put into its own.
    """
    if file.is_dir():
        raise StorageError("is a folder, not a file", str(file), hint)
    if file.parent.exists() and not file.parent.is_dir():
        raise StorageError("is a file, not a folder", str(file.parent), hint)
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=file.parent):
            pass
    except OSError as error:
        raise StorageError(f"cannot be written ({error.strerror})", str(file), hint) from error


def write_atomically(path: Path, text: str) -> None:
    """Write a small file so that a reader sees the old one or the whole new one.

    Raises:
        StorageError: it cannot be written.
    """
    with replacing(path) as partial:
        partial.write_text(text, encoding="utf-8")


@contextmanager
def replacing(path: Path, hint: str = "") -> Iterator[Path]:
    """Yield where to write a file that takes the place of ``path`` once it is whole, of the same ending.

    Several may write the same file at once: the last one's stays. Of one that fails or is interrupted nothing does.

    Args:
        path: the file.
        hint: what to do if it cannot be written.

    Raises:
        StorageError: it cannot be written.
    """
    partial = path.with_name(f".{uuid.uuid4().hex[:8]}.{path.name}")
    try:
        yield partial
        os.replace(partial, path)
    except OSError as error:
        raise StorageError(f"cannot be written ({error.strerror or error})", str(path), hint) from error
    finally:
        with suppress(OSError):  # it is in its place, or there is no such folder
            partial.unlink()


def write_past_cache(path: Path, content: memoryview, *, size: int) -> None:
    """Write a new file from memory past the system's cache of files, where the file system can do that.

    Through the cache the kernel takes about a second of CPU for each GB, and may drop what others have mapped.

    Args:
        path: the file.
        content: whole blocks, at an address that is a multiple of ``BLOCK``.
        size: of the file, in the last of these blocks; what is behind it is not kept.

    Raises:
        OSError: it cannot be written.
    """
    with path.open("xb", buffering=0) as file:
        cached = fcntl.fcntl(file, fcntl.F_GETFL)
        if size >= _SMALL:
            with suppress(OSError):  # no file system of this kind
                fcntl.fcntl(file, fcntl.F_SETFL, cached | getattr(os, "O_DIRECT", 0))  # Linux has it
        at = 0
        while at < len(content):
            try:
                at += file.write(content[at : at + _PIECE])
            except OSError as error:
                if error.errno != errno.EINVAL or fcntl.fcntl(file, fcntl.F_GETFL) == cached:
                    raise
                fcntl.fcntl(file, fcntl.F_SETFL, cached)  # its blocks are larger
        file.truncate(size)


def write_folder(path: Path, write: Callable[[Path], None]) -> None:
    """Fill a new folder by ``write(folder)`` and put it in place of ``path`` only when it is whole.

    Raises:
        StorageError: the disk is full or the place cannot be written; nothing of the attempt remains.
    """
    partial = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}")
    replaced = partial.with_name(f"{partial.name}.old")
    try:
        # What a process left that was killed while it wrote; between its two renames, the old folder too.
        left = _left_of(path)
        kept = next((folder for folder in left if folder.suffix == ".old"), None)
        if kept is not None and not path.exists():
            os.replace(kept, path)
        for leftover in left:
            shutil.rmtree(leftover, ignore_errors=True)
        partial.mkdir(parents=True)
        write(partial)
        _share(partial)
        if path.exists():
            os.replace(path, replaced)
        os.replace(partial, path)
    except BaseException as error:
        shutil.rmtree(partial, ignore_errors=True)
        if replaced.exists() and not path.exists():
            os.replace(replaced, path)
        if not isinstance(error, Exception) or isinstance(error, StorageError):  # Ctrl-C, or said already
            raise
        # safetensors and torch report a full disk as errors of their own, not as OSError.
        raise StorageError(f"cannot be written ({error})", str(path), "Is the disk full?") from error
    shutil.rmtree(replaced, ignore_errors=True)


def _left_of(path: Path) -> list[Path]:
    """Return the folders beside a path that :func:`write_folder` has made for it, and nothing that is called alike."""
    if not path.parent.is_dir():
        return []
    own = re.compile(rf"\.{re.escape(path.name)}\.[0-9a-f]{{8}}(\.old)?")
    return [entry for entry in path.parent.iterdir() if own.fullmatch(entry.name)]


def _share(folder: Path) -> None:
    """Let whoever may read a new folder read its files: safetensors makes them for their owner alone."""
    rights = folder.stat().st_mode & 0o666
    for file in filter(Path.is_file, folder.rglob("*")):
        mode = file.stat().st_mode
        if mode | rights != mode:
            file.chmod(mode | rights)


@contextmanager
def locked(path: Path, *, hint: str, wait: bool = False, of: str | None = None) -> Iterator[list[Path]]:
    """Hold a lock file, made with its folder if need be, while the context lasts or until this process ends.

    Args:
        path: the lock file.
        hint: what to do if it cannot be had.
        wait: whether to wait until whoever holds it is done.
        of: what it is the lock of, for messages; None = its folder.

    Yields:
        The folders that had to be made, the lowest first.

    Raises:
        StorageError: it cannot be written or locked, or another process holds it.
    """
    folder = path.parent
    for left in reversed(range(_TRIES)):
        made = [place for place in (folder, *folder.absolute().parents) if not os.path.exists(place)]
        try:
            folder.mkdir(parents=True, exist_ok=True)
            lock = path.open("a")
        except OSError as error:
            raise StorageError(f"cannot be written ({error.strerror})", str(folder), hint) from error
        with lock:
            try:
                _take(lock, wait=wait)
            except BlockingIOError as error:
                ways = f"{hint}, or wait until that process has ended"
                raise StorageError("is in use by another process", of or str(folder), ways) from error
            except OSError as error:
                what = f"cannot be locked ({error.strerror}), as on some network file systems"
                raise StorageError(what, str(folder), hint) from error
            if _is_at(lock, path) or not left:  # some file systems give the numbers of files anew
                yield made
                return
            # Whoever held it has removed it by leave_nothing: the next one makes another.


def _take(lock: IO[str], *, wait: bool) -> None:
    """Lock a file; one that :func:`is_locked` looks at is free in a moment."""
    for left in reversed(range(_TRIES)):
        try:
            return fcntl.flock(lock, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            if not left:
                raise
            time.sleep(_PAUSE_S)


def _is_at(lock: IO[str], path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(lock.fileno()), path.stat())
    except FileNotFoundError:
        return False


def leave_nothing(folder: Path, files: Collection[str], made: Collection[Path]) -> bool:
    """Remove files from a folder that holds no others, then the folders that were made for it, where they are empty.

    Args:
        folder: of something that came to nothing.
        files: the names of those that do not count.
        made: what :func:`locked` yielded.

    Returns:
        Whether it was so; else nothing is removed.
    """
    entries = list(folder.iterdir()) if folder.is_dir() else None
    if entries is None or not {entry.name for entry in entries} <= set(files):
        return False
    for entry in entries:
        entry.unlink(missing_ok=True)
    for place in made:
        with suppress(OSError):  # it is not empty: the next process may be in it already
            place.rmdir()
    return True


def is_locked(path: Path) -> bool:
    """Return whether a process holds the lock of a file, or of a folder; on another machine that cannot be told."""
    try:
        lock = os.open(path, os.O_RDONLY)
    except OSError:
        return False
    try:
        fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except OSError as error:
        return isinstance(error, BlockingIOError)
    finally:
        os.close(lock)
    return False
