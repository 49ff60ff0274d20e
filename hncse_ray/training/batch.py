"""What a rank encodes of a global batch: its rows, their targets, the negatives beside them, and who repels whom."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from hncse_ray.config import Settings
from hncse_ray.corpus import Corpus, batch_mask, rank_slice
from hncse_ray.training.distributed import rank, world_size
from hncse_ray.training.lookup import BatchNegatives
from hncse_ray.training.step import LocalBatch, StepNegatives
from hncse_ray.training.views import Views

Bool = NDArray[np.bool_]
Int64 = NDArray[np.int64]


def local_batch(
    number: int,
    ids_B: Int64,
    corpus: Corpus,
    found: BatchNegatives | None,
    *,
    settings: Settings,
    views: Views | None = None,
) -> LocalBatch:
    """Return this rank's part of a global batch.

    Args:
        number: of the batch.
        ids_B: its rows, of all ranks.
        corpus: that they are of.
        found: what the index knows of it; None where the run looks nothing up.
        settings: of the run.
        views: its anchors and their positives, where they are made of passages.
    """
    own_b = rank_slice(np.arange(len(ids_B)), rank(), world_size())
    ids_b = ids_B[own_b]
    mask_BB = _mask(ids_B, corpus, found, views, settings)
    parts = [] if found is None else [_found(found, corpus)]
    if corpus.has_negatives:
        parts.append(_given(corpus, ids_B, mask_BB, all_columns=settings.negatives.columns == "all"))
    targets = corpus.targets(ids_b) if corpus.has_pairs else None
    if views is not None:
        targets = [views.targets[i] for i in own_b]
    return LocalBatch(
        number=number,
        rows=corpus.token_rows(ids_b) if views is None else [views.anchors[i] for i in own_b],
        sizes=tuple(len(rank_slice(ids_B, r, world_size())) for r in range(world_size())),
        negatives=_joined(parts) if parts else None,
        mask_BB=mask_BB,
        targets=targets,
    )


def _mask(
    ids_B: Int64, corpus: Corpus, found: BatchNegatives | None, views: Views | None, settings: Settings
) -> Bool | None:
    """Who may repel whom: rows that share no text and no document, and that the index does not keep apart."""
    contents, documents = corpus.contents(ids_B), corpus.kept_apart(settings.corpus)
    if views is not None:
        contents = np.concatenate([contents, views.hashes_B2], axis=1)
    mask_BB = batch_mask(contents, *([] if documents is None else [documents[ids_B]]))
    if found is not None and len(found.apart_n2):
        mask_BB = ~np.eye(len(ids_B), dtype=np.bool_) if mask_BB is None else mask_BB
        i, j = found.apart_n2.T
        mask_BB[i, j] = mask_BB[j, i] = False
    return mask_BB


def _found(found: BatchNegatives, corpus: Corpus) -> StepNegatives:
    """The neighbours of the whole corpus; if they are to be encoded again, with the tokens of this rank's."""
    fresh_bm = None
    if found.vectors_BmD is None:
        ids_bm = rank_slice(found.ids_Bm, rank(), world_size())
        rows = iter(corpus.targets(ids_bm[ids_bm >= 0]))
        fresh_bm = [[next(rows) if i >= 0 else None for i in ids_m] for ids_m in ids_bm]
    return StepNegatives(found.mask_Bm, found.columns_mask, found.vectors_BmD, fresh_bm, found.teacher_BL)


def _given(corpus: Corpus, ids_B: Int64, mask_BB: Bool | None, *, all_columns: bool) -> StepNegatives:
    """The negatives that came with the rows, but for those that an anchor must not be contrasted with.

    These are what the anchor itself holds, and what a row of the batch holds that the anchor does not repel.
    """
    hashes_B, contents_Bn = corpus.negative_hashes(ids_B), corpus.contents(ids_B)
    counts_B = np.array([len(own) for own in hashes_B])
    B, m = len(ids_B), max(1, int(counts_B.max()))
    mask_Bm: Bool = np.arange(m) < counts_B[:, None]
    hashes_Bm = np.zeros((B, m), dtype=np.int64)
    hashes_Bm[mask_Bm] = np.concatenate(hashes_B)
    columns_mask = np.tile(mask_Bm.ravel(), (B, 1)) if all_columns else None
    for i, n in np.argwhere(mask_Bm & np.isin(hashes_Bm, contents_Bn)):
        holders_B = np.any(contents_Bn == hashes_Bm[i, n], axis=1)
        barred_B = holders_B if mask_BB is None else np.any(~mask_BB[:, holders_B], axis=1)
        mask_Bm[i, n] = not barred_B[i]
        if columns_mask is not None:
            columns_mask[barred_B, i * m + n] = False
    own_b = rank_slice(np.arange(B), rank(), world_size())
    rows_b = corpus.negative_rows(ids_B[own_b])
    fresh_bm = [
        [rows[n] if usable else None for n, usable in enumerate(mask_m)]
        for rows, mask_m in zip(rows_b, mask_Bm[own_b], strict=True)
    ]
    return StepNegatives(mask_Bm, columns_mask, None, fresh_bm)


def _joined(parts: Sequence[StepNegatives]) -> StepNegatives:
    """Put the negatives of each anchor beside each other."""
    if len(parts) == 1:
        return parts[0]
    stored = [part.stored_BmD for part in parts if part.stored_BmD is not None]
    fresh = [part.fresh_bm for part in parts if part.fresh_bm is not None]
    columns = [part.columns_mask for part in parts if part.columns_mask is not None]
    B = len(parts[0].mask_Bm)
    return StepNegatives(
        mask_Bm=np.concatenate([part.mask_Bm for part in parts], axis=1),
        columns_mask=np.concatenate([c.reshape(B, B, -1) for c in columns], axis=2).reshape(B, -1) if columns else None,
        stored_BmD=stored[0] if stored else None,
        fresh_bm=[[row for of_part in own for row in of_part] for own in zip(*fresh, strict=True)] if fresh else None,
    )
