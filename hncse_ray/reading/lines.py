"""The lines of a text file, plain or .gz, in bounded memory."""

from __future__ import annotations

import contextlib
import gzip
import hashlib
import io
import os
import sys
import unicodedata
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from hncse_ray.errors import DataError
from hncse_ray.reading.kinds import check_file, ending_of
from hncse_ray.reading.urls import File, UrlFile

UNPARTED = (
    "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3005\u3007\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff"
    "\U00020000-\U0003ffff"
)
"""Scripts that part no words, for a class of a regular expression: Chinese, Japanese, Thai, Lao, Burmese, Khmer."""

# Letters and signs that are drawn as nothing: Hangul fillers and the empty pattern of Braille.
_BLANK = frozenset("\u115f\u1160\u3164\uffa0\u2800")
_UTF_16 = ("\udcff\udcfe", "\udcfe\udcff")  # its byte order marks, read as UTF-8
_CHUNK = 2**16
Span = tuple[int, int]  # from, and up to
_MOST = 2**31 - 2  # what a stream's readline takes on every platform


@contextlib.contextmanager
def explained(path: File) -> Iterator[None]:
    """Turn what goes wrong while a file is read into a DataError that names it."""
    try:
        yield
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise DataError(f"is not a whole gzip file ({error})", str(path), "Copy or download it again") from None
    except OSError as error:
        raise DataError(f"cannot be read ({error.strerror or error})", str(path)) from None


def text_lines(
    path: File | None, *, limit: int | None = None, encoding: str = "utf-8-sig", span: Span | None = None
) -> Iterator[str | None]:
    r"""Yield every line without its end; a line ends at ``\n``, ``\r\n`` or ``\r``, and nowhere else.

    Args:
        path: the file; ``.gz`` is unpacked. None = standard input.
        limit: characters of a line at most.
        encoding: of the text.
        span: the bytes to read, one of :func:`line_spans`; None = all.

    Yields:
        The line. Bytes that are not of the encoding stand in it as lone surrogates, so that nothing moves; see
        :func:`is_unicode`. None for a line above the limit, which is never held whole.

    Raises:
        DataError: the file is missing, a folder, empty, UTF-16 or cannot be read.
    """
    if path is not None:
        check_file(path)
    most = min(limit if limit is not None else _MOST, _MOST)
    if span is not None and span[0]:
        encoding = encoding.removesuffix("-sig")  # a mark within the text is a character
    with explained(path or Path("standard input")), opened(path, span) as stream:
        text = io.TextIOWrapper(stream, encoding=encoding, errors="surrogateescape", newline=None)
        first = span is None or not span[0]
        try:
            while line := text.readline(most + 1):
                if first and line.startswith(_UTF_16):
                    hint = "Convert it, for example by iconv -f UTF-16 -t UTF-8"
                    raise DataError("is UTF-16, not UTF-8", str(path or "standard input"), hint)
                first = False
                if line.endswith("\n"):
                    yield line[:-1]
                elif len(line) <= most:
                    yield line
                else:
                    while line and not line.endswith("\n"):
                        line = text.readline(_CHUNK)
                    yield None
        finally:
            text.detach()  # the wrapper would close standard input when it is collected


def line_spans(path: File, size: int) -> Iterator[Span]:
    """Yield the spans of bytes, of about this size, that a text is to be read in; each ends where a line does.

    Raises:
        DataError: the file cannot be read.
    """
    with explained(path), path.open("rb", buffering=_CHUNK) as stream:
        start, end = 0, stream.seek(0, os.SEEK_END)
        while start < end:
            stop = min(start + size, end)
            stream.seek(stop - 1)
            while stop < end and (part := stream.read(_CHUNK)):
                if (found := part.find(b"\n")) >= 0:  # stands for nothing else in UTF-8
                    stop = stream.tell() - len(part) + found + 1
                    break
                stop = stream.tell()
            yield start, stop
            start = stop


def content_identity(path: File) -> bytes:
    """Return what tells a file's content from another: a hash, or of a file at a URL what its storage says of it.

    Raises:
        DataError: the file cannot be read.
    """
    if isinstance(path, UrlFile) and path.version:
        return f"{path.url} {path.size} {path.version}".encode()
    with explained(path), path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").digest()


def read_lines(path: str | Path | None, *, encoding: str = "utf-8-sig") -> list[str]:
    """Return every line of a text, none dropped or changed, so that rows keep their place.

    Args:
        path: a text file, plain or .gz; None = standard input.
        encoding: of the text.

    Raises:
        DataError: the file cannot be read, or a line is not in the encoding.
    """
    lines = []
    for number, line in enumerate(
        text_lines(None if path is None else Path(os.path.expanduser(path)), encoding=encoding), start=1
    ):
        if line is None or not is_unicode(line):
            where = f"{path or 'standard input'}:{number}"
            raise DataError("is not UTF-8", where, "Convert it, for example with iconv")
        lines.append(line)
    return lines


def is_unicode(text: str) -> bool:
    """Return False for a text with a lone surrogate: from JSON escapes, or a byte that was no UTF-8."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def is_blank(text: str) -> bool:
    """Return whether there is nothing to see: no letter, digit, punctuation or symbol.

    White space, zero-width and control characters, private use, unassigned ones and marks without a base are nothing.
    """
    return not any(unicodedata.category(c)[0] in "LNPS" and c not in _BLANK for c in text)


class _Bytes(io.RawIOBase):
    """A span of a file."""

    def __init__(self, file: BinaryIO, span: Span) -> None:
        file.seek(span[0])
        self._file, self._left = file, span[1] - span[0]

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        part = self._file.read(min(len(buffer), self._left))
        buffer[: len(part)] = part
        self._left -= len(part)
        return len(part)


@contextlib.contextmanager
def opened(path: File | None, span: Span | None = None) -> Iterator[BinaryIO | gzip.GzipFile | io.BufferedReader]:
    """Open a file, unpacked where it is .gz, or standard input.

    Args:
        path: the file; None = standard input.
        span: the bytes to read of one that is not packed; None = all.
    """
    if path is None:
        yield sys.stdin.buffer
        return
    with path.open("rb") as plain:
        if ending_of(path)[0]:
            with gzip.open(plain, "rb") as packed:
                yield packed
        else:
            yield plain if span is None else io.BufferedReader(_Bytes(plain, span), _CHUNK)
