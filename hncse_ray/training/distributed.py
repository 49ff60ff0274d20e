"""Collectives of training: a gather that carries gradient, sharded encoding, and failing together.

Every function is the identity, or local, where no process group is initialised.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeVar

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor

from hncse_ray.encoder import SentenceEncoder, Side, length_batches
from hncse_ray.errors import HncseError

Value = TypeVar("Value")


def world_size() -> int:
    """Number of ranks; 1 without a process group."""
    return dist.get_world_size() if dist.is_initialized() else 1


def rank() -> int:
    """This process's rank; 0 without a process group."""
    return dist.get_rank() if dist.is_initialized() else 0


class _GatherRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, sizes: tuple[int, ...]) -> Tensor:
        ctx.start, ctx.rows = sum(sizes[: rank()]), rows.shape[0]
        padded = rows.new_zeros((max(sizes), *rows.shape[1:]))
        padded[: rows.shape[0]] = rows
        parts = [torch.empty_like(padded) for _ in sizes]
        dist.all_gather(parts, padded)
        return torch.cat([part[:size] for part, size in zip(parts, sizes, strict=True)])

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, None]:
        return grad_outputs[0][ctx.start : ctx.start + ctx.rows], None


def gather_rows(rows: Tensor, sizes: Sequence[int]) -> Tensor:
    """Concatenate every rank's rows in rank order; gradient flows to the local ones.

    Each rank computes the same loss from the same global rows, so the gradient of the local rows is complete
    as it stands: summed over ranks (DDP's mean times the number of ranks) the parameters' gradient is that of one
    process with the whole batch. No communication is needed backwards.

    Args:
        rows: ``[b, ...]``, this rank's rows.
        sizes: b of every rank; they may differ.

    Returns:
        ``[sum(sizes), ...]``.
    """
    if world_size() == 1:
        return rows
    gathered: Tensor = _GatherRows.apply(rows, tuple(sizes))  # type: ignore[no-untyped-call]
    return gathered


class ShardedEncode:
    """An ``encode(list[str]) -> ndarray`` whose batches are shared out over the ranks.

    All ranks must call it with the same texts and all get all vectors. A batch is the same whatever the number of
    ranks, so the vectors are too.
    """

    def __init__(self, encoder: SentenceEncoder, batch_size: int, side: Side | None = None) -> None:
        self._encoder = encoder
        self._batch_size = batch_size
        self._side = side

    def __call__(self, texts: list[str]) -> NDArray[np.float32]:
        """Embed N texts; ``[N, D]`` float32 on every rank.

        Raises:
            HncseError: a rank's vectors cannot be used; every rank raises it.
        """
        rows = self._encoder.tokenize(texts, side=self._side)
        out_ND = np.zeros((len(rows), self._encoder.dimension), dtype=np.float32)
        error: HncseError | None = None
        try:
            for number, index in enumerate(length_batches(rows, self._batch_size)):
                if number % world_size() == rank():
                    out_ND[index] = self._encoder.encode_rows([rows[i] for i in index], side=self._side)
        except HncseError as caught:  # of this rank's batches alone: the others are on their way to the sum below
            error = caught
        raise_together(error)
        if world_size() > 1:
            total = torch.from_numpy(out_ND).to(self._encoder.device)
            dist.all_reduce(total)  # each row was written by one rank, the others hold zeros: the sum is exact
            out_ND = total.cpu().numpy()
        return out_ND

    def on_side(self, side: Side) -> ShardedEncode:
        """Return the same with the prompt of queries, or of documents."""
        return ShardedEncode(self._encoder, self._batch_size, side)


def broadcast(value: Value | None) -> Value:
    """Return the first rank's value on every rank; the others' is not looked at."""
    box = [value]
    if world_size() > 1:
        device = torch.device("cuda", torch.cuda.current_device()) if dist.get_backend() == "nccl" else None
        dist.broadcast_object_list(box, src=0, device=device)
    assert box[0] is not None
    return box[0]


def gather_values(value: Value) -> list[Value]:
    """Return every rank's value, in rank order."""
    values = [value] * world_size()
    if world_size() > 1:
        dist.all_gather_object(values, value)
    return values


def raise_together(error: HncseError | None) -> None:
    """Raise on every rank if any rank has an error, so that none waits for ever in a collective.

    Raises:
        HncseError: the error of the lowest rank that has one.
    """
    first = next((e for e in gather_values(error) if e is not None), None)
    if first is not None:
        raise first
