"""Whatever stands in a document or a Python file: clean text is read of it, or it is refused in the project's words."""

from __future__ import annotations

import gzip
import json
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import strategies as st
from odd_input import try_out

from hncse_ray.config import CorpusSettings
from hncse_ray.corpus.docstrings import read_files
from hncse_ray.corpus.documents import read_passages
from hncse_ray.corpus.sources import read_examples
from hncse_ray.corpus.text import normalise
from hncse_ray.errors import HncseError
from hncse_ray.reading import is_unicode

EXAMPLES = [100, pytest.param(2_000, marks=[pytest.mark.slow, pytest.mark.timeout(1200)])]
MARKUP = [
    b"<title>", b"</title>", b"<h1>", b"</h1>", b"<p>", b"<pre>", b"<table><tr><td>", b"<div>" * 300, b"<script>",
    b"<!--", b"-->", b"<![CDATA[", b"&#xD800;", b"&#99999999999;", b"&#0;", b"&amp", b"<meta charset=utf-16>",
    b"<meta charset=nonsense>", b"<?xml version='1.0' encoding='x'?>", b"<a hidden role=navigation>", b"# Title\n",
    b"---\ntitle: [a\n---\n", b"---\ntitle: !!python/object:os.system x\n---\n", b"---\n", b"title: &a [*a]\n",
    b"```\n", b"> " * 200, b"- " * 200, b"[a]: b\n", b"![x](", b"|a|b|\n|-|-|\n", b"\n\n", b"\r", b"\0", b"\x1e",
    b"\xff\xfe", b"\xef\xbb\xbf", b"\xed\xa0\x80", b"A sentence of words. ", "你好。\u200b".encode(), b"[" * 500,
]  # fmt: skip
PYTHON = [
    b"def f(x):\n", b'    """Return the value of x."""\n', b"    return x\n", b"class A:\n", b"    def g(self): pass\n",
    b"\0", b"\xff", b"\t", b"# coding: nonsense\n", b"# -*- coding: latin-1 -*-\n", b"f'{x!r:{y}}'\n", b"(" * 200,
    b'    """A lone \\ud800 one is here and there."""\n', b"lambda: " * 100, b"1" * 5000 + b"\n", b"'\\N{x}'\n",
    b"async def h():\n", b'    r"""Say what ``x`` is :func:`a.b` about."""\n', b"    x = '\\ud800'\n",
]  # fmt: skip


def made_of(pieces: list[bytes]) -> st.SearchStrategy[bytes]:
    return st.lists(st.sampled_from(pieces) | st.binary(max_size=4), max_size=12).map(b"".join)


def read(settings: CorpusSettings) -> None:
    rows = read_passages if settings.source == "documents" else read_examples
    try:
        for row in rows(settings, Counter()):
            for text in filter(None, (row.text, row.title, row.body, getattr(row, "positive", None))):
                assert text == normalise(text) and is_unicode(text) and "\0" not in text, text
            assert row.text
    except HncseError as error:
        str(error).encode()


@pytest.mark.parametrize("examples", EXAMPLES)
def test_documents(examples: int, tmp_path: Path) -> None:
    def check(drawn: tuple[str, bytes, bool]) -> None:
        name, data, is_whole = drawn
        path = tmp_path / name
        path.write_bytes(gzip.compress(data) if is_whole and name.endswith(".gz") else data)
        read(CorpusSettings(source="documents", path=str(path)))

    names = st.sampled_from(["a.txt", "a.md", "a.html", "a.md.gz", "a.html.gz"])
    try_out(check, examples, st.tuples(names, made_of(MARKUP), st.booleans()))


@pytest.mark.parametrize("examples", EXAMPLES)
def test_python_source(examples: int, tmp_path: Path) -> None:
    path = tmp_path / "m.py"

    def check(data: bytes) -> None:
        path.write_bytes(data)
        read(CorpusSettings(source="python-code", path=str(tmp_path)))
        for what in ("summaries", "sentences"):
            (found,) = read_files([str(path)], what)
            assert json.loads(json.dumps(found)) == [list(one) if isinstance(one, tuple) else one for one in found]

    try_out(check, examples, made_of(PYTHON))
