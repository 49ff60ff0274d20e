"""One optimiser step: views in one forward, the loss of the own rows, one all-reduce of gradients."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from hncse_ray.encoder import SentenceEncoder, ready_for, to_device
from hncse_ray.negatives import NearHits
from hncse_ray.training.distributed import RankShare, rank, world_size
from hncse_ray.training.objective import Metrics, Neighbours, Objective
from hncse_ray.training.repelled import ColumnFacts, apart, columns_mask, share_a_key

_NO_RANK = 2**32 - 1  # in seeds; what is left out there counts as 0, which is a rank


@dataclass(frozen=True)
class LocalBatch:
    """This rank's part of one global contrastive batch.

    Attributes:
        number: index of the global batch since the start of training; seeds dropout and random pairs.
        rows: token ids of this rank's b sentences.
        sizes: b of every rank.
        negatives: the global and the given negatives of these; None where the run uses none.
        mask_bB: which rows of the whole batch they may repel; see :func:`~hncse_ray.corpus.batch_mask`.
        keys_bn: what else they are known by; rows of the batch that share a key do not repel each other either.
        near: what the index says of the batch; rows that it keeps apart do not repel each other either.
        targets: token ids of what the sentences belong to, the second view; None: the sentences themselves.
        layouts: of each chunk that is encoded at a time, see :func:`lay_out`; None: they are laid out by the step.
    """

    number: int
    rows: Sequence[NDArray[np.integer]]
    sizes: tuple[int, ...]
    negatives: StepNegatives | None = None
    mask_bB: NDArray[np.bool_] | None = None
    keys_bn: NDArray[np.int64] | None = None
    near: NearHits | None = None
    targets: Sequence[NDArray[np.integer]] | None = None
    layouts: Sequence[Layout] | None = None


@dataclass(frozen=True)
class StepNegatives:
    """Negatives of this rank's anchors as a step needs them: first those that are stored, then those that it encodes.

    Attributes:
        mask_bm: which are usable.
        stored_bmD: vectors of those that come as the index has them, or None.
        fresh_bm: token ids of those that are encoded with the batch, None where not usable, or None.
        teacher_bL: what the index scores the columns of each anchor, see `distillation`; None if it is not asked.
        columns: what decides which of everyone's an anchor is repelled from; None where they are no columns of all.
    """

    mask_bm: NDArray[np.bool_]
    stored_bmD: NDArray[np.float32] | None
    fresh_bm: Sequence[Sequence[NDArray[np.integer] | None]] | None
    teacher_bL: NDArray[np.float32] | None = None
    columns: ColumnFacts | None = None


@dataclass(frozen=True)
class Seen:
    """What a step has compared, of this rank's rows; detached.

    Attributes:
        z1_bD: first views.
        z2_bD: second views.
        mask_bb: which of these rows may repel each other; None: all.
        neighbours: of the rows, or None.
    """

    z1_bD: Tensor
    z2_bD: Tensor
    mask_bb: Tensor | None
    neighbours: Neighbours | None


@dataclass(frozen=True)
class StepContext:
    """What a step needs besides the model and the batch.

    Attributes:
        objective: computes the loss.
        seed: of the run.
        step: optimiser steps taken.
        total_steps: of the run.
        chunk_size: rows encoded at a time in gradient caching; None: all at once.
        columns_dtype: what vectors travel in that are columns of all ranks' anchors.
    """

    objective: Objective
    seed: int
    step: int
    total_steps: int
    chunk_size: int | None
    columns_dtype: torch.dtype = torch.float32


def train_step(
    model: SentenceEncoder | DistributedDataParallel,
    optimizer: torch.optim.Optimizer,
    batches: Sequence[LocalBatch],
    context: StepContext,
    *,
    max_grad_norm: float,
) -> tuple[Metrics, Seen]:
    """Take one optimiser step over one or several (accumulated) global batches.

    Args:
        model: the encoder, under DDP where there are several ranks.
        optimizer: of the model's parameters.
        batches: this rank's parts of the global batches; their losses are averaged.
        context: objective, seed, schedule position and chunk size of gradient caching.
        max_grad_norm: the gradient's norm is clipped to it.

    Returns:
        Metrics as 0-d tensors, averaged over ``batches`` (among them ``loss`` and ``grad_norm``), and what was
        compared of this rank's rows in the last global batch.
    """
    model.train()
    optimizer.zero_grad(set_to_none=True)
    collected: list[Metrics] = []
    for i, batch in enumerate(batches):
        accumulate = i < len(batches) - 1
        backward = _backward_cached if context.chunk_size else _backward_whole
        batch = lay_out(batch, _encoder_of(model), views=context.objective.views, chunk_size=context.chunk_size)
        metrics, seen = backward(model, batch, context, scale=world_size() / len(batches), accumulate=accumulate)
        collected.append(metrics)
    grad_norm = nn.utils.clip_grad_norm_(model.parameters(), max_grad_norm)
    optimizer.step()
    averaged = {key: torch.stack([m[key] for m in collected]).mean() for key in collected[0]}
    return averaged | {"grad_norm": grad_norm.detach()}, seen


def _backward_whole(
    model: Any, batch: LocalBatch, context: StepContext, *, scale: float, accumulate: bool
) -> tuple[Metrics, Seen]:
    with _no_sync(model, accumulate):
        local = _encode(model, batch, context, chunk=0)
        loss, metrics, seen = _loss(local, batch, context)
        (loss * scale).backward()  # type: ignore[no-untyped-call]
    return metrics | {"loss": loss.detach()}, seen


def _backward_cached(
    model: Any, batch: LocalBatch, context: StepContext, *, scale: float, accumulate: bool
) -> tuple[Metrics, Seen]:
    """Gradient caching (Gao et al. 2021, arXiv 2101.06983): memory of one chunk, gradient of the whole batch.

    Each chunk is encoded twice under the same seed, first without a graph, then to push the cached gradient of its
    embeddings through the encoder. Only the last chunk's backward synchronises.
    """
    assert context.chunk_size is not None
    chunks = [slice(start, start + context.chunk_size) for start in range(0, len(batch.rows), context.chunk_size)]
    encoder = _encoder_of(model)
    with torch.no_grad():
        parts = [_encode(encoder, batch, context, chunk=c) for c in range(len(chunks))]
    local = [torch.cat(part).requires_grad_() for part in zip(*parts, strict=True)]
    loss, metrics, seen = _loss(local, batch, context)
    (loss * scale).backward()  # type: ignore[no-untyped-call]
    for c, rows in enumerate(chunks):
        with _no_sync(model, accumulate or c < len(chunks) - 1):
            # A chunk may have no fresh negative at all, and a loss may use none of them: then there is no gradient.
            pairs = [
                (z_c, z.grad[rows])
                for z_c, z in zip(_encode(model, batch, context, chunk=c), local, strict=True)
                if z.grad is not None and z_c.requires_grad
            ]
            torch.autograd.backward([z_c for z_c, _ in pairs], [grad for _, grad in pairs])
    return metrics | {"loss": loss.detach()}, seen


def _loss(embedded: list[Tensor], batch: LocalBatch, context: StepContext) -> tuple[Tensor, Metrics, Seen]:
    views, fresh = embedded[: context.objective.views], embedded[context.objective.views :]
    device, share = views[0].device, RankShare.of(batch.sizes)
    # Every rank draws the same pairs: the generator knows the batch's number, not the rank.
    generator = torch.Generator(device=device).manual_seed(_seed(context.seed, batch.number, _NO_RANK))
    neighbours = None
    if (negatives := batch.negatives) is not None:
        stored = [] if negatives.stored_bmD is None else [to_device(negatives.stored_bmD, device)]
        vectors_bmD, mask_bm, everyone = torch.cat([*stored, *fresh], dim=1), to_device(negatives.mask_bm, device), None
        if negatives.columns is not None:
            everyone = columns_mask(negatives.columns, mask_bm, share)
            vectors_bmD = vectors_bmD.to(context.columns_dtype)
        teacher_bL = None if negatives.teacher_bL is None else to_device(negatives.teacher_bL, device)
        neighbours = Neighbours(vectors_bmD, mask_bm, everyone, teacher_bL)
    mask_bB, of_index = _repelled(batch, share, device)
    loss, metrics = context.objective(
        views,
        neighbours,
        batch_mask=mask_bB,
        share=share,
        step=context.step,
        total_steps=context.total_steps,
        generator=generator,
    )
    found = None if neighbours is None else replace(neighbours, vectors_BmD=neighbours.vectors_BmD.detach())
    own = slice(share.start, share.start + len(views[0]))
    mask_bb = None if mask_bB is None else mask_bB[:, own]
    return loss, metrics | of_index, Seen(views[0].detach(), views[1].detach(), mask_bb, found)


def _repelled(batch: LocalBatch, share: RankShare, device: torch.device) -> tuple[Tensor | None, Metrics]:
    """Which rows of the batch the own ones may repel, None = all others; and how many pairs the index keeps apart."""
    mask_bB = None if batch.mask_bB is None else to_device(batch.mask_bB, device)
    found: Metrics = {}
    if batch.keys_bn is not None:
        shared_bB = share_a_key(batch.keys_bn, share, device)
        mask_bB = ~shared_bB if mask_bB is None else mask_bB & ~shared_bB
    if batch.near is not None:
        apart_bB = apart(batch.near, share, device)
        own_bB = torch.zeros_like(apart_bB)
        own_bB.diagonal(share.start).fill_(True)
        mask_bB = ~(apart_bB | own_bB) if mask_bB is None else mask_bB & ~apart_bB
        found["negatives/masked_in_batch"] = share.add(apart_bB.sum().float()) / 2
    return mask_bB, found


@dataclass(frozen=True)
class Layout:
    """Rows that are encoded at a time, in the host's memory: those of all views, then the fresh negatives.

    Attributes:
        features: what the encoder's ``placed`` takes.
        rows: of one view.
        slots: of fresh negatives, usable or not; None where none are encoded.
        usable: which of the slots are.
        lengths: tokens of all rows.
    """

    features: dict[str, Any]
    rows: int
    slots: int | None
    usable: Tensor
    lengths: NDArray[np.int64]


def lay_out(batch: LocalBatch, encoder: SentenceEncoder, *, views: int, chunk_size: int | None) -> LocalBatch:
    """Return a batch with what its chunks are encoded from; in the thread that reads ahead, or by the step itself."""
    if batch.layouts is not None:
        return batch
    size = chunk_size or len(batch.rows)
    chunks = [slice(start, start + size) for start in range(0, len(batch.rows), size)]
    return replace(batch, layouts=[_layout(batch, encoder, rows, views=views) for rows in chunks])


def _layout(batch: LocalBatch, encoder: SentenceEncoder, rows: slice, *, views: int) -> Layout:
    own = list(batch.rows[rows])
    fresh_cm = None if batch.negatives is None else batch.negatives.fresh_bm
    slots = [] if fresh_cm is None else [tokens for of_row in fresh_cm[rows] for tokens in of_row]
    views_of = [own] * views
    if batch.targets is not None:
        views_of[1] = list(batch.targets[rows])
    tokens = [*itertools.chain(*views_of), *(row for row in slots if row is not None)]
    # Where a side's prompt is left out of the pooling, that of the other has as many tokens: see `check_run`.
    features = encoder.layout(tokens, side=None if batch.targets is None else "query")
    usable = np.array([i for i, tokens in enumerate(slots) if tokens is not None], dtype=np.int64)
    lengths = np.fromiter(map(len, tokens), dtype=np.int64, count=len(tokens))
    placed = ready_for(usable, encoder.device)
    return Layout(features, len(own), None if fresh_cm is None else len(slots), placed, lengths)


def _encode(model: Any, batch: LocalBatch, context: StepContext, *, chunk: int) -> list[Tensor]:
    """Embed a chunk's rows once a view, all views in one forward, and their fresh negatives.

    The second view is that of the targets, where there are any. Dropout depends on seed, batch, rank and chunk alone.

    Returns:
        ``[c, D]`` of each view, and ``[c, m, D]`` of fresh negatives, where there are any.
    """
    torch.manual_seed(_seed(context.seed, batch.number, rank(), chunk))
    assert batch.layouts is not None
    layout = batch.layouts[chunk]
    z = model(_encoder_of(model).placed(layout.features))
    z, fresh = z[: context.objective.views * layout.rows], z[context.objective.views * layout.rows :]
    views = list(z.chunk(context.objective.views))
    if layout.slots is not None:
        # Even where there is none: all ranks push gradient through the same collectives.
        where = to_device(layout.usable, z.device)
        placed = z.new_zeros(layout.slots, z.shape[1]).index_copy(0, where, fresh)
        views.append(placed.view(layout.rows, -1, z.shape[1]))
    return views


def _encoder_of(model: Any) -> SentenceEncoder:
    encoder: SentenceEncoder = getattr(model, "module", model)
    return encoder


def _seed(*parts: int) -> int:
    return int(np.random.SeedSequence(parts).generate_state(1, np.uint64)[0] >> 1)


def _no_sync(model: Any, active: bool) -> AbstractContextManager[None]:
    return model.no_sync() if active and isinstance(model, DistributedDataParallel) else nullcontext()
