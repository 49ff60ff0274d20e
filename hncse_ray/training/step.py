"""One optimiser step: views in one forward, a gather that carries gradient, one all-reduce."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from hncse_ray.encoder import SentenceEncoder
from hncse_ray.training.distributed import gather_rows, rank, world_size
from hncse_ray.training.objective import Metrics, Objective


@dataclass(frozen=True)
class LocalBatch:
    """This rank's part of one global contrastive batch.

    Attributes:
        number: index of the global batch since the start of training; seeds dropout and random pairs.
        rows: token ids of this rank's b sentences.
        sizes: b of every rank.
    """

    number: int
    rows: Sequence[NDArray[np.integer]]
    sizes: tuple[int, ...]


@dataclass(frozen=True)
class StepContext:
    """What a step needs besides the model and the batch."""

    objective: Objective
    seed: int
    step: int
    total_steps: int
    chunk_size: int | None


def train_step(
    model: SentenceEncoder | DistributedDataParallel,
    optimizer: torch.optim.Optimizer,
    batches: Sequence[LocalBatch],
    context: StepContext,
    *,
    max_grad_norm: float,
) -> tuple[Metrics, Tensor]:
    """Take one optimiser step over one or several (accumulated) global batches.

    Args:
        model: the encoder, under DDP where there are several ranks.
        optimizer: of the model's parameters.
        batches: this rank's parts of the global batches; their losses are averaged.
        context: objective, seed, schedule position and chunk size of gradient caching.
        max_grad_norm: the gradient's norm is clipped to it.

    Returns:
        Metrics as 0-d tensors, averaged over ``batches`` (among them ``loss`` and ``grad_norm``), and the first
        view ``[B, D]`` of the last global batch, detached.
    """
    model.train()
    optimizer.zero_grad(set_to_none=True)
    collected: list[Metrics] = []
    for i, batch in enumerate(batches):
        accumulate = i < len(batches) - 1
        backward = _backward_cached if context.chunk_size else _backward_whole
        metrics, z1_BD = backward(model, batch, context, scale=world_size() / len(batches), accumulate=accumulate)
        collected.append(metrics)
    grad_norm = nn.utils.clip_grad_norm_(model.parameters(), max_grad_norm)
    optimizer.step()
    averaged = {key: torch.stack([m[key] for m in collected]).mean() for key in collected[0]}
    return averaged | {"grad_norm": grad_norm.detach()}, z1_BD.detach()


def _backward_whole(
    model: Any, batch: LocalBatch, context: StepContext, *, scale: float, accumulate: bool
) -> tuple[Metrics, Tensor]:
    with _no_sync(model, accumulate):
        local = _encode_views(model, batch, context, chunk=0, rows=slice(None))
        views = [gather_rows(z_bD, batch.sizes) for z_bD in local]
        loss, metrics = _loss(views, batch, context)
        (loss * scale).backward()  # type: ignore[no-untyped-call]
    return metrics | {"loss": loss.detach()}, views[0]


def _backward_cached(
    model: Any, batch: LocalBatch, context: StepContext, *, scale: float, accumulate: bool
) -> tuple[Metrics, Tensor]:
    """Gradient caching (Gao et al. 2021, arXiv 2101.06983): memory of one chunk, gradient of the whole batch.

    Each chunk is encoded twice under the same seed, first without a graph, then to push the cached gradient of its
    embeddings through the encoder. Only the last chunk's backward synchronises.
    """
    assert context.chunk_size is not None
    chunks = [slice(start, start + context.chunk_size) for start in range(0, len(batch.rows), context.chunk_size)]
    encoder: SentenceEncoder = getattr(model, "module", model)
    with torch.no_grad():
        parts = [_encode_views(encoder, batch, context, chunk=c, rows=rows) for c, rows in enumerate(chunks)]
    local = [torch.cat(view).requires_grad_() for view in zip(*parts, strict=True)]
    views = [gather_rows(z_bD, batch.sizes) for z_bD in local]
    loss, metrics = _loss(views, batch, context)
    (loss * scale).backward()  # type: ignore[no-untyped-call]
    for c, rows in enumerate(chunks):
        with _no_sync(model, accumulate or c < len(chunks) - 1):
            views_cD = _encode_views(model, batch, context, chunk=c, rows=rows)
            cached = [z_bD.grad[rows] for z_bD in local if z_bD.grad is not None]
            torch.autograd.backward(views_cD, cached)
    return metrics | {"loss": loss.detach()}, views[0]


def _loss(views: list[Tensor], batch: LocalBatch, context: StepContext) -> tuple[Tensor, Metrics]:
    # Every rank draws the same pairs: the generator knows the batch's number, not the rank.
    generator = torch.Generator(device=views[0].device).manual_seed(_seed(context.seed, batch.number))
    return context.objective(views, step=context.step, total_steps=context.total_steps, generator=generator)


def _encode_views(model: Any, batch: LocalBatch, context: StepContext, *, chunk: int, rows: slice) -> list[Tensor]:
    """Embed rows once a view, all views in one forward; dropout depends on seed, batch, rank and chunk alone."""
    encoder: SentenceEncoder = getattr(model, "module", model)
    torch.manual_seed(_seed(context.seed, batch.number, rank(), chunk))
    ids_bL, mask_bL = encoder.batch_tensors(batch.rows[rows])
    n = context.objective.views
    z = model(ids_bL.repeat(n, 1), None if mask_bL is None else mask_bL.repeat(n, 1))
    return list(z.chunk(n))


def _seed(*parts: int) -> int:
    return int(np.random.SeedSequence(parts).generate_state(1, np.uint64)[0] >> 1)


def _no_sync(model: Any, active: bool) -> AbstractContextManager[None]:
    return model.no_sync() if active and isinstance(model, DistributedDataParallel) else nullcontext()
