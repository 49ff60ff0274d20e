"""Anchors against many columns, a block of columns at a time: no matrix of all similarities is ever held.

Shape letters: b anchors, N columns, D embedding size, n columns of a block, k nearest columns.

The log-sum-exp over blocks, and a backward that computes them again, are those of Milakov & Gimelshein 2018
(arXiv 1805.02867) and of Gao & Zhang 2024 (Inf-CL, arXiv 2410.17243).
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

BLOCK = 1 << 22
"""Similarities that are held at a time; 16 MB in fp32."""

_NARROWEST = 64  # columns: products with fewer are slow, whatever the number of anchors


class _OverColumns(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, z_bD: Tensor, columns_ND: Tensor, temperature: float, own_from: int | None, masks: Sequence[Tensor]
    ) -> tuple[Tensor, Tensor, Tensor]:
        scaled_bD = z_bD / temperature
        own_b = z_bD.new_zeros(len(z_bD))
        highest_b, total_b = (z_bD.new_full((len(z_bD),), -torch.inf) for _ in range(2))
        for _, s_bn, own in _blocks(scaled_bD, columns_ND, own_from, masks):
            if own is not None:
                own_b[own.anchors] = own.similarities
            top_b = s_bn.amax(dim=1)
            highest_b = torch.maximum(highest_b, top_b)
            shift_b = top_b.masked_fill(top_b == -torch.inf, 0.0)
            sum_b = s_bn.sub_(shift_b.unsqueeze(1)).exp_().sum(dim=1)
            total_b = torch.logaddexp(total_b, sum_b.log() + shift_b)
        ctx.save_for_backward(scaled_bD, columns_ND, total_b)
        ctx.how = temperature, own_from, masks
        highest_b = highest_b * temperature
        ctx.mark_non_differentiable(highest_b)
        return total_b, own_b * temperature, highest_b

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None, None, None]:
        grad_total_b, grad_own_b, _ = grads
        scaled_bD, columns_ND, total_b = ctx.saved_tensors
        temperature, own_from, masks = ctx.how
        with torch.autocast(scaled_bD.device.type, enabled=False):
            total_b = total_b.masked_fill(total_b == -torch.inf, torch.inf)  # no column, so no share of one
            grad_z_bD, grad_columns_ND = torch.zeros_like(scaled_bD), torch.empty_like(columns_ND)
            for columns, s_bn, own in _blocks(scaled_bD, columns_ND, own_from, masks):
                grad_bn = s_bn.sub_(total_b.unsqueeze(1)).exp_().mul_(grad_total_b.unsqueeze(1))
                if own is not None:
                    own.place.copy_(grad_own_b[own.anchors] * temperature)
                grad_z_bD.addmm_(grad_bn, columns_ND[columns])
                torch.mm(grad_bn.T, scaled_bD, out=grad_columns_ND[columns])
            return grad_z_bD / temperature, grad_columns_ND, None, None, None


def over_columns(
    z_bD: Tensor,
    columns_ND: Tensor,
    *,
    temperature: float,
    own_from: int | None = None,
    masks: Sequence[Tensor] = (),
) -> tuple[Tensor, Tensor, Tensor]:
    """Compare anchors to all columns but their own.

    Args:
        z_bD: anchors.
        columns_ND: the columns; both get gradient.
        temperature: divides the similarities.
        own_from: the column of the first anchor, that of the others follow; None: no anchor has one.
        masks: bool [b, N] each; a column takes part for an anchor where all are True. Own ones are not looked at.

    Returns:
        Each [b]: the log of the sum of exp(similarity / temperature), -inf where no column takes part; the similarity
        to the own column (0 if there is none); the highest similarity to another, -inf where there is none, without
        gradient.
    """
    dtype = torch.promote_types(z_bD.dtype, columns_ND.dtype)
    found: tuple[Tensor, Tensor, Tensor] = _OverColumns.apply(  # type: ignore[no-untyped-call]
        z_bD.to(dtype), columns_ND.to(dtype), temperature, own_from, masks
    )
    return found


@torch.no_grad()
def nearest(
    z_bD: Tensor, columns_ND: Tensor, *, k: int, own_from: int | None = None, masks: Sequence[Tensor] = ()
) -> tuple[Tensor, Tensor]:
    """Find the k most similar columns of each anchor, but for its own one; the most similar first.

    Args:
        z_bD: anchors.
        columns_ND: the columns.
        k: at most N.
        own_from: see `over_columns`.
        masks: see `over_columns`.

    Returns:
        The similarities [b, k], without gradient, -inf in place of those that an anchor does not have; which they are.
    """
    best_bk = z_bD.new_empty(len(z_bD), 0)
    which_bk = torch.empty(len(z_bD), 0, dtype=torch.int64, device=z_bD.device)
    for columns, s_bn, _ in _blocks(z_bD, columns_ND, own_from, masks):
        of_block_bk, place_bk = s_bn.topk(min(k, s_bn.shape[1]), dim=1)
        both_bk = torch.cat([best_bk, of_block_bk], dim=1)
        best_bk, order_bk = both_bk.topk(min(k, both_bk.shape[1]), dim=1)
        which_bk = torch.cat([which_bk, place_bk + columns.start], dim=1).gather(1, order_bk)
    return best_bk, which_bk


@dataclass(frozen=True, slots=True)
class _Own:
    """Which anchors have their own column in a block, the similarities, and the view of the block where these were."""

    anchors: slice
    similarities: Tensor
    place: Tensor


def _blocks(
    z_bD: Tensor, columns_ND: Tensor, own_from: int | None, masks: Sequence[Tensor]
) -> Iterator[tuple[slice, Tensor, _Own | None]]:
    """Yield which columns, and their similarities [b, n], -inf where one is masked or an anchor's own."""
    b, N = len(z_bD), len(columns_ND)
    width = max(_NARROWEST, BLOCK // max(b, 1))
    for first in range(0, N, width):
        end = min(first + width, N)
        s_bn = z_bD @ columns_ND[first:end].T
        own = None
        if own_from is not None and (low := max(first, own_from)) < (high := min(end, own_from + b)):
            anchors = slice(low - own_from, high - own_from)
            place = s_bn[anchors, low - first : high - first].diagonal()
            own = _Own(anchors, place.clone(), place)
            place.fill_(-torch.inf)
        for mask_bN in masks:
            s_bn.masked_fill_(~mask_bN[:, first:end], -torch.inf)
        yield slice(first, end), s_bn, own
