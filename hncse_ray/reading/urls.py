"""Files at URLs, read as those on a disk are: from where one likes, again where that fails, and never cut unnoticed.

Web servers are asked by Python's own client, S3, Google's storage and what fsspec knows as ``hncse_ray.storage`` does.
"""

from __future__ import annotations

import http.client
import io
import os
import re
import socket
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path, PurePosixPath
from typing import Any, Literal, TypeVar
from urllib.parse import quote, urlsplit

from hncse_ray.errors import DataError, HncseError
from hncse_ray.storage import flaw_of, is_url, open_filesystem, reason_of, without_secret

PATIENCE_S = 30.0  # without a byte of a web server; the clients of S3 and Google's storage have limits of their own
PAUSES_S = (1.0, 4.0)  # before a second and a third try

_WEB = ("http", "https")
_BLOCK = 2**22  # read at a time: for S3 each is a request
_AWS = (
    "Check the name and who may read it: AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, ~/.aws or the machine's role;"
    " of another vendor's storage AWS_ENDPOINT_URL too"
)
_HINTS = {
    "s3": _AWS,
    "gs": "Check the name and who may read it: GOOGLE_APPLICATION_CREDENTIALS",
    "hf": "Check the name and who may read it: HF_TOKEN",
}
_WEB_HINT = (
    "Check the address; of web servers what is open to all is read, through the proxy of HTTPS_PROXY where that is set"
)
_Result = TypeVar("_Result")


@dataclass(frozen=True, slots=True)
class UrlFile:
    """A file at a URL as it was found. Who reads files uses of it what it uses of a path.

    Attributes:
        url: where it is.
        size: its bytes.
        version: what tells it from another content at this place, such as a time; empty if the storage says nothing.
        ranges: whether it can be read from any place. If not, it is fetched from its beginning each time.
    """

    url: str
    size: int
    version: str
    ranges: bool = True

    def __str__(self) -> str:
        """Return the URL."""
        return self.url

    @property
    def suffix(self) -> str:
        """The ending of its name."""
        return PurePosixPath(self.url).suffix

    def open(self, mode: Literal["rb"] = "rb", buffering: int = _BLOCK) -> io.BufferedReader:  # noqa: ARG002  as of a path
        """Open it for reading. Whoever reads gets a :class:`DataError` where that fails in the end."""
        return io.BufferedReader(_Stream(self), buffering)


File = Path | UrlFile


def is_remote(path: str) -> bool:
    """Say whether a path is a URL that is not of this machine's files."""
    return is_url(path) and not path.startswith("file://")


def local_path(path: str) -> str:
    """Return the path of a file of this machine that was given as a path or as a ``file://`` URL.

    Raises:
        DataError: the URL is of another machine.
    """
    if not path.startswith("file://"):
        return os.path.expanduser(path)
    try:
        url = urlsplit(path)
    except ValueError:
        raise DataError(flaw_of(path), path, "A file here is file:///folder/name, with three strokes") from None
    if url.netloc not in ("", "localhost"):
        raise DataError("is of another machine", path, "A file here is file:///folder/name, with three strokes")
    return urllib.request.url2pathname(url.path)


def files_at(url: str) -> list[UrlFile]:
    """Return the file at a URL, those that a glob means, or all in and below a folder whose URL ends in a stroke.

    They are in the order of their names.

    Raises:
        DataError: it cannot be reached or does not exist, or no file is there.
        StorageError: the URL makes no sense, or what reads its kind is not installed.
    """
    if flaw := flaw_of(url):
        shown = without_secret(url)
        raise DataError(flaw, shown, f"Leave it out, or fetch the file first. {_hint(shown)}")
    if urlsplit(url).scheme in _WEB:
        if url.endswith("/") or "*" in url:
            raise DataError("is no file, and what else a web server has is not known", url, "Name its files")
        return [_patiently(url, lambda: _found(url))]
    filesystem, path = _located(url)
    return _patiently(url, lambda: [_of(info, url, path) for info in _listed(filesystem, path, url)])


def _located(url: str) -> tuple[Any, str]:
    scheme, _, rest = url.partition("://")
    root, _, name = rest.partition("/")
    filesystem, base = _filesystem(f"{scheme}://{root}")
    return filesystem, f"{base}/{name}" if base else name


_filesystem = lru_cache(maxsize=8)(open_filesystem)


def _listed(filesystem: Any, path: str, url: str) -> list[Any]:
    """Return pyarrow's facts of files, sorted by path."""
    from fsspec.utils import glob_translate
    from pyarrow.fs import FileSelector, FileType

    is_folder, sign = path.endswith("/"), re.search(r"[*[]", path)
    if not is_folder:
        info = filesystem.get_file_info(path)
        if info.type == FileType.File:
            return [info]
        if not sign:
            if info.type == FileType.NotFound:
                raise DataError("no such file", url, _hint(url))
            hint = f"Name its files, such as {url}/*.parquet, or end it in / for a folder of documents"
            raise DataError("is a folder, not a file", url, hint)
    base = path if sign is None else path[: path.rindex("/", 0, sign.start()) + 1]
    recursive = sign is None or "/" in path[sign.start() :]
    found = filesystem.get_file_info(FileSelector(base.rstrip("/"), allow_not_found=True, recursive=recursive))
    files = [info for info in found if info.type == FileType.File]
    if sign is not None:
        matches = re.compile(glob_translate(path)).match
        files = [info for info in files if matches(info.path)]
    if not files:
        raise DataError("matches no file" if sign else "has no file", url, _hint(url))
    return sorted(files, key=lambda info: str(info.path))


def _of(info: Any, url: str, path: str) -> UrlFile:
    """Return a file of a listing; ``url`` is one whose path in the storage is ``path``."""
    own = url.removesuffix(path) + info.path
    return UrlFile(own, info.size, "" if info.mtime_ns is None else str(info.mtime_ns))


def _found(url: str) -> UrlFile:
    """Ask a web server for the first byte of a file, and so for what there is to know of it."""
    try:
        with _ask(url, "bytes=0-0") as answer:
            in_parts = answer.status == 206
            told = answer.headers.get("Content-Range" if in_parts else "Content-Length", "").rpartition("/")[2]
            if not told.isdigit():
                raise DataError("comes without its length, so that nobody would notice an end too soon", url,
                                "Fetch the file first")  # fmt: skip
            if answer.headers.get_content_type() == "text/html" and not url.lower().endswith((".html", ".htm")):
                raise DataError("is a web page", url, "Give the address of the file itself")
            return UrlFile(url, int(told), _version(answer), in_parts)
    except urllib.error.HTTPError as error:
        if error.code == 416:  # there is no first byte
            return UrlFile(url, 0, _version(error))
        raise


def _ask(url: str, wanted: str) -> http.client.HTTPResponse:
    headers = {"Range": wanted, "Accept-Encoding": "identity", "User-Agent": "hncse_ray"}
    asked = urllib.request.Request(quote(url, safe=":/%@+,;=&!$'()~[]"), headers=headers)
    answer: http.client.HTTPResponse = urllib.request.urlopen(asked, timeout=PATIENCE_S)
    return answer


def _version(answer: http.client.HTTPResponse | urllib.error.HTTPError) -> str:
    return answer.headers.get("ETag") or answer.headers.get("Last-Modified") or ""


class _Stream(io.RawIOBase):
    """A file at a URL. It is opened where it is read, and again there where reading fails."""

    def __init__(self, file: UrlFile) -> None:
        self._file, self._at = file, 0
        self._opened: Any = None

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        at = offset + {os.SEEK_SET: 0, os.SEEK_CUR: self._at, os.SEEK_END: self._file.size}[whence]
        if at != self._at:
            self._drop()
            self._at = at
        return at

    def readinto(self, buffer: Any) -> int:
        wanted = min(len(buffer), self._file.size - self._at)
        if wanted <= 0:
            return 0
        part = _patiently(self._file.url, lambda: self._read(wanted), self._drop)
        buffer[: len(part)] = part
        self._at += len(part)
        return len(part)

    def close(self) -> None:
        self._drop()
        super().close()

    def _drop(self) -> None:
        if self._opened is not None:
            self._opened.close()
            self._opened = None

    def _read(self, wanted: int) -> bytes:
        if self._opened is None:
            is_web = urlsplit(self._file.url).scheme in _WEB
            self._opened = self._open_on_web() if is_web else self._open_in_storage()
        part: bytes = getattr(self._opened, "read1", self._opened.read)(wanted)
        if not part:
            raise OSError(f"it ends after {self._at:,} of its {self._file.size:,} bytes")
        return part

    def _open_on_web(self) -> http.client.HTTPResponse:
        answer = _ask(self._file.url, f"bytes={self._at}-")
        if (now := _version(answer)) and self._file.version and now != self._file.version:
            answer.close()
            raise DataError("changed while it was read", self._file.url, "Begin again")
        left = self._at if answer.status == 200 else 0
        while left and (part := answer.read1(min(left, _BLOCK))):
            left -= len(part)
        return answer

    def _open_in_storage(self) -> Any:
        filesystem, path = _located(self._file.url)
        file = filesystem.open_input_file(path)
        file.seek(self._at)
        return file


def _patiently(url: str, do: Callable[[], _Result], between: Callable[[], None] = lambda: None) -> _Result:
    """Do it; with a web server again after each of the pauses if it fails for a reason that may pass."""
    pauses_s = PAUSES_S if urlsplit(url).scheme in _WEB else ()  # other clients have tried again themselves
    number = 0
    while True:
        try:
            return do()
        except HncseError:
            raise
        except Exception as error:  # each filesystem has errors of its own
            between()
            if _is_final(error) or number == len(pauses_s):
                raise _told(error, url, f", {number + 1} times" if number else "") from error
        time.sleep(pauses_s[number])
        number += 1


def _is_final(error: Exception) -> bool:
    if isinstance(error, urllib.error.HTTPError):
        return 400 <= error.code < 500 and error.code not in (408, 429)
    if isinstance(error, urllib.error.URLError) and isinstance(reason := error.reason, socket.gaierror):
        return reason.errno != socket.EAI_AGAIN
    return isinstance(error, (FileNotFoundError, PermissionError))


def _told(error: Exception, url: str, tries: str = "") -> DataError:
    found: Any = error.reason if type(error) is urllib.error.URLError else error
    what = f"cannot be read{tries} ({reason_of(found) if isinstance(found, Exception) else found})"
    if isinstance(found, TimeoutError):
        what = f"no byte came within {PATIENCE_S:g} s{tries}"
    elif isinstance(error, FileNotFoundError) or getattr(error, "code", 0) in (404, 410):
        what = "no such file"
    return DataError(what, url, _hint(url))


def _hint(url: str) -> str:
    return _HINTS.get(scheme := urlsplit(url).scheme, _WEB_HINT if scheme in _WEB else "Is the storage reachable?")
