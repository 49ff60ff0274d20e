"""A folder at a URL: s3:// and gs:// by the clients that come with pyarrow, all others by fsspec."""

from __future__ import annotations

from functools import cached_property
from pathlib import Path
from typing import Any

from hncse_ray.errors import StorageError

_ARROW_SCHEMES = ("s3", "gs")
_GCS_RETRY_S = 60  # Google's client goes on for 15 minutes by default; whoever calls here tries again anyway


def is_url(path: str) -> bool:
    """Say whether a storage path is a URL rather than a folder."""
    return "://" in path


def is_inside(name: str) -> bool:
    """Say whether a name that was read from a storage is the path of a file below the folder that it is joined to.

    In a bucket a name is any text: ``../x``, ``/x`` or one that no filesystem takes are names too.
    """
    return name.isprintable() and not {"", ".", ".."} & set(name.split("/"))


class Remote:
    """A folder at a URL. Files in it are named by their path below it; pickles as the URL.

    Args:
        url: such as ``s3://bucket/folder``. Who may use it is for the usual places of its service to say, such as
            AWS_ACCESS_KEY_ID, AWS_ENDPOINT_URL, ``~/.aws``, the role of the machine, or GOOGLE_APPLICATION_CREDENTIALS.

    Raises:
        StorageError: the URL makes no sense, or what reads its kind is not installed.
    """

    def __init__(self, url: str) -> None:
        self.url = url.rstrip("/")
        self._opened  # noqa: B018  so that a bad URL is told at once

    def __reduce__(self) -> tuple[object, ...]:
        """Pickle as the URL; the copy is opened when it is used, and says then if it cannot be."""
        return _closed, (self.url,)

    @cached_property
    def _opened(self) -> tuple[Any, str]:
        """The filesystem, and the folder's path in it."""
        import fsspec
        from fsspec.implementations.arrow import ArrowFSWrapper
        from pyarrow.fs import FileSystem

        scheme, _, rest = self.url.partition("://")
        if not rest or (scheme in _ARROW_SCHEMES and rest.startswith("/")):
            raise StorageError("names no bucket or folder", self.url, "Give a URL such as s3://bucket/folder")
        if "?" in self.url or "#" in self.url:
            raise StorageError("has a query or a fragment", self.url, "Give bucket and folder only; the rest belongs"
                               " into the environment, such as AWS_ENDPOINT_URL")  # fmt: skip
        try:
            if scheme in _ARROW_SCHEMES:
                query = f"?retry_limit_seconds={_GCS_RETRY_S}" if scheme == "gs" else ""
                filesystem, path = FileSystem.from_uri(self.url + query)
                return ArrowFSWrapper(filesystem), path.strip("/")
            filesystem, path = fsspec.core.url_to_fs(self.url)
            return filesystem, path.rstrip("/")
        except ImportError as error:
            raise StorageError(f"cannot be opened: {error}", self.url, f"Install what fsspec needs for {scheme}://,"
                               " on every node") from error  # fmt: skip
        except Exception as error:  # each filesystem has errors of its own
            raise StorageError(f"cannot be opened ({_reason(error)})", self.url,
                               "Give a URL such as s3://bucket/folder, or a folder") from error  # fmt: skip

    def read(self, name: str) -> bytes | None:
        """Return a file's content; None if there is no such file.

        Raises:
            StorageError: the storage cannot be reached.
        """
        filesystem, folder = self._opened
        try:
            content: bytes = filesystem.cat_file(f"{folder}/{name}")
        except (FileNotFoundError, NotADirectoryError):
            return None
        except Exception as error:
            raise self._failure("read", name, error) from error
        return content

    def write(self, name: str, content: bytes) -> None:
        """Write a small file.

        Raises:
            StorageError: it cannot be written.
        """
        filesystem, folder = self._opened
        try:
            self._make_parent(name)
            filesystem.pipe_file(f"{folder}/{name}", content)
        except Exception as error:
            raise self._failure("written", name, error) from error

    def upload(self, file: Path, name: str) -> None:
        """Copy a local file to here.

        Raises:
            StorageError: it cannot be written.
        """
        filesystem, folder = self._opened
        try:
            self._make_parent(name)
            filesystem.put_file(str(file), f"{folder}/{name}")
        except Exception as error:
            raise self._failure("written", name, error) from error

    def download(self, name: str, file: Path) -> None:
        """Copy a file from here; its folder is there.

        Raises:
            StorageError: it cannot be read, or not be written locally.
        """
        filesystem, folder = self._opened
        try:
            filesystem.get_file(f"{folder}/{name}", str(file))
        except Exception as error:
            raise self._failure("fetched", name, error) from error

    def names(self, below: str = "") -> list[str]:
        """Return the names of all files, or of those in one folder, sorted; without such as are no path below it.

        Raises:
            StorageError: the storage cannot be reached.
        """
        filesystem, folder = self._opened
        place = f"{folder}/{below}".rstrip("/")
        try:
            found = _find(filesystem, place)
        except (FileNotFoundError, NotADirectoryError):
            return []
        except Exception as error:
            raise self._failure("listed", below, error) from error
        start = folder.strip("/") + "/"
        return sorted(name for path in found if is_inside(name := path.strip("/").removeprefix(start)))

    def delete(self, name: str) -> None:
        """Delete a file; that it is not there is no error.

        Raises:
            StorageError: the storage cannot be reached.
        """
        filesystem, folder = self._opened
        try:
            filesystem.rm_file(f"{folder}/{name}")
        except FileNotFoundError:
            return
        except Exception as error:
            raise self._failure("deleted", name, error) from error

    def _make_parent(self, name: str) -> None:
        """Make the folder of a file where there are folders; object stores have none."""
        filesystem, folder = self._opened
        if self.url.partition("://")[0] not in _ARROW_SCHEMES:
            filesystem.makedirs(f"{folder}/{name}".rpartition("/")[0], exist_ok=True)

    def _failure(self, verb: str, name: str, error: Exception) -> StorageError:
        return StorageError(f"cannot be {verb} ({_reason(error)})", f"{self.url}/{name}".rstrip("/"),
                            "Is the storage reachable, and may this machine use it?")  # fmt: skip


def _find(filesystem: Any, place: str) -> list[str]:
    """Return the paths of all files below a folder.

    pyarrow is asked for all at once: of Google's storage it lists a single level without the folders that nobody made.
    """
    from fsspec.implementations.arrow import ArrowFSWrapper
    from pyarrow.fs import FileSelector, FileType

    if isinstance(filesystem, ArrowFSWrapper):
        found = filesystem.fs.get_file_info(FileSelector(place, allow_not_found=True, recursive=True))
        return [info.path for info in found if info.type == FileType.File]
    filesystem.invalidate_cache()
    paths: list[str] = filesystem.find(place)
    return paths


def _closed(url: str) -> Remote:
    remote = Remote.__new__(Remote)
    remote.url = url
    return remote


def _reason(error: Exception) -> str:
    text = " ".join(str(error).split())
    return text if isinstance(error, OSError) and text else f"{type(error).__name__}: {text}"
