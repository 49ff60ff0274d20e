"""A table of pairs for the tiny model: questions, answers, negatives of unequal number, documents."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tiny import make_sentences

COLUMNS = {"column": "question", "positive_column": "answer", "negative_columns": ["wrong", "worse"],
           "document_column": "document"}  # fmt: skip


def make_pairs(count: int = 120) -> list[dict[str, Any]]:
    """Return rows in which a question is every other word of its answer.

    Every seventh has no answer, every fifth question that of the row before, every sixth answer that of four before.
    A row has none to three negatives; some are the answers of other rows, among them of rows with the same question.
    """
    answers = make_sentences(count, seed=21)
    others = make_sentences(3 * count, seed=22)
    rows: list[dict[str, Any]] = []
    for i, answer in enumerate(answers):
        answer = rows[i - 4]["answer"] if i % 6 == 5 else answer
        question = rows[i - 1]["question"] if i % 5 == 4 else " ".join(answers[i].rstrip(".").split()[::2])
        wrong: list[str] = others[3 * i : 3 * i + i % 3]
        if i % 4 == 3:
            wrong = [*wrong, answers[i - 1], answers[i - 3]]
        worse = None if i % 3 else others[3 * i + 2]
        document = None if i % 8 == 7 else f"document {i // 3}"
        rows.append({"question": question, "answer": None if i % 7 == 6 else answer, "wrong": wrong, "worse": worse,
                     "document": document})  # fmt: skip
    return rows


def write_pairs(path: Path, rows: list[dict[str, Any]]) -> Path:
    """Write them as JSONL."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path
