"""Documents in files of their own: plain text, Markdown and HTML as a title and paragraphs."""

from __future__ import annotations

import os
import re
import unicodedata
import warnings
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import TYPE_CHECKING, Literal

from hncse_ray.errors import DataError, counted
from hncse_ray.reading.kinds import ending_of
from hncse_ray.reading.lines import explained, is_blank, opened
from hncse_ray.reading.urls import File, UrlFile, files_at

if TYPE_CHECKING:
    from bs4 import BeautifulSoup, Tag

DocumentKind = Literal["text", "markdown", "html"]

DOCUMENT_ENDINGS: dict[str, DocumentKind] = {
    ".txt": "text", ".text": "text",
    ".md": "markdown", ".markdown": "markdown",
    ".html": "html", ".htm": "html", ".xhtml": "html",
}  # fmt: skip
"""Lower case; ``.gz`` may follow each."""

MAX_DOCUMENT = 32 * 2**20
"""Bytes of a file that is one document, unpacked."""

_CONVERT = "Convert it, for example with iconv"
_PARAGRAPH_END = re.compile(r"\n\s*\n")
_FRONT_MATTER = re.compile(r"---[ \t]*\n(.*?\n)?(?:---|\.\.\.)[ \t]*(?:\n|$)", re.DOTALL)
_ENDED = (".", "!", "?")
_MAX_TITLE_WORDS = 25  # of a plain text's first line that is taken for its title
_SENTENCE_END = re.compile(r"(?<![.!?])[.!?]++(?=\s|$)")

# What is no running text, or is on every page of a site.
_DROPPED = (
    "script, style, noscript, template, svg, math, iframe, object, canvas, title, meta, link, base, nav, aside, footer,"
    " form, button, select, textarea, dialog, pre, a.headerlink, wbr, [hidden], [role=navigation], [role=banner],"
    " [role=contentinfo], [role=search]"
)
_BLOCKS = [
    "address", "article", "blockquote", "body", "caption", "center", "dd", "details", "div", "dl", "dt", "fieldset",
    "figcaption", "figure", "header", "hr", "li", "main", "ol", "p", "section", "summary", "table", "tr", "ul",
]  # fmt: skip
_HEADINGS = ["h1", "h2", "h3", "h4", "h5", "h6"]
_BLOCK_END = "\x1e"


@dataclass(frozen=True, slots=True)
class Document:
    """One document.

    Attributes:
        title: in one line; None where it has none.
        paragraphs: each in one line, none empty, the title not among them.
    """

    title: str | None
    paragraphs: tuple[str, ...]


class DocumentError(DataError):
    """A file is no document that can be read.

    Attributes:
        reason: ``empty``, ``too_long``, ``undecodable`` or ``malformed``.
    """

    def __init__(self, what: str, where: str = "", hint: str = "", reason: str = "malformed") -> None:
        super().__init__(what, where, hint)
        self.reason = reason


def titled(*parts: str | None) -> str:
    """Join a title and a text, or what there is of them, to "title. text", without a second full stop."""
    *firsts, last = [part for part in parts if part] or [""]
    return " ".join([*map(_ended, firsts), last])


def document_kind(path: File) -> DocumentKind | None:
    """Return what kind of document a file's name says it is; None for another."""
    return DOCUMENT_ENDINGS.get(ending_of(path)[1])


def documents_in(folder: Path | str, others: Counter[str] | None = None) -> list[File]:
    """Return the documents in a folder and those below it, in the order of their paths.

    Hidden files and folders, and links to folders, are left out.

    Args:
        folder: one here, or the URL of one.
        others: gains how many files of other kinds there are, by ending.

    Raises:
        DataError: a folder cannot be read, or there is none.
    """

    def refuse(error: OSError) -> None:
        raise DataError(f"cannot be read ({error.strerror or error})", str(error.filename or folder))

    found: list[File] = []
    if isinstance(folder, str):
        found += [file for file in files_at(folder) if "/." not in f"/{file.url.removeprefix(folder)}"]
    else:
        for where, folders, names in os.walk(folder, onerror=refuse):
            folders[:] = [name for name in folders if not name.startswith(".")]
            found += [Path(where, name) for name in names if not name.startswith(".")]
    if others is not None:
        others.update(PurePath(str(file)).suffix.lower() or "no ending" for file in found if not document_kind(file))
    documents = sorted(
        (file for file in found if document_kind(file) and (isinstance(file, UrlFile) or file.is_file())),
        key=lambda file: PurePath(str(file)).parts,
    )
    if not documents:
        hint = "A folder's .txt, .md and .html files are read; of JSONL, CSV and Parquet name the file itself"
        only = f", only {counted(len(found), 'file')} of other kinds" if found else ""
        raise DataError(f"has no documents{only}", str(folder), hint)
    return documents


def read_document(path: File, kind: DocumentKind) -> Document:
    """Read a file as one document.

    HTML: the title is ``<title>``, else the first ``<h1>``; scripts, styles, navigation, forms and ``<pre>`` are left
    out. Markdown: the title is that of the front matter, else the first ``#`` heading; code blocks are left out.
    Plain text: paragraphs are parted by empty lines, and a first paragraph of one short line and one sentence at most
    is the title.

    Raises:
        DocumentError: the file is empty, too large, in another encoding, or not what its name says.
        DataError: it cannot be read.
    """
    data = _bytes(path)
    if not data.strip():
        raise DocumentError("is empty", str(path), reason="empty")
    if kind == "html":
        document = _read_html(_decoded_html(data, path), path)
    elif kind == "markdown":
        document = _read_markdown(_decoded(data, path))
    else:
        document = _read_text(_decoded(data, path))
    if not document.paragraphs and document.title is None:
        raise DocumentError("has no text but markup", str(path), reason="empty")
    return document


def paragraphs_of(text: str) -> tuple[str, ...]:
    """Return the paragraphs of a plain text, which empty lines part."""
    text = unicodedata.normalize("NFC", text.replace("\r\n", "\n").replace("\r", "\n"))
    return tuple(_shown(_PARAGRAPH_END.split(text)))


def _bytes(path: File) -> bytes:
    with explained(path), opened(path) as stream:
        data = stream.read(MAX_DOCUMENT + 1)
    if len(data) > MAX_DOCUMENT:
        what = f"is larger than the {MAX_DOCUMENT // 2**20} MiB that one document may be"
        hint = "Split it; a file of a sentence a line is read by corpus.source=text"
        raise DocumentError(what, str(path), hint, "too_long")
    return data


def _decoded(data: bytes, path: File) -> str:
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError:
        raise DocumentError("is not UTF-8", str(path), _CONVERT, "undecodable") from None
    return _seen(text, path)


def _decoded_html(data: bytes, path: File) -> str:
    """Decode as the byte order mark or the page itself says, else as UTF-8, else as browsers do."""
    from bs4.dammit import EncodingDetector

    data, marked = EncodingDetector.strip_byte_order_mark(data)
    declared = EncodingDetector.find_declared_encoding(data, is_html=True)
    for encoding in (marked, "utf-8", declared, "windows-1252"):
        try:
            if encoding:
                return _seen(data.decode(encoding), path)
        except (UnicodeDecodeError, LookupError):
            continue
    raise DocumentError("is not UTF-8 and declares no other encoding", str(path), _CONVERT, "undecodable")


def _seen(text: str, path: File) -> str:
    if "\0" in text:
        raise DocumentError("is binary, with zero bytes in it", str(path), reason="undecodable")
    return text


def _read_text(text: str) -> Document:
    paragraphs = paragraphs_of(text)
    first, _, rest = text.lstrip().partition("\n")
    first = " ".join(unicodedata.normalize("NFC", first).split())
    short = len(first.split()) <= _MAX_TITLE_WORDS and len(first) <= 10 * _MAX_TITLE_WORDS
    alone = not rest.partition("\n")[0].strip() and len(_SENTENCE_END.findall(first)) <= 1
    ended = first.endswith(_ENDED) or first[-1:].isalnum()  # a comma or a colon says that it goes on
    if short and alone and ended and len(paragraphs) > 1 and paragraphs[0] == first:
        return Document(first, paragraphs[1:])
    return Document(None, paragraphs)


def _read_markdown(text: str) -> Document:
    from markdown_it import MarkdownIt

    title = None
    if front := _FRONT_MATTER.match(text):
        text = text[front.end() :]
        if named := re.search(r"^title:[ \t]*(\S.*)$", front[1] or "", re.MULTILINE):
            title = named[1].strip().strip("\"'") or None
    return _document(_soup(MarkdownIt("commonmark").enable("table").render(text)), title)


def _read_html(text: str, path: File) -> Document:
    soup = _soup(text)
    if soup.find(True) is None:
        hint = "If it is plain text, rename it to .txt"
        raise DocumentError("is no HTML: there is no element in it", str(path), hint)
    title = soup.find("title")
    return _document(soup, None if title is None else _line(title.get_text()))


def _soup(html: str) -> BeautifulSoup:
    from bs4 import BeautifulSoup, MarkupResemblesLocatorWarning, XMLParsedAsHTMLWarning

    with warnings.catch_warnings():  # XHTML is read as HTML, and what is no HTML has an error of its own
        warnings.simplefilter("ignore", MarkupResemblesLocatorWarning)
        warnings.simplefilter("ignore", XMLParsedAsHTMLWarning)
        return BeautifulSoup(html.replace(_BLOCK_END, " "), "html.parser")


def _document(soup: BeautifulSoup, title: str | None) -> Document:
    """Read the running text of a page; its first heading is its title where it has no other."""
    for element in soup.select(_DROPPED):
        element.decompose()
    banners = [header.extract() for header in soup.select("body > header")]  # a site's, but for its heading
    root = soup.select_one("main, [role=main]") or soup
    headings = [found for part in (root, *banners) if (found := part.find("h1")) is not None]
    if headings and (line := _line(headings[0].get_text())):
        title = title or line
        if line in title:
            headings[0].decompose()  # else the title would stand in the text too
    return Document(title, tuple(_blocks(root)))


def _blocks(root: Tag) -> Iterator[str]:
    """Yield the text of each block, headings as sentences."""
    for heading in root.find_all(_HEADINGS):
        heading.replace_with(f"{_BLOCK_END}{_ended(_line(heading.get_text()) or '')}{_BLOCK_END}")
    for block in root.find_all(_BLOCKS):
        block.insert(0, _BLOCK_END)
        block.append(_BLOCK_END)
    for between in root.find_all(["br", "td", "th"]):
        between.insert_before(" ")
    yield from _shown(unicodedata.normalize("NFC", root.get_text()).split(_BLOCK_END))


def _shown(blocks: list[str]) -> Iterator[str]:
    for block in blocks:
        if line := _line(block):
            yield line


def _line(text: str) -> str | None:
    line = " ".join(unicodedata.normalize("NFC", text).split())
    return None if is_blank(line) else line


def _ended(text: str) -> str:
    return text if not text or text.endswith(_ENDED) else f"{text}."
