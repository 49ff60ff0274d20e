"""Rows of unlike length in one forward, behind each other instead of padded.

All layers but attention treat every token apart, so the rows of a step can be one long row ``[1, T]`` as long as each
token attends to its own row only. Sorted by length, rows of equal length lie together: their attention is a slice of
the long row seen as ``[heads, rows, length, width]``, without a mask and without padding.

On accelerators a kernel's start costs more than some padding, so it is used on CPUs.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from transformers import AttentionInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

from hncse_ray.encoder.dropout import kept_by_dropout

_ATTENTION = "sdpa_of_packed_rows"
# A run with so many attention weights or fewer is computed in fp32: for a bf16 product of a new shape oneDNN makes a
# kernel, 0.6 ms each, and runs of a few rows come in new shapes all the time (benchmarks/LOG.md).
_FP32_WEIGHTS = 300_000
# Full attention and learned absolute positions: nothing in them knows where a row lies but the position ids.
_FAMILIES = ("bert", "camembert", "distilbert", "electra", "roberta", "xlm-roberta")


@dataclass(frozen=True)
class Packing:
    """How rows lie in a packed ``[1, T]``.

    Attributes:
        position_ids: ``[1, T]`` int64, as the backbone numbers them.
        runs: (rows, length) of each run of rows of equal length.
        place_N: for each row as it was given, its place among the packed rows.
    """

    position_ids: Tensor
    runs: tuple[tuple[int, int], ...]
    place_N: Tensor

    def split(self, states: Tensor) -> list[Tensor]:
        """Cut packed token states ``[1, T, D]`` into ``[rows, length, D]`` a run."""
        parts = torch.split(states[0], [rows * length for rows, length in self.runs])
        return [part.view(rows, length, -1) for part, (rows, length) in zip(parts, self.runs, strict=True)]


def allow_packing(backbone: PreTrainedModel) -> bool:
    """Make a backbone ready for packed rows; False where its architecture does not allow them."""
    if backbone.config.model_type not in _FAMILIES or backbone.config._attn_implementation not in ("sdpa", _ATTENTION):
        return False
    backbone.set_attn_implementation(_ATTENTION)
    return True


def pack_rows(backbone: PreTrainedModel, rows_N: Sequence[NDArray[np.integer]]) -> tuple[Tensor, Packing]:
    """Lay token rows behind each other, shortest first: ids ``[1, T]`` and how they lie."""
    lengths_N = np.array([len(row) for row in rows_N])
    order_N = np.argsort(lengths_N, kind="stable")
    lengths, counts = np.unique(lengths_N, return_counts=True)
    # RoBERTa and its kin number positions from behind the padding's id.
    embeddings: Any = backbone.embeddings
    first = embeddings.padding_idx + 1 if hasattr(embeddings, "create_position_ids_from_input_ids") else 0
    ids_T = np.concatenate([rows_N[i] for i in order_N]).astype(np.int64)
    positions_T = np.concatenate([np.arange(first, first + lengths_N[i]) for i in order_N])
    packing = Packing(
        torch.from_numpy(positions_T)[None],
        tuple(zip(counts.tolist(), lengths.tolist(), strict=True)),
        torch.from_numpy(np.argsort(order_N, kind="stable")),
    )
    return torch.from_numpy(ids_T)[None], packing


def _attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    packing: Packing | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """Attend within each row; ``[1, heads, T, width]`` each, and ``[1, T, heads, width]`` back."""
    if packing is None:
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **others
        )
    heads, width = query.shape[1], query.shape[3]
    scale = width**-0.5 if scaling is None else scaling
    q_THW, k_THW, v_THW = (x[0].transpose(0, 1) for x in (query * scale, key, value))
    if dropout:  # scaled_dot_product_attention would hold the weights in memory too, and draw a mask for every length
        kept_M, inverse = kept_by_dropout(sum(heads * rows * length**2 for rows, length in packing.runs), dropout)
        apply: Any = _DroppedAttention.apply
        return apply(q_THW, k_THW, v_THW * inverse, kept_M.to(q_THW.dtype), packing.runs)[None], None
    # One split and one concatenation: slices would each have a gradient of the whole tensor's size.
    parts = (torch.split(x, [rows * length for rows, length in packing.runs]) for x in (q_THW, k_THW, v_THW))
    attended = []
    for (rows, length), q, k, v in zip(packing.runs, *parts, strict=True):
        q, k, v = (x.view(rows, length, heads, width).transpose(1, 2) for x in (q, k, v))
        z = nn.functional.scaled_dot_product_attention(q, k, v, scale=1.0)
        attended.append(z.transpose(1, 2).reshape(rows * length, heads, width))
    return torch.cat(attended)[None], None


class _DroppedAttention(torch.autograd.Function):
    """``(softmax(q k^T) * mask) v`` within each row, for packed ``[T, heads, width]``.

    With some 25 lengths in a batch the number of operations counts. Written out, the gradient of slices goes where it
    belongs, and weights keep the dtype of their products: under autocast that is 345 casts where autograd makes 915
    (benchmarks/LOG.md).
    """

    @staticmethod
    def forward(ctx: Any, q_THW: Tensor, k_THW: Tensor, v_THW: Tensor, mask_M: Tensor, runs: Any) -> Tensor:
        z_THW = torch.empty_like(q_THW, memory_format=torch.contiguous_format)
        kept: list[Tensor] = []
        with torch.autocast(device_type="cpu", enabled=False):
            for (rows, length), mask, *packed in _by_run(runs, mask_M, q_THW, k_THW, v_THW, z_THW):
                *qkv, z = (_heads_first(x, rows, length) for x in packed)
                is_small = mask.numel() <= _FP32_WEIGHTS
                dtype = torch.promote_types(q_THW.dtype, torch.float32) if is_small else q_THW.dtype
                q, k, v = (_contiguous(x, dtype) for x in qkv)
                p = torch.bmm(q, k.transpose(1, 2)).softmax(-1)
                z.copy_(torch.bmm(p * mask.view_as(p), v).view_as(z))
                kept += (q, k, v, p)
        ctx.save_for_backward(mask_M, *kept)
        ctx.runs = runs
        return z_THW

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dz_THW: Tensor) -> tuple[Tensor, Tensor, Tensor, None, None]:
        mask_M, *kept = ctx.saved_tensors
        grads = [torch.empty(dz_THW.shape, dtype=dz_THW.dtype) for _ in range(3)]
        for i, ((rows, length), mask, *packed) in enumerate(_by_run(ctx.runs, mask_M, dz_THW, *grads)):
            q, k, v, p = kept[4 * i : 4 * i + 4]
            dz, dq, dk, dv = (_heads_first(x, rows, length) for x in packed)
            dz, mask = _contiguous(dz, v.dtype), mask.view_as(p)
            dp = torch.bmm(dz, v.transpose(1, 2)).mul_(mask)
            ds = torch.ops.aten._softmax_backward_data(dp, p, -1, p.dtype)
            dv.copy_(torch.bmm((p * mask).transpose(1, 2), dz).view_as(dv))
            dq.copy_(torch.bmm(ds, k).view_as(dq))
            dk.copy_(torch.bmm(ds.transpose(1, 2), q).view_as(dk))
        return grads[0], grads[1], grads[2], None, None


def _by_run(runs: Sequence[tuple[int, int]], mask_M: Tensor, *packed: Tensor) -> Iterator[tuple[Any, ...]]:
    """Yield (rows, length), the mask and the tokens of each run."""
    heads = packed[0].shape[1]
    masks = torch.split(mask_M, [heads * rows * length**2 for rows, length in runs])
    parts = (torch.split(x, [rows * length for rows, length in runs]) for x in packed)
    return zip(runs, masks, *parts, strict=True)


def _contiguous(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Copy ``[rows, heads, length, width]`` to ``[rows * heads, length, width]`` in one operation."""
    return x.to(dtype, memory_format=torch.contiguous_format).reshape(-1, *x.shape[2:])


def _heads_first(x: Tensor, rows: int, length: int) -> Tensor:
    """View ``[rows * length, heads, width]`` as ``[rows, heads, length, width]``."""
    return x.view(rows, length, *x.shape[1:]).transpose(1, 2)


AttentionInterface.register(_ATTENTION, _attend)
AttentionMaskInterface.register(_ATTENTION, sdpa_mask)
