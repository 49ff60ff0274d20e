"""What a rank encodes of a global batch: its rows, their targets, the negatives beside them, and who repels whom."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from hncse_ray.config import Settings
from hncse_ray.corpus import Corpus, batch_mask, rank_slice
from hncse_ray.training.distributed import rank, world_size
from hncse_ray.training.lookup import BatchNegatives
from hncse_ray.training.repelled import ColumnFacts
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
        found: what the index knows of this rank's; None where the run looks nothing up.
        settings: of the run.
        views: this rank's anchors and their positives, where they are made of passages.
    """
    sizes = tuple(len(rank_slice(ids_B, r, world_size())) for r in range(world_size()))
    start = sum(sizes[: rank()])
    own = slice(start, start + sizes[rank()])
    everyone = settings.negatives.columns == "all" and settings.objective.name != "instance_smoothing"
    ids_b, contents_Bc = ids_B[own], corpus.contents(ids_B)
    documents = corpus.kept_apart(settings.corpus)
    keys = [*([] if documents is None else [documents[ids_B]]), *([] if views is not None else [contents_Bc])]
    mask_bB = batch_mask(*keys, own=own)
    kept_bt = _kept(contents_Bc, mask_bB, own) if corpus.has_negatives else contents_Bc[own]
    parts = [] if found is None else [_found(found, corpus)]
    facts = [] if found is None else [_facts(found.ids_bm, found.barred_bk, ids_b, kept_bt, corpus, documents)]
    if corpus.has_negatives:
        part, hashes_bm = _given(corpus, ids_B, kept_bt, own)
        parts.append(part)
        nobody, contents_bmc = np.full_like(hashes_bm, -1), np.repeat(hashes_bm[..., None], contents_Bc.shape[1], 2)
        facts.append(_facts(nobody, nobody, ids_b, kept_bt, corpus, documents, contents_bmc))
    return LocalBatch(
        number=number,
        rows=corpus.token_rows(ids_b) if views is None else views.anchors,
        sizes=sizes,
        negatives=_joined(parts, facts if everyone else []) if parts else None,
        mask_bB=mask_bB,
        keys_bn=None if views is None else np.concatenate([contents_Bc[own], views.hashes_b2], axis=1),
        near=None if found is None else found.near,
        targets=views.targets if views is not None else corpus.targets(ids_b) if corpus.has_pairs else None,
    )


def _kept(contents_Bc: Int64, mask_bB: Bool | None, own: slice) -> Int64:
    """What the rows of the batch hold that an anchor does not repel, itself among them."""
    if mask_bB is None:
        return contents_Bc[own]
    kept = [contents_Bc[~repelled_B].ravel() for repelled_B in mask_bB]
    width = max(map(len, kept))
    return np.stack([np.concatenate([own_t, np.full(width - len(own_t), own_t[0])]) for own_t in kept])


def _found(found: BatchNegatives, corpus: Corpus) -> StepNegatives:
    """The neighbours of the whole corpus; if they are to be encoded again, with their tokens."""
    fresh_bm = None
    if found.vectors_bmD is None:
        rows = iter(corpus.targets(found.ids_bm[found.ids_bm >= 0]))
        fresh_bm = [[next(rows) if i >= 0 else None for i in ids_m] for ids_m in found.ids_bm]
    return StepNegatives(found.mask_bm, found.vectors_bmD, fresh_bm, teacher_bL=found.teacher_bL)


def _given(corpus: Corpus, ids_B: Int64, kept_bt: Int64, own: slice) -> tuple[StepNegatives, Int64]:
    """The negatives that came with the rows, but for those that an anchor is not contrasted with; and their hashes.

    These are what the anchor itself holds, and what a row of the batch holds that the anchor does not repel.
    """
    most = max(len(hashes) for hashes in corpus.negative_hashes(ids_B))  # of any rank: their columns are gathered
    rows_b, of_rows = corpus.negative_rows(ids_B[own]), corpus.negative_hashes(ids_B[own])
    counts_b, m = np.array([len(hashes) for hashes in of_rows]), max(1, most)
    mask_bm: Bool = np.arange(m) < counts_b[:, None]
    hashes_bm = np.zeros((len(of_rows), m), dtype=np.int64)
    hashes_bm[mask_bm] = np.concatenate(of_rows)
    mask_bm &= ~(hashes_bm[:, :, None] == kept_bt[:, None, :]).any(axis=2)
    fresh_bm = [
        [rows[n] if usable else None for n, usable in enumerate(mask_m)]
        for rows, mask_m in zip(rows_b, mask_bm, strict=True)
    ]
    return StepNegatives(mask_bm, None, fresh_bm), hashes_bm


def _facts(
    ids_bm: Int64,
    barred_bk: Int64,
    ids_b: Int64,
    kept_bt: Int64,
    corpus: Corpus,
    documents: Int64 | None,
    contents_bmc: Int64 | None = None,
) -> ColumnFacts:
    return ColumnFacts(
        ids_bm=ids_bm,
        contents_bmc=corpus.contents(ids_bm) if contents_bmc is None else contents_bmc,
        documents_bm=None if documents is None else documents[ids_bm],
        row_ids_b=np.array(ids_b),  # the plan's own cannot be written to, which torch warns of
        kept_bt=kept_bt,
        own_documents_b=None if documents is None else documents[ids_b],
        barred_bk=barred_bk,
    )


def _joined(parts: Sequence[StepNegatives], facts: Sequence[ColumnFacts]) -> StepNegatives:
    """Put the negatives of each anchor beside each other."""
    stored = [part.stored_bmD for part in parts if part.stored_bmD is not None]
    fresh = [part.fresh_bm for part in parts if part.fresh_bm is not None]
    columns = None
    if facts:
        documents = [of_part.documents_bm for of_part in facts if of_part.documents_bm is not None]
        columns = replace(
            facts[0],
            ids_bm=np.concatenate([of_part.ids_bm for of_part in facts], axis=1),
            contents_bmc=np.concatenate([of_part.contents_bmc for of_part in facts], axis=1),
            documents_bm=np.concatenate(documents, axis=1) if documents else None,
        )
    return StepNegatives(
        mask_bm=np.concatenate([part.mask_bm for part in parts], axis=1),
        stored_bmD=stored[0] if stored else None,
        fresh_bm=[[row for of_part in own for row in of_part] for own in zip(*fresh, strict=True)] if fresh else None,
        teacher_bL=parts[0].teacher_bL,
        columns=columns,
    )
