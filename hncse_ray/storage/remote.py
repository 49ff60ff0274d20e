"""A folder at a URL: s3:// and gs:// by the clients that come with pyarrow, all others by fsspec; or one on a disk."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import cached_property
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from hncse_ray.errors import StorageError
from hncse_ray.storage.local import replacing

_ARROW_SCHEMES, _WEB_SCHEMES = ("s3", "gs"), ("http", "https")
_GCS_RETRY_S = 60  # Google's client goes on for 15 minutes by default; whoever calls here tries again anyway


def is_url(path: str) -> bool:
    """Say whether a storage path is a URL rather than a folder."""
    return "://" in path


def without_secret(url: str) -> str:
    """Return a URL as it may be shown: as it is, unless it is none, or holds what may be a secret."""
    try:
        parts = urlsplit(url)
    except ValueError:  # a bracket in the host, which may be a part of a password
        return _cut(url)
    # A secret of S3 may have a stroke in it, and then looks like a path. Of web servers a user may be a token.
    in_name = parts.scheme in _ARROW_SCHEMES and ":" in parts.netloc
    if parts.password is not None or in_name or (parts.username is not None and parts.scheme in _WEB_SCHEMES):
        return _cut(url)
    return re.split("[?#]", url)[0]


def _cut(url: str) -> str:
    return f"{url.partition('://')[0].lower()}://.../{url.rpartition('/')[2].rpartition('@')[2]}"


def flaw_of(url: str) -> str:
    """Say why a URL cannot be used, as it can be neither kept nor shown; empty if it can."""
    try:
        urlsplit(url)
    except ValueError:
        return "is no URL, as its host has a bracket"
    secret = "has a user, a password, a query or a fragment in it, and settings are kept and shown"
    return secret if without_secret(url) != url else ""


def open_filesystem(url: str) -> tuple[Any, str]:
    """Return the pyarrow filesystem that a URL or the path of a folder is in, and what it is called there.

    Raises:
        StorageError: the URL makes no sense, or what reads its kind is not installed.
    """
    from pyarrow.fs import FileSystem, FSSpecHandler, LocalFileSystem, PyFileSystem

    if not is_url(url):
        return LocalFileSystem(), str(Path(url).absolute())
    import fsspec  # most runs are in a folder

    scheme, _, rest = url.partition("://")
    if not rest or (scheme in _ARROW_SCHEMES and rest.startswith("/")):
        raise StorageError("names no bucket or folder", url, "Give a URL such as s3://bucket/folder")
    if flaw := flaw_of(url):
        raise StorageError(flaw, without_secret(url),
                           "Give bucket and folder only; the rest belongs into the environment, such as"
                           " AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY or AWS_ENDPOINT_URL")  # fmt: skip
    try:
        if scheme in _ARROW_SCHEMES:
            query = f"?retry_limit_seconds={_GCS_RETRY_S}" if scheme == "gs" else ""
            filesystem, path = FileSystem.from_uri(url + query)
            return filesystem, path.strip("/")
        filesystem, path = fsspec.core.url_to_fs(url, use_listings_cache=False)
        return PyFileSystem(FSSpecHandler(filesystem)), path.rstrip("/")
    except ImportError as error:
        raise StorageError(f"cannot be opened: {error}", url, f"Install what fsspec needs for {scheme}://,"
                           " on every node") from error  # fmt: skip
    except Exception as error:  # each filesystem has errors of its own
        raise StorageError(f"cannot be opened ({reason_of(error)})", url,
                           "Give a URL such as s3://bucket/folder, or a folder") from error  # fmt: skip


def _is_inside(name: str) -> bool:
    """Say whether a name that was read from a storage is the path of a file below the folder that it is joined to.

    In a bucket a name is any text: ``../x``, ``/x`` or one that no filesystem takes are names too.
    """
    return name.isprintable() and not {"", ".", ".."} & set(name.split("/"))


class Remote:
    """A folder at a URL, or on a disk. Files in it are named by their path below it; pickles as the URL.

    Each method raises a :class:`StorageError` if the storage cannot be reached, or refuses.

    Args:
        url: such as ``s3://bucket/folder``. Who may use it is for the usual places of its service to say, such as
            AWS_ACCESS_KEY_ID, AWS_ENDPOINT_URL, ``~/.aws``, the role of the machine, or GOOGLE_APPLICATION_CREDENTIALS.

    Raises:
        StorageError: the URL makes no sense, or what reads its kind is not installed.
    """

    def __init__(self, url: str) -> None:
        scheme, separator, path = url.rpartition("://")
        self.url = f"{scheme}{separator}{path.rstrip('/')}"
        self._files  # noqa: B018  so that a bad URL is told at once

    def __getstate__(self) -> dict[str, str]:
        """Leave what is opened here; the copy is opened when it is used, and says then if it cannot be."""
        return {"url": self.url}

    @cached_property
    def _files(self) -> Any:
        """The filesystem of what is in the folder: a file's path in it is its name."""
        from pyarrow.fs import SubTreeFileSystem

        filesystem, folder = open_filesystem(self.url)
        return SubTreeFileSystem(folder, filesystem)

    def read(self, name: str) -> bytes | None:
        """Return a file's content; None if there is no such file."""
        with self._saying("read", name):
            try:
                with self._files.open_input_stream(name, compression=None) as file:
                    content: bytes = file.read()
            except (FileNotFoundError, NotADirectoryError):
                return None
            return content

    def write(self, name: str, content: bytes) -> None:
        """Write a small file."""
        with self._writing(name), self._files.open_output_stream(name, compression=None) as file:
            file.write(content)

    def upload(self, file: Path, name: str) -> None:
        """Copy a local file to here."""
        from pyarrow.fs import LocalFileSystem, copy_files

        with self._writing(name):
            copy_files(str(file), name, LocalFileSystem(), self._files)

    def download(self, name: str, file: Path) -> None:
        """Copy a file from here, in place of a local one once it is whole."""
        from pyarrow.fs import LocalFileSystem, copy_files

        with replacing(file) as partial, self._saying("fetched", name):
            file.parent.mkdir(parents=True, exist_ok=True)
            copy_files(name, str(partial), self._files, LocalFileSystem())

    def names(self, below: str = "") -> list[str]:
        """Return the names of all files, or of those in one folder, sorted; without such as are no path below it."""
        from pyarrow.fs import FileSelector, FileType

        with self._saying("listed", below):
            found = self._files.get_file_info(FileSelector(below, allow_not_found=True, recursive=True))
        return sorted(info.path for info in found if info.type == FileType.File and _is_inside(info.path))

    def delete(self, name: str) -> None:
        """Delete a file; that it is not there is no error."""
        with self._saying("deleted", name), suppress(FileNotFoundError):
            self._files.delete_file(name)

    @contextmanager
    def _writing(self, name: str) -> Iterator[None]:
        """Make the folder of a file where there are folders, which object stores have not."""
        with self._saying("written", name):
            if self.url.partition("://")[0] not in _ARROW_SCHEMES:
                path = f"{self._files.base_path}{name}"
                self._files.base_fs.create_dir(path.rpartition("/")[0], recursive=True)
            yield

    @contextmanager
    def _saying(self, verb: str, name: str) -> Iterator[None]:
        """Make every failure a :class:`StorageError` that says what could not be done to which file."""
        try:
            yield
        except Exception as error:  # each filesystem has errors of its own
            raise StorageError(f"cannot be {verb} ({reason_of(error)})", f"{self.url}/{name}".rstrip("/"),
                               "Is the storage reachable, and may this machine use it?") from error  # fmt: skip


def reason_of(error: Exception) -> str:
    """Say what went wrong with a storage, in one line."""
    text = " ".join(str(error).split())
    return text if isinstance(error, OSError) and text else f"{type(error).__name__}: {text}"
