"""Python source files as sentences of docstrings, one-line summaries and code, by parsing, never importing.

Standard library only, and a program of its own: :mod:`hncse_ray.corpus.python_docs` starts this file as
worker processes, which so begin in some 30 ms and never run the caller's ``__main__``. A worker reads a JSON
request ``{"files": [...], "what": "sentences"}`` (or ``summaries``, ``codes``) from standard input and answers in
JSON.
"""

from __future__ import annotations

import ast
import json
import re
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator
from inspect import cleandoc
from typing import Any, Literal, NamedTuple

MIN_WORDS, MAX_WORDS = 4, 60
MIN_SUMMARY_WORDS = 3  # of a summary that is paired with its code
_MIN_LETTERS = 0.82  # share of the characters that are not white space

# Blocks under these directives are prose; under any other (code-block, math, plot, ...) they are dropped.
_PROSE_DIRECTIVES = {"note", "warning", "seealso", "important", "tip", "hint", "caution", "attention"}

_DIRECTIVE = re.compile(r"\.\.\s+(?:([\w:-]+)::|\S)")
_FENCE = re.compile(r"(```|~~~)")
_DOCTEST = re.compile(r"(>>>|\.\.\. |In \[\d+\]:|\$ )")
_UNDERLINE = re.compile(r"([=\-~^\"'`#*+._:])\1{2,}$")
_TABLE = re.compile(r"[|+]|[=-]{2,}\s+[=-]{2,}")
_HEADER = re.compile(r"[A-Z][A-Za-z]*(?: [A-Za-z]+){0,2}:$")
_BULLET = re.compile(r"(?:[-*+•]|\(?[0-9a-z]{1,2}[.)]|#\.)\s+")
_FIELD = re.compile(r":(\w+)[^:]*:\s*")
_GOOGLE_ARG = re.compile(r"`{0,2}\*{0,2}[A-Za-z_][\w.*]*`{0,2}(?:\s*\([^()]*(?:\([^()]*\)[^()]*)*\))?:\s+")
_NUMPY_ARG = re.compile(r"`{0,2}\*{0,2}[A-Za-z_][\w.*, `]*\s+:(\s|$)")
_ITEM = re.compile(r"(?:" + "|".join(p.pattern for p in (_BULLET, _FIELD, _GOOGLE_ARG)) + r")")

_ROLE = re.compile(r":[\w:+.-]+:`([^`]*)`")
_ROLE_TEXT = re.compile(r"^(.*?)\s*<[^<>]*>$", re.DOTALL)
_LINK = re.compile(r"`([^`<]*?)\s*<[^>]*>`_{1,2}")
_MARKDOWN_LINK = re.compile(r"!?\[([^\]]*)\]\((?:[^()\s]|\([^()]*\))*\)")
_FOOTNOTE = re.compile(r"\s*\[[\w#*.-]+\]_")
_QUOTED_LINK = re.compile(r"\[`+([^`\]]*)`+\]")
_BACKTICKS = re.compile(r"`+_{0,2}")
_EMPHASIS = re.compile(r"(?<![\w*])(\*{1,2})(?=\S)([^*]+?)(?<=\S)\1(?![\w*])")
_PLACEHOLDER = re.compile(r"\{\w*\}")
_SENTENCE_END = re.compile(r"(?<=[.!?])[\"')]?\s+(?=[\"'(]?[A-Z])")
_ABBREVIATION = re.compile(
    r"(?:\b(?:e\.g|i\.e|cf|vs|resp|eq|eqs|fig|no|al|approx|ref|vol|dr|mr|w\.r\.t)|\b[A-Z])\.$", re.I
)
_NOT_PROSE = re.compile(r"[\\{}<>|=$_^~\[\]]{2}|https?:|\\\w|[$\\]|__")


class Summary(NamedTuple):
    """What one public function or class says of itself first."""

    name: str
    summary: str
    is_method: bool


class Code(NamedTuple):
    """What a public function says of itself first, and its signature and body without decorators and docstring."""

    name: str
    summary: str
    code: str


What = Literal["sentences", "summaries", "codes"]


def summaries_of(tree: ast.Module) -> Iterator[Summary]:
    """Yield the first sentence of every public function, class and method that has a usable one."""
    for name, docstring, is_method, _ in _documented(tree):
        if _is_public(name) and (summary := summarise(docstring)):
            yield Summary(name.rpartition(".")[2], summary, is_method)


def codes_of(tree: ast.Module) -> Iterator[Code]:
    """Yield every public function and method that has a usable summary and does something."""
    for name, docstring, _, node in _documented(tree):
        if not _is_public(name) or not isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            continue
        if node.name.startswith("test_"):
            continue
        if (summary := summarise(docstring, MIN_SUMMARY_WORDS)) and (code := _code(node)):
            yield Code(name.rpartition(".")[2], summary, code)


def summarise(docstring: str, min_words: int = MIN_WORDS) -> str:
    """Return the first sentence of a docstring, or "" if that is no sentence that tells something."""
    paragraph = next(_paragraphs(_without_signature(cleandoc(docstring))), "")
    sentence = next(_split(paragraph), "")
    return sentence if _is_sentence(sentence, min_words) else ""


def _is_public(name: str) -> bool:
    return bool(name) and not any(part.startswith("_") for part in name.split("."))


def _code(node: ast.FunctionDef | ast.AsyncFunctionDef) -> str:
    """Return a function's code; "" if it does nothing, or cannot be written. It changes the node."""
    node.body, node.decorator_list = node.body[1:], []
    if all(map(_does_nothing, node.body)):
        return ""
    try:
        return ast.unparse(node)
    except (ValueError, RecursionError):  # an f-string that older Pythons cannot write; too deep
        return ""


def _does_nothing(statement: ast.stmt) -> bool:
    match statement:
        case ast.Pass() | ast.Expr(value=ast.Constant()):
            return True
        case ast.Raise(exc=ast.Name(id="NotImplementedError") | ast.Call(func=ast.Name(id="NotImplementedError"))):
            return True
    return False


def sentences_of(tree: ast.Module) -> Iterator[str]:
    """Yield the sentences of every docstring, in the order of the file."""
    for _, docstring, _, _ in _documented(tree):
        for paragraph in _paragraphs(_without_signature(cleandoc(docstring))):
            yield from filter(_is_sentence, _split(paragraph))


def parse(source: bytes) -> ast.Module | None:
    """Parse a source file; None for one without docstrings or that this Python cannot read."""
    if b'"""' not in source and b"'''" not in source:
        return None
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return ast.parse(source)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return None


_Documented = tuple[str, str, bool, ast.stmt | None]


def _documented(tree: ast.Module) -> Iterator[_Documented]:
    """Yield (dotted name, docstring, is it a method, definition); the name is empty for a module and its parts."""
    if docstring := ast.get_docstring(tree, clean=False):
        yield "", docstring, False, None
    yield from _documented_in(tree.body, "")


def _documented_in(body: Iterable[ast.stmt], owner: str) -> Iterator[_Documented]:
    for node in body:
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            name = f"{owner}.{node.name}" if owner else node.name
            if docstring := ast.get_docstring(node, clean=False):
                yield name, docstring, bool(owner), node
            if isinstance(node, ast.ClassDef):
                yield from _documented_in(node.body, name)
        elif isinstance(node, (ast.If, ast.Try, ast.With)):
            yield from _documented_in(node.body, owner)
            yield from _documented_in(getattr(node, "orelse", []), owner)
        elif isinstance(node, (ast.Expr, ast.Assign)) and isinstance(node.value, ast.Call):
            yield from _attached(node.value, node.targets[0] if isinstance(node, ast.Assign) else None)


def _attached(call: ast.Call, target: ast.expr | None) -> Iterator[_Documented]:
    """Docstrings given to C functions: torch's ``add_docstr(torch.f, ...)``, numpy's ``add_newdoc(...)``."""
    function = ast.unparse(call.func).rpartition(".")[2].lstrip("_")
    if function in {"add_docstr", "add_docstr_all"} and len(call.args) >= 2:
        name = _dotted(target if target is not None else call.args[0]).rpartition(".")[2]
        yield name, _constant_text(call.args[1]), function == "add_docstr_all", None
    elif function == "add_newdoc" and len(call.args) >= 3:
        name, doc = _dotted(call.args[1]), call.args[2]
        if isinstance(doc, (ast.Tuple, ast.List)):
            if len(doc.elts) == 2:
                yield f"{name}.{_dotted(doc.elts[0])}", _constant_text(doc.elts[1]), True, None
        else:
            yield name, _constant_text(doc), False, None


def _dotted(node: ast.expr) -> str:
    if isinstance(node, ast.Constant):
        return str(node.value)
    return ast.unparse(node) if isinstance(node, (ast.Name, ast.Attribute)) else ""


def _constant_text(node: ast.expr) -> str:
    """The constant parts of a string expression: literals, ``+``, f-strings, ``"...".format(...)``."""
    match node:
        case ast.Constant(value=str(text)):
            return text
        case ast.BinOp(left=left, op=ast.Add(), right=right):
            return _constant_text(left) + _constant_text(right)
        case ast.JoinedStr(values=parts):
            return "".join(_constant_text(part) for part in parts)
        case ast.Call(func=ast.Attribute(value=value, attr="format")):
            return _PLACEHOLDER.sub("", _constant_text(value).replace("{{", "\0")).replace("\0", "{").replace("}}", "}")
        case ast.Call(func=ast.Attribute(value=value)):
            return _constant_text(value)
        case ast.Call(args=[argument]):
            return _constant_text(argument)
    return ""


def _without_signature(doc: str) -> str:
    """Drop the signature lines that docstrings of C functions begin with: ``name(a, b) -> Tensor``."""
    while match := re.match(r"\s*[\w.]+\(", doc):
        depth, end = 1, match.end()
        while depth and end < len(doc):
            depth += {"(": 1, ")": -1}.get(doc[end], 0)
            end += 1
        rest = re.match(r"[ \t]*(->[^\n]*)?(\n|$)(--\n)?", doc[end:])
        if depth or rest is None:
            break
        doc = doc[end + rest.end() :]
    return doc


def _paragraphs(doc: str) -> Iterator[str]:
    """Yield the prose paragraphs and list items of a clean docstring, markup stripped, each on one line."""
    paragraph: list[str] = []
    for line in _prose_lines(doc):
        if line is None or not line[1]:
            yield from _flush(paragraph)
            if line is not None:
                paragraph = [line[0]]
        else:
            paragraph.append(line[0])
    yield from _flush(paragraph)


def _flush(paragraph: list[str]) -> Iterator[str]:
    if text := _strip_markup(" ".join(paragraph)):
        yield text
    paragraph.clear()


def _prose_lines(doc: str) -> Iterator[tuple[str, bool] | None]:
    """Yield (text, goes on with the paragraph before it), or None where a paragraph ends."""
    lines = doc.expandtabs().splitlines()
    skip_deeper: int | None = None  # inside a literal block: drop whatever is indented deeper than this
    in_fence = in_doctest = False
    indent, is_item = -1, False  # of the paragraph being read; -1 = none
    for i, raw in enumerate(lines):
        line = raw.strip()
        depth = len(raw) - len(raw.lstrip())
        if _FENCE.match(line):
            in_fence = not in_fence and not line.endswith("```", 3)
            line = ""
        if not line or in_fence:
            in_doctest, indent = False, -1
            yield None
            continue
        if skip_deeper is not None and depth > skip_deeper:
            continue
        skip_deeper = None
        in_doctest = in_doctest or bool(_DOCTEST.match(line))
        following = lines[i + 1] if i + 1 < len(lines) else ""
        if directive := _DIRECTIVE.match(line):
            if directive[1] not in _PROSE_DIRECTIVES:
                skip_deeper = depth
            indent = -1
            yield None
            continue
        following_depth = len(following) - len(following.lstrip()) if following.strip() else 0
        type_line = _NUMPY_ARG.match(line) or (line.startswith(":") and re.match(r":r?type\b", line))
        title = _UNDERLINE.match(line) or _UNDERLINE.match(following.strip()) or _HEADER.match(line)
        if in_doctest or title or type_line or _TABLE.match(line):
            indent = -1
            yield None
            continue
        if line.endswith("::"):
            skip_deeper, line = depth, line[:-1]
        item = _ITEM.match(line)
        if item or indent < 0 or depth < indent or (depth > indent and not is_item):
            # A bare word over an indented block is a parameter or a heading, not prose.
            if following_depth > depth and " " not in line:
                indent = -1
                yield None
                continue
            indent, is_item = depth, item is not None
            yield (line[item.end() :] if item else line), False
        else:
            yield line, True
        if skip_deeper is not None:
            indent = -1


def _strip_markup(text: str) -> str:
    if "`" in text:
        text = _ROLE.sub(lambda m: _role_text(m[1]), text)
        text = _LINK.sub(r"\1", text)
        text = _QUOTED_LINK.sub(r"\1", text)
        text = _BACKTICKS.sub("", text)
    if "[" in text:
        text = _MARKDOWN_LINK.sub(r"\1", text)
        text = _FOOTNOTE.sub("", text)
    if "*" in text:
        text = _EMPHASIS.sub(r"\2", text)
    return " ".join(text.replace("\\ ", "").split())


def _role_text(role: str) -> str:
    if titled := _ROLE_TEXT.match(role):
        return titled[1]
    return role.rpartition(".")[2] if role.startswith("~") else role.lstrip("!")


def _split(paragraph: str) -> Iterator[str]:
    start = 0
    for end in _SENTENCE_END.finditer(paragraph):
        sentence = paragraph[start : end.start()]
        if not _ABBREVIATION.search(sentence):
            # The pattern's optional closing quote belongs to the sentence that it ends.
            yield paragraph[start : end.end()].strip()
            start = end.end()
    yield paragraph[start:].strip()


def _is_sentence(text: str, min_words: int = MIN_WORDS) -> bool:
    if not text or not text[0].isalpha() or not min_words <= text.count(" ") + 1 <= MAX_WORDS:
        return False
    solid = len(text) - text.count(" ")
    letters = sum(map(str.isalpha, text))
    return letters >= _MIN_LETTERS * solid and not text.endswith(":") and not _NOT_PROSE.search(text)


_READERS: dict[What, Callable[[ast.Module], Iterator[Any]]] = {
    "sentences": sentences_of,
    "summaries": summaries_of,
    "codes": codes_of,
}


def read_files(files: Iterable[str], what: What) -> list[list[Any]]:
    """Return what is asked for of each file; nothing where it cannot be read or parsed."""
    answers: list[list[Any]] = []
    for file in files:
        try:
            with open(file, "rb") as stream:
                tree = parse(stream.read())
        except OSError:
            tree = None
        answers.append(list(_READERS[what](tree)) if tree else [])
    return answers


def main() -> None:
    """Answer one request: see the module's docstring."""
    request = json.load(sys.stdin)
    json.dump(read_files(request["files"], request["what"]), sys.stdout)


if __name__ == "__main__":
    main()
