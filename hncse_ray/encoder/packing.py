"""Rows of unlike length in one forward, behind each other instead of padded.

All layers but attention treat every token apart, so the rows of a step can be one long row ``[1, T]`` as long as each
token attends to its own row only. Sorted by length, rows of equal length lie together: their attention is a slice of
the long row seen as ``[heads, rows, length, width]``, without a mask and without padding. Only in training, where a few
rows of every length would mean many small operations, rows of like length are padded to the longest of them for that.

On accelerators a kernel's start costs more than some padding, so it is used on CPUs.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
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
# So many rows of one length are a block of their own; fewer are joined with longer ones up to this ratio.
_MANY_ROWS = 16
_STRETCH = 1.3
# Full attention and learned absolute positions: nothing in them knows where a row lies but the position ids.
_FAMILIES = ("bert", "camembert", "distilbert", "electra", "roberta", "xlm-roberta")


@dataclass(frozen=True)
class Block:
    """Consecutive rows that attend together in training, N of them, padded to L tokens each.

    Attributes:
        rows: N.
        length: L.
        tokens: t, how many there are without padding.
        token_P: for each of the N * L places the token of the block in it, the first where there is none; None where
            all rows are of the same length and the places are the tokens.
        place_t: for each token its place; None likewise.
        is_token_NL: whether there is a token; None likewise.
    """

    rows: int
    length: int
    tokens: int
    token_P: Tensor | None = None
    place_t: Tensor | None = None
    is_token_NL: Tensor | None = None

    def heads_first(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        """Copy ``[t, heads, width]`` to ``[N * heads, L, width]``."""
        if self.token_P is not None:
            x = x.index_select(0, self.token_P)
        x = x.view(self.rows, self.length, *x.shape[1:]).transpose(1, 2)
        return x.to(dtype, memory_format=torch.contiguous_format).reshape(-1, *x.shape[2:])

    def tokens_first(self, x: Tensor, out: Tensor) -> None:
        """Write ``[N * heads, L, width]`` to ``[t, heads, width]``, padding left out."""
        x = x.view(self.rows, -1, *x.shape[1:]).transpose(1, 2)
        if self.place_t is None:
            out.view(x.shape).copy_(x)
        else:
            places = x.to(out.dtype, memory_format=torch.contiguous_format).reshape(-1, *out.shape[1:])
            torch.index_select(places, 0, self.place_t, out=out)


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

    @cached_property
    def blocks(self) -> tuple[Block, ...]:
        """The runs, those of few rows joined with others of like length."""
        joined: list[list[tuple[int, int]]] = []
        for rows, length in self.runs:
            last = joined[-1] if joined else [(_MANY_ROWS, 0)]
            if max(rows, last[-1][0]) < _MANY_ROWS and length <= _STRETCH * last[0][1] + 1:
                last.append((rows, length))
            else:
                joined.append([(rows, length)])
        return tuple(_block(runs) for runs in joined)

    def split(self, states: Tensor) -> list[Tensor]:
        """Cut packed token states ``[1, T, D]`` into ``[rows, length, D]`` a run."""
        parts = torch.split(states[0], [rows * length for rows, length in self.runs])
        return [part.view(rows, length, -1) for part, (rows, length) in zip(parts, self.runs, strict=True)]


def _block(runs: Sequence[tuple[int, int]]) -> Block:
    if len(runs) == 1:
        ((rows, length),) = runs
        return Block(rows, length, rows * length)
    lengths_N = np.repeat([length for _, length in runs], [rows for rows, _ in runs])
    is_token_NL = np.arange(lengths_N.max()) < lengths_N[:, None]
    (place_t,) = np.nonzero(is_token_NL.reshape(-1))
    token_P = np.zeros(is_token_NL.size, dtype=np.int64)
    token_P[place_t] = np.arange(len(place_t))
    padding = (torch.from_numpy(array) for array in (token_P, place_t, is_token_NL))
    return Block(len(lengths_N), int(lengths_N.max()), len(place_t), *padding)


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
        mask_M, inverse = _draw_mask(packing.blocks, heads, dropout, q_THW.dtype)
        apply: Any = _DroppedAttention.apply
        return apply(q_THW, k_THW, v_THW * inverse, mask_M, packing.blocks)[None], None
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

    The number of operations counts, and written out the gradient of slices goes where it belongs, and weights keep the
    dtype of their products (benchmarks/LOG.md). Padding is neither attended to, by a weight of 0, nor asked for, by the
    mask.
    """

    @staticmethod
    def forward(ctx: Any, q_THW: Tensor, k_THW: Tensor, v_THW: Tensor, mask_M: Tensor, blocks: Any) -> Tensor:
        z_THW = torch.empty_like(q_THW, memory_format=torch.contiguous_format)
        kept: list[Tensor] = []
        with torch.autocast(device_type="cpu", enabled=False):
            for block, mask, q, k, v, z in _by_block(blocks, mask_M, q_THW, k_THW, v_THW, z_THW):
                is_small = mask.numel() <= _FP32_WEIGHTS
                dtype = torch.promote_types(q.dtype, torch.float32) if is_small else q.dtype
                q, k, v = (block.heads_first(x, dtype) for x in (q, k, v))
                s = torch.bmm(q, k.transpose(1, 2))
                if block.is_token_NL is not None:
                    is_token = block.is_token_NL[:, None, None]
                    s.view(block.rows, -1, *s.shape[1:]).masked_fill_(~is_token, -torch.inf)
                p = s.softmax(-1)
                block.tokens_first(torch.bmm(p * mask.view_as(p), v), out=z)
                kept += (q, k, v, p)
        ctx.save_for_backward(mask_M, *kept)
        ctx.blocks = blocks
        return z_THW

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dz_THW: Tensor) -> tuple[Tensor, Tensor, Tensor, None, None]:
        mask_M, *kept = ctx.saved_tensors
        grads = [torch.empty(dz_THW.shape, dtype=dz_THW.dtype) for _ in range(3)]
        for i, (block, mask, dz, dq, dk, dv) in enumerate(_by_block(ctx.blocks, mask_M, dz_THW, *grads)):
            q, k, v, p = kept[4 * i : 4 * i + 4]
            dz, mask = block.heads_first(dz, v.dtype), mask.view_as(p)
            dp = torch.bmm(dz, v.transpose(1, 2)).mul_(mask)
            ds = torch.ops.aten._softmax_backward_data(dp, p, -1, p.dtype)
            block.tokens_first(torch.bmm((p * mask).transpose(1, 2), dz), out=dv)
            block.tokens_first(torch.bmm(ds, k), out=dq)
            block.tokens_first(torch.bmm(ds.transpose(1, 2), q), out=dk)
        return grads[0], grads[1], grads[2], None, None


def _draw_mask(blocks: Sequence[Block], heads: int, p: float, dtype: torch.dtype) -> tuple[Tensor, float]:
    """Draw which attention weights survive, 0 or 1 ``[M]``, none that padding asks for; and the inverse share."""
    sizes = [heads * block.rows * block.length**2 for block in blocks]
    kept_M, inverse = kept_by_dropout(sum(sizes), p)
    mask_M = kept_M.to(dtype)
    for block, mask in zip(blocks, torch.split(mask_M, sizes), strict=True):
        if block.is_token_NL is not None:
            mask.view(block.rows, heads, block.length, block.length).mul_(block.is_token_NL[:, None, :, None])
    return mask_M, inverse


def _by_block(blocks: Sequence[Block], mask_M: Tensor, *packed: Tensor) -> Iterator[tuple[Any, ...]]:
    """Yield each block, its part of the mask and its tokens."""
    heads = packed[0].shape[1]
    masks = torch.split(mask_M, [heads * block.rows * block.length**2 for block in blocks])
    parts = (torch.split(x, [block.tokens for block in blocks]) for x in packed)
    return zip(blocks, masks, *parts, strict=True)


AttentionInterface.register(_ATTENTION, _attend)
AttentionMaskInterface.register(_ATTENTION, sdpa_mask)
