"""From row lengths to batches: which rows meet in which step, and how they are padded."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import numpy as np
import numpy.typing as npt

from hncse_ray.errors import DataError

Int64 = npt.NDArray[np.int64]

# Rows are sorted by length within windows of so many batches: enough to make the rows of a batch alike,
# small enough that who meets whom stays close to random.
WINDOW_BATCHES = 64


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
    places = np.arange(longest) if side == "right" else np.arange(longest)[::-1]
    mask = places < lengths[:, None]
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


def batch_mask(*keys_B: npt.NDArray[np.integer]) -> npt.NDArray[np.bool_] | None:
    """Return which rows of a global batch may repel each other: those that differ in every key.

    Args:
        keys_B: what rows are known by, such as the hashes of their tokens `[B]`; as many keys as there are. Of a key
            with several values a row `[B, n]`, rows differ that share none.

    Returns:
        Bool `[B, B]`, symmetric, False on the diagonal; None, which costs nothing, where all rows differ.
    """
    mask_BB = None
    for key_B in keys_B:
        values, row_of = key_B.ravel(), np.repeat(np.arange(len(key_B)), key_B.size // len(key_B))
        order = np.argsort(values, kind="stable")
        bounds = np.concatenate([[0], np.flatnonzero(np.diff(values[order])) + 1, [len(values)]])
        for alike in np.flatnonzero(np.diff(bounds) > 1):
            rows = row_of[order[bounds[alike] : bounds[alike + 1]]]
            if rows[0] != rows[-1]:  # in rising order
                if mask_BB is None:
                    mask_BB = ~np.eye(len(key_B), dtype=np.bool_)
                mask_BB[np.ix_(rows, rows)] = False
    return mask_BB


class BatchPlan:
    """Which rows make up each batch of each epoch: a function of the arguments alone.

    Args:
        lengths: tokens of each corpus row `[N]`.
        batch_size: rows in a batch, over all ranks.
        seed: seeds every epoch's order together with the epoch's number.
        bucket_by_length: rows of like length share a batch (less padding).
        min_batch: a trailing batch of fewer rows is dropped from its epoch.
        left_out: row ids that are in no batch.

    Attributes:
        rows: how many row ids are in the batches.

    Raises:
        DataError: the corpus has too few rows for one batch of ``min_batch``.
    """

    def __init__(
        self,
        lengths: npt.NDArray[np.integer],
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
        self._lengths = np.asarray(lengths)
        self.batch_size = batch_size
        self.seed = seed
        self.bucket_by_length = bucket_by_length
        self.min_batch = min_batch
        self._ids: int | Int64 = len(self._lengths)  # all of them, without an array
        self.rows = len(self._lengths)
        if left_out is not None:
            self._ids = np.setdiff1d(np.arange(self.rows), left_out)
            self.rows = len(self._ids)
        full, rest = divmod(self.rows, batch_size)
        self.batches_per_epoch = full + (rest >= min_batch)
        if self.batches_per_epoch == 0:
            raise DataError(
                f"the corpus has {self.rows} rows, fewer than the {min_batch} of the smallest batch",
                hint="Lower train.batch_size or use a larger corpus",
            )
        self._plan_epoch = lru_cache(maxsize=2)(self._plan)  # look-ups ahead of the step may be in the next epoch

    def epoch(self, epoch: int) -> list[Int64]:
        """Return the batches of an epoch: arrays of row ids, each row of the corpus at most once.

        Every row that is not left out appears exactly once but for those of a dropped trailing batch, which differ by
        epoch.
        """
        return list(self._plan_epoch(epoch))

    def batch(self, step: int) -> Int64:
        """Return the row ids of a batch by its index counted over all epochs."""
        epoch, index = divmod(step, self.batches_per_epoch)
        return self._plan_epoch(epoch)[index]

    def _plan(self, epoch: int) -> list[Int64]:
        rng = np.random.default_rng([self.seed, epoch])
        order = rng.permutation(self._ids)
        whole = len(order) // self.batch_size * self.batch_size
        # The short batch is taken off before sorting, so that which rows are dropped does not hang on length.
        order, rest = order[:whole], order[whole:]
        if self.bucket_by_length and whole:
            window = np.arange(whole) // (self.batch_size * WINDOW_BATCHES)
            # Stable by (window, length); the permutation above breaks ties at random.
            order = order[np.lexsort((self._lengths[order], window))]
        grid = order.reshape(-1, self.batch_size)
        if self.bucket_by_length and whole:
            grid = rng.permuted(rng.permutation(grid, axis=0), axis=1)
        batches = list(grid)
        if len(rest) >= self.min_batch:
            batches.append(rest)
        for rows in batches:
            rows.flags.writeable = False
        return batches
