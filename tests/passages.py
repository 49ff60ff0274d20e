"""Documents for the tiny model: titles, sentences, passages that follow each other."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

from tiny import make_sentences


def make_documents(count: int = 60) -> list[dict[str, str]]:
    """Return documents of one to seven sentences; a title is some words of the first. Every fifth has none."""
    generator = random.Random(5)
    sentences = iter(make_sentences(7 * count, seed=31))
    documents = []
    for i in range(count):
        text = [next(sentences) for _ in range(1 + i % 7)]
        words = text[0].rstrip(".").split()
        title = " ".join(generator.sample(words, min(3, len(words))))
        documents.append({"id": f"d{i}", "title": "" if i % 5 == 4 else title, "text": " ".join(text)})
    return documents


def documents_section(folder: Path, documents: list[dict[str, str]], cache_dir: str, **more: Any) -> dict[str, Any]:
    """Write a table of documents and return the settings of its corpus."""
    path = folder / "documents.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in documents), encoding="utf-8")
    settings = {"source": "documents", "path": str(path), "passage_words": 30, "near_duplicates": None}
    return settings | {"cache_dir": cache_dir, **more}
