"""Search collections in the layout of BEIR (arXiv 2104.08663): documents, queries, and what is right for which."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path

from hncse_ray.errors import DataError
from hncse_ray.evaluation.retrieval import RetrievalSet
from hncse_ray.reading import read_table, titled

logger = logging.getLogger(__name__)

LAYOUT = "A collection is a folder with corpus.jsonl, queries.jsonl and qrels/dev.tsv, qrels/test.tsv or both"
_JUDGEMENT = ("query-id", "corpus-id", "score")
_GRADE_LIMIT = 2**31


def read_collection(folder: str | Path, splits: Sequence[str]) -> dict[str, RetrievalSet]:
    """Read a collection: ``corpus.jsonl`` (``_id``, ``title``, ``text``), ``queries.jsonl`` and ``qrels/SPLIT.tsv``.

    A document's text is "title. text", without a second full stop behind a title that ends in one, or what there is of
    the two. All documents are candidates. Judgements of 0 or less say that a document is not right; queries without a
    right document are left out and counted in a warning.

    Args:
        folder: the collection.
        splits: those wanted; a split without judgements is left out.

    Returns:
        What is searched, by split.

    Raises:
        DataError: the folder or a file is missing or damaged, no split is judged, or a judgement names an id that
            there is not.
    """
    folder = Path(folder).expanduser()
    if not folder.is_dir():
        raise DataError("no such folder", str(folder), LAYOUT)
    judged = {split: path for split in splits if (path := folder / "qrels" / f"{split}.tsv").exists()}
    if not judged:
        raise DataError(f"has no {' and no '.join(f'{split}.tsv' for split in splits)}", f"{folder}/qrels", LAYOUT)
    queries = _texts(folder / "queries.jsonl", required=("text",))
    documents = _texts(folder / "corpus.jsonl", optional=("title", "text"))
    if not any(documents.values()):
        raise DataError("no document has a title or a text", f"{folder}/corpus.jsonl", LAYOUT)
    candidates = tuple(documents.values())
    position = {name: i for i, name in enumerate(documents)}
    sets = {}
    for split, path in judged.items():
        grades = _judgements(path, queries, position)
        sets[split] = RetrievalSet(tuple(queries[name] for name in grades), candidates, tuple(grades.values()))
    return sets


def _texts(path: Path, *, required: Sequence[str] = (), optional: Sequence[str] = ()) -> dict[str, str]:
    """The text of each id; of several columns one sentence after the other."""
    found: dict[str, str] = {}
    for number, (name, *parts) in read_table(path, ("_id", *required), optional=optional):
        if name in found:
            raise DataError(f"the _id {name!r} comes twice", f"{path}:{number}")
        found[name] = titled(*parts)
    return found


def _judgements(path: Path, queries: Mapping[str, str], position: Mapping[str, int]) -> dict[str, dict[int, int]]:
    """The grades of each judged query's right documents, by their position."""
    judged: dict[str, dict[int, int]] = {}
    for number, (query, document, score) in read_table(path, _JUDGEMENT):
        where = f"{path}:{number}"
        for name, known, file in ((query, queries, "queries.jsonl"), (document, position, "corpus.jsonl")):
            if name not in known:
                raise DataError(f"judges {name!r}, which is not in {file}", where, "Are the files of one collection?")
        try:
            grade = int(score)
        except ValueError:
            grade = _GRADE_LIMIT
        if abs(grade) >= _GRADE_LIMIT:
            raise DataError(
                f"the score {score[:40]!r} is not a whole number", where, "0 is not relevant, 1 and more is"
            )
        if judged.setdefault(query, {}).setdefault(position[document], grade) != grade:
            raise DataError(f"judges document {document!r} a second time and otherwise", where)
    right = {query: {i: grade for i, grade in own.items() if grade > 0} for query, own in judged.items()}
    kept = {query: own for query, own in right.items() if own}
    if not kept:
        raise DataError("judges no document as relevant", str(path), LAYOUT)
    if len(kept) < len(right):
        logger.warning("%s: no relevant document for %d of %d queries", path, len(right) - len(kept), len(right))
    return kept
