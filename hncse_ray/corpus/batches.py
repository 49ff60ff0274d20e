"""From row lengths to batches: which rows meet in which step, and how they are padded."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Protocol

import numpy as np
import numpy.typing as npt

from hncse_ray.corpus.order import Shuffled
from hncse_ray.errors import DataError, counted

Int64 = npt.NDArray[np.int64]

# Rows are sorted by length within windows of so many batches: enough to make the rows of a batch alike,
# small enough that who meets whom stays close to random.
WINDOW_BATCHES = 64
# Rows that are neighbours in a large corpus come into a window together, and are read together: as many at a time as
# leave so many blocks to shuffle, and so many at the most.
_LEAST_BLOCKS, _MOST_BLOCK_ROWS = 2**20, 64


def pad_rows(rows: Sequence[npt.NDArray[np.integer]], *, pad_id: int, side: str = "right") -> tuple[Int64, Int64]:
    """Pad token rows to the longest of them.

    Args:
        rows: B integer arrays of token ids, ragged.
        pad_id: the token id that fills up.
        side: where it does, ``right`` or ``left``.

    Returns:
        Token ids `[B, L]` and mask `[B, L]` (1 = token, 0 = padding), int64, L = the longest row.
    """
    lengths = np.fromiter((len(row) for row in rows), dtype=np.int64, count=len(rows))
    longest = int(lengths.max()) if len(rows) else 0
    positions = np.arange(longest) if side == "right" else np.arange(longest)[::-1]
    mask = positions < lengths[:, None]
    ids = np.full((len(rows), longest), pad_id, dtype=np.int64)
    if longest:
        ids[mask] = np.concatenate(rows)
    return ids, mask.astype(np.int64)


def rank_slice(row_ids: Int64, rank: int, world: int) -> Int64:
    """Return the contiguous part of a global batch that a rank encodes.

    The parts of all ranks, in rank order, make the batch; the first ``len % world`` ranks have one row more.

    Args:
        row_ids: row ids of the global batch `[B]`.
        rank: 0 <= rank < world.
        world: number of ranks.
    """
    if not 0 <= rank < world:
        raise ValueError(f"rank {rank} is not one of {world}")
    share, extra = divmod(len(row_ids), world)
    start = rank * share + min(rank, extra)
    return row_ids[start : start + share + (rank < extra)]


def batch_mask(*keys_B: npt.NDArray[np.integer], own: slice | None = None) -> npt.NDArray[np.bool_] | None:
    """Return which rows of a global batch the own ones may repel: those that differ in every key.

    Args:
        keys_B: what rows are known by, such as the hashes of their tokens `[B]`; as many keys as there are. Of a key
            with several values a row `[B, n]`, rows differ that share none.
        own: which rows are asked for, b of them; default: all.

    Returns:
        Bool `[b, B]`, False where a row meets itself; None, which costs nothing, where the own rows differ from all.
    """
    mask_bB = None
    for key_B in keys_B:
        first, last, _ = (own or slice(None)).indices(len(key_B))
        values, row_of = key_B.ravel(), np.repeat(np.arange(len(key_B)), key_B.size // len(key_B))
        order = np.argsort(values, kind="stable")
        bounds = np.concatenate([[0], np.flatnonzero(np.diff(values[order])) + 1, [len(values)]])
        for alike in np.flatnonzero(np.diff(bounds) > 1):
            rows = row_of[order[bounds[alike] : bounds[alike + 1]]]  # in rising order
            mine = rows[(rows >= first) & (rows < last)] - first
            if len(mine) and rows[0] != rows[-1]:
                if mask_bB is None:
                    mask_bB = ~np.eye(last - first, len(key_B), first, dtype=np.bool_)
                mask_bB[np.ix_(mine, rows)] = False
    return mask_bB


class RowLengths(Protocol):
    """Tokens of rows: an array `[N]`, or what stands for one."""

    def __len__(self) -> int:
        """Return N."""
        ...

    def __getitem__(self, ids: Int64, /) -> npt.NDArray[np.integer]:
        """Return the tokens of rows `[n]`."""
        ...


class BatchPlan:
    """Which rows make up each batch of each epoch: a function of the arguments alone, computed a window at a time.

    Blocks of rows that follow each other in the corpus are shuffled, and what falls into a window of batches is
    shuffled once more, row by row. So nothing is held of an epoch but a few windows, whatever the corpus's size.

    Args:
        lengths: tokens of each corpus row.
        batch_size: rows in a batch, over all ranks.
        seed: seeds every epoch's order together with the epoch's number.
        bucket_by_length: rows of like length share a batch (less padding).
        min_batch: a trailing batch of fewer rows is dropped from its epoch.
        left_out: row ids that are in no batch.

    Attributes:
        rows: how many row ids are in the batches.
        batches_per_epoch: how many batches make an epoch. Every row that is not left out is in one of them, but for
            those of a dropped trailing batch, which differ by epoch.

    Raises:
        DataError: the corpus has too few rows for one batch of ``min_batch``.
    """

    def __init__(
        self,
        lengths: RowLengths,
        *,
        batch_size: int,
        seed: int,
        bucket_by_length: bool,
        min_batch: int,
        left_out: Int64 | None = None,
    ) -> None:
        """See the class."""
        if batch_size < 1 or not 1 <= min_batch <= batch_size:
            raise ValueError(f"batch_size {batch_size} and min_batch {min_batch} do not fit")
        self._lengths = lengths
        self.batch_size = batch_size
        self.seed = seed
        self.bucket_by_length = bucket_by_length
        self.min_batch = min_batch
        gone = np.unique(left_out if left_out is not None else np.zeros(0, dtype=np.int64))
        self._kept_before = gone - np.arange(len(gone))  # rows that stay, before each that goes
        self.rows = len(lengths) - len(gone)
        self._full, rest = divmod(self.rows, batch_size)
        self.batches_per_epoch = self._full + (rest >= min_batch)
        if self.batches_per_epoch == 0:
            raise DataError(
                f"the corpus has {counted(self.rows, 'row')}, fewer than the {min_batch} of the smallest batch",
                hint="Lower train.batch_size or use a larger corpus",
            )
        self._windows = -(-self._full // WINDOW_BATCHES)
        self._block = min(_MOST_BLOCK_ROWS, max(1, self.rows // _LEAST_BLOCKS))
        # Look-ups and views of batches ahead may be in the next window.
        self._window = lru_cache(maxsize=3)(self._make_window)

    def batch(self, step: int) -> Int64:
        """Return the row ids of a batch by its index counted over all epochs."""
        epoch, index = divmod(step, self.batches_per_epoch)
        if index == self._full:  # the short one, which is in no window: which rows are dropped does not hang on length
            return _read_only(self._rows_at(epoch, self._full * self.batch_size, self.rows))
        window = ((index + 1) * self._windows - 1) // self._full
        rows: Int64 = self._window(epoch, window)[index - self._first(window)]
        return rows

    def _first(self, window: int) -> int:
        return window * self._full // self._windows

    def _make_window(self, epoch: int, window: int) -> Int64:
        """Return the batches of a window, `[n, batch_size]`."""
        first, behind = (self._first(w) * self.batch_size for w in (window, window + 1))
        rng = np.random.default_rng([self.seed, epoch, window + 1])
        rows = rng.permutation(self._rows_at(epoch, first, behind))
        if not self.bucket_by_length:
            return _read_only(rows.reshape(-1, self.batch_size))
        rows = rows[np.argsort(self._lengths[rows], kind="stable")]  # the permutation above breaks ties at random
        grid = rows.reshape(-1, self.batch_size)
        return _read_only(rng.permuted(rng.permutation(grid, axis=0), axis=1))

    def _rows_at(self, epoch: int, first: int, behind: int) -> Int64:
        """Return the row ids at positions of an epoch's order."""
        positions = np.arange(first, behind)
        blocks = self.rows // self._block
        shuffled = Shuffled(blocks, (self.seed, epoch))
        # Where blocks begin differs by epoch, and so do the rows behind the last of them, which keep their place.
        shift = int(np.random.default_rng([self.seed, epoch]).integers(self.rows))
        block, within = np.divmod(positions, self._block)
        whole = block < blocks
        block[whole] = shuffled(block[whole])
        kept = (block * self._block + within + shift) % self.rows
        rows: Int64 = kept + np.searchsorted(self._kept_before, kept, side="right")
        return rows


def _read_only(rows: Int64) -> Int64:
    rows.flags.writeable = False
    return rows
