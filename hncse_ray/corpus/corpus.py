"""A prepared corpus on disk: unique rows of tokens, what belongs to them, their hashes, memory-mapped."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from hncse_ray.config import CorpusSettings
from hncse_ray.errors import DataError

FORMAT_VERSION = 3  # 1: unique by text; 2: no passages
DATA_FILE, REPORT_FILE = "corpus.arrow", "corpus.json"

Int32 = npt.NDArray[np.int32]
Int64 = npt.NDArray[np.int64]
RowIds = Sequence[int] | npt.NDArray[np.integer]


@dataclass(frozen=True)
class PrepareReport:
    """What the preparation of a corpus did.

    Attributes:
        rows: sentences, pairs or passages kept.
        read: lines or documents seen.
        dropped: how many were dropped, by reason.
        seconds: wall time of the preparation.
        mean_tokens: tokens a sentence, special tokens included, after truncation.
        without_positive: rows without a positive; None where none were asked for.
        documents: those that the passages kept are of; None where rows are no passages.
    """

    rows: int
    read: int
    dropped: dict[str, int]
    seconds: float
    mean_tokens: float
    without_positive: int | None = None
    documents: int | None = None


class Corpus:
    """Rows 0..N-1 of a prepared corpus. Pickles as its path, so workers map the file themselves.

    Attributes:
        path: the corpus's folder.
        digest: names source, tokenizer and settings; the folder's name.
        report: what the preparation did.
        lengths: tokens of each row `[N]`, int32.
        hashes: hash of each row's tokens `[N]`, int64; see :func:`~hncse_ray.corpus.text.row_hash`.
        has_pairs: whether rows may have positives. Then they are queries, and targets documents.
        target_lengths: tokens of each row's target `[N]`, int32.
        target_hashes: hash of each row's target `[N]`, int64.
        documents: what the document of each row is known by `[N]`, int64; None where that was not asked for.
        has_passages: whether rows are passages of documents. Then they have titles and bodies, and those of a document
            stand together, in its order.
    """

    def __init__(self, path: Path, digest: str, report: PrepareReport, table: pa.Table) -> None:
        """Use :meth:`open`."""
        self.path = path
        self.digest = digest
        self.report = report
        self._texts = table["text"].chunks
        self._first_rows = np.cumsum([0] + [len(chunk) for chunk in self._texts])
        self._rows = [_Rows(chunk) for chunk in table["input_ids"].chunks]
        self.lengths: Int32 = np.concatenate([rows.lengths for rows in self._rows])
        self.hashes: Int64 = _numbers(table, "hash")
        self.has_pairs = "positive_ids" in table.column_names
        self.target_lengths, self.target_hashes = self.lengths, self.hashes
        if self.has_pairs:
            self._positives = table["positive"].chunks
            self._positive_rows = [_Rows(chunk) for chunk in table["positive_ids"].chunks]
            lengths = np.concatenate([rows.lengths for rows in self._positive_rows])
            self.target_lengths = np.where(lengths > 0, lengths, self.lengths)
            self.target_hashes = _numbers(table, "target_hash")
        self._negatives: list[tuple[Int32, _Rows]] | None = None
        if "negative_ids" in table.column_names:
            chunks = table["negative_ids"].chunks
            self._negatives = [(chunk.offsets.to_numpy(), _Rows(chunk.values)) for chunk in chunks]
            self._negative_hashes = [_Rows(chunk) for chunk in table["negative_hashes"].chunks]
        self.documents: Int64 | None = _numbers(table, "document") if "document" in table.column_names else None
        self.has_passages = "body" in table.column_names
        if self.has_passages:
            self._titles, self._bodies = table["title"].chunks, table["body"].chunks

    @classmethod
    def open(cls, path: str | Path) -> Corpus:
        """Map the corpus of a folder that :func:`~hncse_ray.corpus.prepare.prepare_corpus` made.

        Raises:
            DataError: the folder holds no corpus, or a damaged one.
        """
        path = Path(path)
        hint = "Delete this folder and prepare the corpus again"
        if not (path / REPORT_FILE).is_file():
            raise DataError("holds no prepared corpus", str(path), "Run `hncse prepare`")
        try:
            facts = json.loads((path / REPORT_FILE).read_text(encoding="utf-8"))
            report = PrepareReport(**{n: facts[n] for n in PrepareReport.__dataclass_fields__ if n in facts})
            if facts["format"] != FORMAT_VERSION:
                raise DataError(f"has format {facts['format']}, not {FORMAT_VERSION}", str(path), hint)
            if (path / DATA_FILE).stat().st_size != facts["bytes"]:
                raise ValueError(f"{DATA_FILE} has not the size that {REPORT_FILE} says")
            with pa.memory_map(str(path / DATA_FILE)) as stream, pa.ipc.open_stream(stream) as reader:
                table = reader.read_all()
            if not table.num_rows == report.rows > 0:
                raise ValueError(f"{table.num_rows} rows where {REPORT_FILE} says {report.rows}")
            return cls(path, facts["digest"], report, table)
        except (OSError, ValueError, KeyError, TypeError, pa.ArrowException) as error:
            raise DataError(f"is a damaged corpus ({error})", str(path), hint) from None

    def __len__(self) -> int:
        """Rows."""
        return self.report.rows

    def __reduce__(self) -> tuple[object, ...]:
        """Pickle as the path alone."""
        return Corpus.open, (self.path,)

    def texts(self, ids: RowIds) -> list[str]:
        """Return the sentences of rows.

        Raises:
            IndexError: a row id is not in 0..N-1.
        """
        return [self._texts[chunk][row].as_py() for chunk, row in self._locate(ids)]

    def token_rows(self, ids: RowIds) -> list[Int32]:
        """Return the token ids of rows, special tokens included, as read-only views of the mapped file.

        Raises:
            IndexError: a row id is not in 0..N-1.
        """
        return [self._rows[chunk][row] for chunk, row in self._locate(ids)]

    def targets(self, ids: RowIds) -> list[Int32]:
        """Return the token ids of what rows belong to: their positives, and of rows without one their own.

        Raises:
            IndexError: a row id is not in 0..N-1.
        """
        if not self.has_pairs:
            return self.token_rows(ids)
        found = []
        for chunk, row in self._locate(ids):
            positive = self._positive_rows[chunk][row]
            found.append(positive if len(positive) else self._rows[chunk][row])
        return found

    def target_texts(self, ids: RowIds) -> list[str]:
        """Return the texts of :meth:`targets`.

        Raises:
            IndexError: a row id is not in 0..N-1.
        """
        if not self.has_pairs:
            return self.texts(ids)
        places = self._locate(ids)
        return [self._positives[chunk][row].as_py() or self._texts[chunk][row].as_py() for chunk, row in places]

    def titles(self, ids: RowIds) -> list[str | None]:
        """Return the titles of passages' documents, None where they have none.

        Raises:
            IndexError: a row id is not in 0..N-1.
        """
        return [self._titles[chunk][row].as_py() for chunk, row in self._locate(ids)]

    def bodies(self, ids: RowIds) -> list[str]:
        """Return passages without their titles; empty for a document that is a title alone.

        Raises:
            IndexError: a row id is not in 0..N-1.
        """
        return [self._bodies[chunk][row].as_py() for chunk, row in self._locate(ids)]

    def next_in_document(self, ids: RowIds) -> Int64:
        """Return the row of the passage that follows each in its document, `[n]`; -1 where none was kept.

        Raises:
            IndexError: a row id is not in 0..N-1.
        """
        assert self.documents is not None
        rows = np.asarray(ids, dtype=np.int64)
        self._locate(rows)
        following = np.minimum(rows + 1, len(self) - 1)
        same = (following > rows) & (self.documents[following] == self.documents[rows])
        return np.where(same, following, -1)

    @property
    def has_negatives(self) -> bool:
        """Whether rows may have been given negatives."""
        return self._negatives is not None

    def negative_hashes(self, ids: RowIds) -> list[Int64]:
        """Return the hashes of the negatives that rows were given, any number each, where the corpus has any.

        Raises:
            IndexError: a row id is not in 0..N-1.
        """
        return [self._negative_hashes[chunk][row] for chunk, row in self._locate(ids)]

    def negative_rows(self, ids: RowIds) -> list[list[Int32]]:
        """Return the token ids of :meth:`negative_hashes`.

        Raises:
            IndexError: a row id is not in 0..N-1.
        """
        assert self._negatives is not None
        found = []
        for chunk, row in self._locate(ids):
            offsets, rows = self._negatives[chunk]
            found.append([rows[i] for i in range(offsets[row], offsets[row + 1])])
        return found

    @property
    def view_lengths(self) -> Int32:
        """Tokens of the longer view of each row `[N]`, itself and its target."""
        return np.maximum(self.lengths, self.target_lengths)

    def contents(self, ids: RowIds) -> Int64:
        """Return what rows hold, `[..., n]`: the hashes of their tokens, and with pairs of their targets."""
        hashes = [self.hashes, self.target_hashes] if self.has_pairs else [self.hashes]
        return np.stack([of_rows[np.asarray(ids)] for of_rows in hashes], axis=-1)

    def kept_apart(self, settings: CorpusSettings) -> Int64 | None:
        """Return :attr:`documents`, if rows that share one are not to repel each other."""
        return None if settings.repel_within_document else self.documents

    def _locate(self, ids: RowIds) -> list[tuple[int, int]]:
        """Return (chunk, row in the chunk) of each row id."""
        wanted = np.asarray(ids, dtype=np.int64)
        if len(wanted) and not (0 <= wanted.min() and wanted.max() < len(self)):
            raise IndexError(f"row ids {wanted.min()}..{wanted.max()} of a corpus of {len(self)} rows")
        chunks = np.searchsorted(self._first_rows, wanted, side="right") - 1
        return list(zip(chunks.tolist(), (wanted - self._first_rows[chunks]).tolist(), strict=True))


class _Rows:
    """The rows of one chunk: views of the mapped file, no copies. A row that is null is empty."""

    def __init__(self, chunk: pa.ListArray) -> None:
        self._offsets: Int32 = chunk.offsets.to_numpy()
        self._values: npt.NDArray[Any] = chunk.values.to_numpy()

    @property
    def lengths(self) -> Int32:
        return np.diff(self._offsets)

    def __getitem__(self, row: int) -> npt.NDArray[Any]:
        return self._values[self._offsets[row] : self._offsets[row + 1]]


def _numbers(table: pa.Table, name: str) -> Int64:
    numbers: Int64 = np.concatenate([chunk.to_numpy() for chunk in table[name].chunks])
    return numbers
