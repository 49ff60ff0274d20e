"""A prepared corpus on disk: sentences of unique token rows, their hashes, memory-mapped."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from hncse_ray.errors import DataError

FORMAT_VERSION = 2  # 1: unique by text
DATA_FILE, REPORT_FILE = "corpus.arrow", "corpus.json"

Int32 = npt.NDArray[np.int32]
Int64 = npt.NDArray[np.int64]
RowIds = Sequence[int] | npt.NDArray[np.integer]


@dataclass(frozen=True)
class PrepareReport:
    """What the preparation of a corpus did.

    Attributes:
        rows: sentences kept.
        read: lines seen.
        dropped: how many were dropped, by reason.
        seconds: wall time of the preparation.
        mean_tokens: tokens a row, special tokens included, after truncation.
    """

    rows: int
    read: int
    dropped: dict[str, int]
    seconds: float
    mean_tokens: float


class Corpus:
    """Rows 0..N-1 of a prepared corpus. Pickles as its path, so workers map the file themselves.

    Attributes:
        path: the corpus's folder.
        digest: names source, tokenizer and settings; the folder's name.
        report: what the preparation did.
        lengths: tokens of each row `[N]`, int32.
        hashes: hash of each row's tokens `[N]`, int64; see :func:`~hncse_ray.corpus.text.row_hash`.
    """

    def __init__(self, path: Path, digest: str, report: PrepareReport, table: pa.Table) -> None:
        """Use :meth:`open`."""
        self.path = path
        self.digest = digest
        self.report = report
        self._texts = table["text"].chunks
        # Views of the mapped file, no copies: token i of row r of chunk c is values[c][offsets[c][r] + i].
        self._offsets: list[Int32] = [chunk.offsets.to_numpy() for chunk in table["input_ids"].chunks]
        self._values: list[Int32] = [chunk.values.to_numpy() for chunk in table["input_ids"].chunks]
        self._first_rows = np.cumsum([0] + [len(chunk) for chunk in self._texts])
        self.lengths: Int32 = np.concatenate([np.diff(offsets) for offsets in self._offsets])
        self.hashes: Int64 = np.concatenate([chunk.to_numpy() for chunk in table["hash"].chunks])

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
            report = PrepareReport(**{name: facts[name] for name in PrepareReport.__dataclass_fields__})
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
        rows = []
        for chunk, row in self._locate(ids):
            offsets = self._offsets[chunk]
            rows.append(self._values[chunk][offsets[row] : offsets[row + 1]])
        return rows

    def _locate(self, ids: RowIds) -> list[tuple[int, int]]:
        """Return (chunk, row in the chunk) of each row id."""
        wanted = np.asarray(ids, dtype=np.int64)
        if len(wanted) and not (0 <= wanted.min() and wanted.max() < len(self)):
            raise IndexError(f"row ids {wanted.min()}..{wanted.max()} of a corpus of {len(self)} rows")
        chunks = np.searchsorted(self._first_rows, wanted, side="right") - 1
        return list(zip(chunks.tolist(), (wanted - self._first_rows[chunks]).tolist(), strict=True))
