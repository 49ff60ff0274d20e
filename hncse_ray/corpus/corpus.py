"""A prepared corpus on disk: unique rows of tokens, what belongs to them, their hashes, memory-mapped."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np
import numpy.typing as npt

from hncse_ray.config import CorpusSettings, Side
from hncse_ray.corpus.batches import RowLengths
from hncse_ray.corpus.files import DAMAGED, Chunk, Manifest, Shard, damage
from hncse_ray.corpus.text import row_hash
from hncse_ray.errors import DataError

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
        mean_tokens: tokens a sentence (of pairs: an anchor), special tokens included, after truncation.
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
        tokenizer: the digest of its tokenizer.
        report: what the preparation did.
        lengths: tokens of each row `[N]`, int32.
        hashes: hash of each row's tokens `[N]`, int64; see :func:`~hncse_ray.corpus.text.row_hash`.
        has_pairs: whether rows may have positives. Then they are queries, and targets documents.
        target_lengths: tokens of each row's target `[N]`, int32.
        target_hashes: hash of each row's target `[N]`, int64.
        has_negatives: whether rows may have been given negatives.
        documents: what the document of each row is known by `[N]`, int64; None where that was not asked for.
        has_passages: whether rows are passages of documents. Then they have titles and bodies, and those of a document
            stand together, in its order.
    """

    def __init__(self, manifest: Manifest) -> None:
        """Use :meth:`open`."""
        facts, columns = manifest.facts, manifest.columns
        self.path = manifest.folder
        self.digest: str = facts["digest"]
        self.tokenizer: str = facts["tokenizer"]
        self.report = PrepareReport(**{n: facts[n] for n in PrepareReport.__dataclass_fields__ if n in facts})
        self._manifest = manifest
        self._shards: dict[int, Shard] = {}
        self.lengths: Int32 = manifest.map_numbers("length")
        self.hashes: Int64 = manifest.map_numbers("hash")
        self.has_pairs = "positive_ids" in columns
        self.target_lengths, self.target_hashes = self.lengths, self.hashes
        if self.has_pairs:
            self.target_lengths = manifest.map_numbers("target_length")
            self.target_hashes = manifest.map_numbers("target_hash")
        self.has_negatives = "negative_ids" in columns
        self.documents: Int64 | None = manifest.map_numbers("document") if "document" in columns else None
        self.has_passages = "body" in columns

    @property
    def rows_are(self) -> Literal["pairs", "passages", "sentences"]:
        """What people call the rows."""
        return "pairs" if self.has_pairs else "passages" if self.has_passages else "sentences"

    @property
    def target_side(self) -> Side | None:
        """Whose prompt targets get: that of documents, where anchors and targets differ."""
        return "document" if self.has_pairs or self.has_passages else None

    @classmethod
    def open(cls, path: str | Path) -> Corpus:
        """Map the corpus of a folder that :func:`~hncse_ray.corpus.prepare.prepare_corpus` made.

        What is read is the manifest alone; a shard is opened when a row of it is asked for.

        Raises:
            DataError: the folder holds no corpus, or a damaged one.
        """
        manifest = Manifest.read(Path(path))
        try:
            return cls(manifest)
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise damage(Path(path), error) from None

    def scattered(self) -> Corpus:
        """Return the same corpus, mapped for those who ask for rows from all over it, as a trainer does.

        Of files that are not in the system's cache, what a row is on is read then, and no more. Else the system reads
        ahead, up to megabytes around each row: right for those who go through all of them, such as the pool's shards.
        """
        return Corpus(replace(self._manifest, scattered=True))

    def check(self, *, digests: bool = False) -> None:
        """Open every shard, and see that its rows are those that the files of numbers are of.

        Args:
            digests: whether all of it is read and compared with the digests of the manifest.

        Raises:
            DataError: one is damaged, or of another corpus.
        """
        for number in range(len(self._manifest.shards)):
            self._shard(number)
            if digests:
                self._manifest.check_digest(number)

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
        return [chunk.text("text", row) or "" for chunk, row in self._locate(ids)]

    def token_rows(self, ids: RowIds) -> list[Int32]:
        """Return the token ids of rows, special tokens included, as read-only views of the mapped file.

        Raises:
            IndexError: a row id is not in 0..N-1.
        """
        return [chunk.rows("input_ids")[row] for chunk, row in self._locate(ids)]

    def targets(self, ids: RowIds) -> list[Int32]:
        """Return the token ids of what rows belong to: their positives, and of rows without one their own.

        Raises:
            IndexError: a row id is not in 0..N-1.
        """
        if not self.has_pairs:
            return self.token_rows(ids)
        found = []
        for chunk, row in self._locate(ids):
            positive = chunk.rows("positive_ids")[row]
            found.append(positive if len(positive) else chunk.rows("input_ids")[row])
        return found

    def target_texts(self, ids: RowIds) -> list[str]:
        """Return the texts of :meth:`targets`.

        Raises:
            IndexError: a row id is not in 0..N-1.
        """
        if not self.has_pairs:
            return self.texts(ids)
        return [chunk.text("positive", row) or chunk.text("text", row) or "" for chunk, row in self._locate(ids)]

    def titles(self, ids: RowIds) -> list[str | None]:
        """Return the titles of passages' documents, None where they have none.

        Raises:
            IndexError: a row id is not in 0..N-1.
        """
        return [chunk.text("title", row) for chunk, row in self._locate(ids)]

    def bodies(self, ids: RowIds) -> list[str]:
        """Return passages without their titles; empty for a document that is a title alone.

        Raises:
            IndexError: a row id is not in 0..N-1.
        """
        return [chunk.text("body", row) or "" for chunk, row in self._locate(ids)]

    def next_in_document(self, ids: RowIds) -> Int64:
        """Return the row of the passage that follows each in its document, `[n]`; -1 where none was kept.

        Raises:
            IndexError: a row id is not in 0..N-1.
        """
        assert self.documents is not None
        rows = np.asarray(ids, dtype=np.int64)
        self._check_ids(rows)
        following = np.minimum(rows + 1, len(self) - 1)
        same = (following > rows) & (self.documents[following] == self.documents[rows])
        return np.where(same, following, -1)

    def negative_hashes(self, ids: RowIds) -> list[Int64]:
        """Return the hashes of the negatives that rows were given, any number each, where the corpus has any.

        Raises:
            IndexError: a row id is not in 0..N-1.
        """
        return [chunk.rows("negative_hashes")[row] for chunk, row in self._locate(ids)]

    def negative_rows(self, ids: RowIds) -> list[list[Int32]]:
        """Return the token ids of :meth:`negative_hashes`.

        Raises:
            IndexError: a row id is not in 0..N-1.
        """
        return [chunk.rows("negative_ids").lists(row) for chunk, row in self._locate(ids)]

    @property
    def view_lengths(self) -> RowLengths:
        """Tokens of the longer view of each row `[N]`, itself and its target."""
        return _Longer(self.lengths, self.target_lengths) if self.has_pairs else self.lengths

    def contents(self, ids: RowIds) -> Int64:
        """Return what rows hold, `[..., n]`: the hashes of their tokens, and with pairs of their targets."""
        hashes = [self.hashes, self.target_hashes] if self.has_pairs else [self.hashes]
        return np.stack([of_rows[np.asarray(ids)] for of_rows in hashes], axis=-1)

    def kept_apart(self, settings: CorpusSettings) -> Int64 | None:
        """Return :attr:`documents`, if rows that share one are not to repel each other."""
        return None if settings.repel_within_document else self.documents

    def _locate(self, ids: RowIds) -> list[tuple[Chunk, int]]:
        """Return (chunk, row in the chunk) of each row id."""
        wanted = np.asarray(ids, dtype=np.int64)
        self._check_ids(wanted)
        shards, rows = np.divmod(wanted, self._manifest.shard_rows)
        chunks, rows = np.divmod(rows, self._manifest.batch_rows)
        positions = zip(shards.tolist(), chunks.tolist(), rows.tolist(), strict=True)
        return [(self._shard(shard).chunk(chunk), row) for shard, chunk, row in positions]

    def _check_ids(self, wanted: Int64) -> None:
        if len(wanted) and not (0 <= wanted.min() and wanted.max() < len(self)):
            raise IndexError(f"row ids {wanted.min()}..{wanted.max()} of a corpus of {len(self)} rows")

    def _shard(self, number: int) -> Shard:
        if (shard := self._shards.get(number)) is None:
            shard = Shard(self._manifest, number)
            for row in {0, shard.facts.rows - 1}:
                chunk, within = divmod(row, self._manifest.batch_rows)
                ids, known = shard.chunk(chunk).rows("input_ids")[within], number * self._manifest.shard_rows + row
                if (row_hash(ids), len(ids)) != (self.hashes[known], self.lengths[known]):
                    what = f"is a damaged corpus: {shard.name} is of another one than its files of numbers"
                    raise DataError(what, str(self.path), DAMAGED)
            self._shards[number] = shard
        return shard


class _Longer:
    """The larger of two lengths of each row, computed where it is asked for."""

    def __init__(self, *lengths: Int32) -> None:
        self._lengths = lengths

    def __len__(self) -> int:
        return len(self._lengths[0])

    def __getitem__(self, ids: Int64) -> Int32:
        return np.maximum(*(of_rows[ids] for of_rows in self._lengths))
