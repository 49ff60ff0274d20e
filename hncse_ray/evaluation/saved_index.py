"""Vectors of texts on disk, to search again at once: what they were made of is written beside them, with digests."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from hncse_ray.evaluation.vectors import FloatArray
from hncse_ray.storage import locked, write_folder

_FORMAT = 3  # 1: no documents; 2: not of how many rows
_MANIFEST, _TEXTS, _VECTORS = "manifest.json", "texts.json", "vectors.npy"


class Outdated(Exception):
    """The index is there, and not to be used: it is damaged, or made of something else."""


@dataclass(frozen=True)
class Hit:
    """What was found.

    Attributes:
        text: all of it.
        cosine: to the query.
        document: which one the text is a passage of; None where texts are no passages.
        more_passages: further passages of it that come before those of the first document that is not shown.
    """

    text: str
    cosine: float
    document: str | None
    more_passages: int


@dataclass(frozen=True)
class SavedIndex:
    """Texts and their vectors ``[N, D]`` of unit norm.

    Attributes:
        texts: what is searched.
        vectors_ND: their vectors.
        documents: of passages what the document of each is called.
        rows: of the corpus; more than what was drawn where the texts are a sample.
    """

    texts: Sequence[str]
    vectors_ND: FloatArray
    documents: Sequence[str] | None = None
    rows: int = 0

    def nearest(self, queries_QD: FloatArray, top: int) -> list[list[Hit]]:
        """Return the ``top`` texts of the largest cosine of each query, best first; of a document the best alone."""
        return [self._best(scores_N, top) for scores_N in queries_QD @ self.vectors_ND.T]

    def _best(self, scores_N: FloatArray, top: int) -> list[Hit]:
        found: dict[str | int, list[int]] = {}
        for i in np.argsort(-scores_N, kind="stable").tolist():
            document = i if self.documents is None else self.documents[i]
            if document not in found and len(found) == top:
                break
            found.setdefault(document, []).append(i)
        return [
            Hit(self.texts[i], float(scores_N[i]), None if self.documents is None else self.documents[i], len(further))
            for i, *further in found.values()
        ]

    def write(self, folder: Path, made_of: Mapping[str, str]) -> None:
        """Write a folder, whole or not at all, after whoever else writes it now.

        Args:
            folder: replaced if it is there.
            made_of: digests of the model, of the source of the texts and of all else that the vectors depend on.

        Raises:
            StorageError: it cannot be written.
        """

        def fill(partial: Path) -> None:
            np.save(partial / _VECTORS, self.vectors_ND)
            texts = {"texts": list(self.texts), "documents": self.documents, "rows": self.rows}
            (partial / _TEXTS).write_text(json.dumps(texts), encoding="utf-8")
            files = {name: _digest(partial / name) for name in (_VECTORS, _TEXTS)}
            facts = {"format": _FORMAT, "made_of": dict(made_of), "files": files}
            (partial / _MANIFEST).write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")

        with locked(folder.with_name(f".{folder.name}.lock"), hint="Set HNCSE_CACHE", wait=True):
            write_folder(folder, fill)


def read_index(folder: Path, made_of: Mapping[str, str]) -> SavedIndex | None:
    """Return the index of a folder; None if there is none.

    Args:
        folder: what :meth:`SavedIndex.write` wrote.
        made_of: as it was given there.

    Raises:
        Outdated: it is damaged, or was made of something else; the message says which.
    """
    if not folder.exists():
        return None
    try:
        facts = json.loads((folder / _MANIFEST).read_text(encoding="utf-8"))
        if facts["format"] != _FORMAT:
            raise Outdated("it has another format")
        if changed := [name for name in made_of if facts["made_of"].get(name) != made_of[name]]:
            raise Outdated(f"{' and '.join(f'the {name}' for name in changed)} changed")
        for name in (_VECTORS, _TEXTS):
            if facts["files"][name] != _digest(folder / name):
                raise Outdated(f"it is damaged ({name} is not as it was written)")
        texts = json.loads((folder / _TEXTS).read_text(encoding="utf-8"))
        vectors_ND = np.load(folder / _VECTORS, allow_pickle=False)
        return SavedIndex(texts["texts"], vectors_ND, texts["documents"], texts["rows"])
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise Outdated(f"it is damaged ({error})") from None


def folder_digest(folder: Path) -> str:
    """Return the SHA-256 of the names and contents of the files of a folder, such as a model's."""
    digest = hashlib.sha256()
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        digest.update(f"{path.relative_to(folder)}\0{_digest(path)}\0".encode(errors="surrogateescape"))
    return digest.hexdigest()


def _digest(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
