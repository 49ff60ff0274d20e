"""Reading our pages back: tables, figures, and what a browser would load for them."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from typing import Any

_LOADING = {"src", "srcset", "href", "data", "poster", "action", "background", "cite", "formaction", "ping"}


class _Reader(HTMLParser):
    def __init__(self, marker: str = "") -> None:
        super().__init__()
        self.rows: list[list[str]] = []
        self.loads: list[str] = []
        self._marker, self._inside, self._cell = marker, False, False

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        found = {name: value or "" for name, value in attrs}
        self.loads += [v for name, v in found.items() if name in _LOADING and not v.startswith(("data:", "#"))]
        if tag == "table" and self._marker in {f'{name}="{value}"' for name, value in found.items()}:
            self._inside = True
        elif self._inside and tag == "tr":
            self.rows.append([])
        elif self._inside and tag in ("th", "td"):
            self._cell = True
            self.rows[-1].append("")

    def handle_endtag(self, tag: str) -> None:
        if tag == "table":
            self._inside = False
        elif tag in ("th", "td"):
            self._cell = False

    def handle_data(self, data: str) -> None:
        if self._cell:
            self.rows[-1][-1] += data


def table(page: str, marker: str) -> list[list[str]]:
    """Return the cells of the tables with an attribute, as a reader sees them."""
    reader = _Reader(marker)
    reader.feed(page)
    return [[cell.strip() for cell in row] for row in reader.rows]


def loads(page: str) -> list[str]:
    """Return what a browser would load for a page."""
    reader = _Reader()
    reader.feed(page)
    style = "".join(re.findall(r"<style>(.*?)</style>", page, re.S))
    return reader.loads + re.findall(r"@import\s+\S+|url\([^)]*\)", style)


def figures(page: str) -> dict[str, tuple[list[dict[str, Any]], dict[str, Any]]]:
    """Return the traces and layout of a page's figures, by name."""
    found = {}
    for name, text in re.findall(
        r'<script type="application/json" class="figure" data-name="([^"]+)">(.*?)</script>', page
    ):
        data = json.loads(text)
        assert f'id="figure-{name}"' in page, f"figure {name} is not drawn"
        found[name] = (data["traces"], data["layout"])
    return found
