"""Attention over rows of unlike length that lie behind each other, ``[1, T]``, instead of being padded.

All layers but attention treat every token apart, so the rows of a step can be one long row if each token attends to its
own row only. Where the rows begin is told as flash attention is told it: by ``cu_seq_lens_q``. Models of transformers
hand that on to the attention function that they are set to, and :func:`use_packed_attention` sets them to the one
here. It chooses the kernel:

- On a CPU rows of equal length lie together (sorted by length): their attention is a slice of the long row seen as
  ``[heads, rows, length, width]``, without a mask and without padding. Only in training, where a few rows of every
  length would mean many small operations, rows of like length are padded to the longest of them for that.
- On a GPU it is flash attention for rows of unlike length, which can drop weights. PyTorch's public ways to it are
  ``varlen_attn``, without dropout, and jagged nested tensors, which cost 2.6 ms of the host a layer, as long as a GPU
  works on it; so its operator is called as these two call it. What it does not take (fp32) goes by nested tensors.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import repeat_kv, sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

from hncse_ray.encoder.layers import kept_by_dropout

_ATTENTION = "sdpa_of_packed_rows"
# A run with so many attention weights or fewer is computed in fp32: for a bf16 product of a new shape oneDNN makes a
# kernel, 0.6 ms each, and runs of a few rows come in new shapes all the time (benchmarks/LOG.md).
_FP32_WEIGHTS = 300_000
# So many rows of one length are a block of their own; fewer are joined with longer ones up to this ratio.
_MANY_ROWS = 16
_STRETCH = 1.3


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


@lru_cache(maxsize=8)  # every layer of a forward asks for the same ones
def _blocks(bounds: tuple[int, ...], *, joined: bool) -> tuple[Block, ...]:
    """Divide rows between these tokens, 0 and T among them, by length; ``joined``: few with others of like length."""
    lengths_N = np.diff(bounds)
    starts = np.flatnonzero(np.diff(lengths_N, prepend=-1))
    counts = np.diff(starts, append=len(lengths_N))
    blocks: list[list[tuple[int, int]]] = []
    for rows, length in zip(counts.tolist(), lengths_N[starts].tolist(), strict=True):
        last = blocks[-1] if blocks and joined else [(_MANY_ROWS, 0)]
        if max(rows, last[-1][0]) < _MANY_ROWS and last[0][1] <= length <= _STRETCH * last[0][1] + 1:
            last.append((rows, length))
        else:
            blocks.append([(rows, length)])
    return tuple(map(_block, blocks))


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


def use_packed_attention(backbone: Any) -> bool:
    """Set a model to the attention for packed rows, which also serves padded ones; False where it takes no other.

    Whether the model then gives the right vectors for packed rows must be tried: see
    :class:`hncse_ray.encoder.SentenceEncoder`.
    """
    if not backbone.is_backend_compatible() or not getattr(backbone, "_supports_sdpa", False):
        return False
    backbone.set_attn_implementation(_ATTENTION)
    return bool(backbone.config._attn_implementation == _ATTENTION)


def _attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    cu_seq_lens_q: Tensor | None = None,
    max_length_q: int | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """Attend within each row; ``[1, heads, T, width]`` each, and ``[1, T, heads, width]`` back."""
    if cu_seq_lens_q is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, dropout, scaling, is_causal, **others)
    window = others.get("sliding_window")
    if others.get("softcap") is not None or others.get("s_aux") is not None or others.get("position_bias") is not None:
        raise ValueError("attention with a soft cap, sinks or a bias of positions takes no packed rows")
    if window is not None and max_length_q is not None and max_length_q > window:
        raise ValueError(f"rows of {max_length_q} tokens are longer than the {window} that attention reaches")
    groups = query.shape[1] // key.shape[1]
    key, value = repeat_kv(key, groups), repeat_kv(value, groups)
    scale = query.shape[3] ** -0.5 if scaling is None else scaling
    causal = bool(getattr(module, "is_causal", True) if is_causal is None else is_causal)  # as in transformers
    q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))
    on_cpu = query.device.type == "cpu"
    rows = Rows(cu_seq_lens_q, max_length_q or query.shape[2], dropout, scale, causal)
    is_flash = q.dtype in (torch.bfloat16, torch.float16) and q.shape[2] == v.shape[2] <= 256 and q.shape[2] % 8 == 0
    attend = _attend_grouped if on_cpu else _attend_flash if is_flash else _attend_nested
    return attend(q, k, v, rows)[None], None


class Rows(NamedTuple):
    """Where packed rows begin, how long the longest is, and how they attend."""

    bounds: Tensor
    longest: int
    dropout: float = 0.0
    scale: float = 1.0
    causal: bool = False


def _attend_flash(q_THW: Tensor, k_THW: Tensor, v_THW: Tensor, rows: Rows) -> Tensor:
    """Attend by flash attention for ragged rows, as PyTorch's nested tensors and ``varlen_attn`` call it."""
    begin, longest, dropout, scale, causal = rows
    attend: Any = torch.ops.aten._flash_attention_forward
    z_THW: Tensor
    z_THW, *_ = attend(q_THW, k_THW, v_THW, begin, begin, longest, longest, dropout, causal, False, scale=scale)
    return z_THW


def _attend_nested(q_THW: Tensor, k_THW: Tensor, v_THW: Tensor, rows: Rows) -> Tensor:
    """Attend by PyTorch's kernels for jagged nested tensors; told how long rows are, it need not ask the GPU."""
    offsets = rows.bounds.long()
    q, k, v = (
        torch.nested.nested_tensor_from_jagged(x, offsets, min_seqlen=1, max_seqlen=rows.longest).transpose(1, 2)
        for x in (q_THW, k_THW, v_THW)
    )
    z = F.scaled_dot_product_attention(q, k, v, dropout_p=rows.dropout, is_causal=rows.causal, scale=rows.scale)
    values: Tensor = z.transpose(1, 2).values()
    return values


def _attend_grouped(q_THW: Tensor, k_THW: Tensor, v_THW: Tensor, rows: Rows) -> Tensor:
    """Attend by products over rows of equal length, or of like length where weights are dropped."""
    q_THW, heads = q_THW * rows.scale, q_THW.shape[1]
    blocks = _blocks(tuple(rows.bounds.tolist()), joined=rows.dropout > 0)
    if rows.dropout:  # PyTorch's would hold the weights in memory too, and draw a mask for every length
        mask_M, inverse = _draw_mask(blocks, heads, rows.dropout, q_THW.dtype)
        apply: Any = _DroppedAttention.apply
        z_THW: Tensor = apply(q_THW, k_THW, v_THW * inverse, mask_M, blocks, rows.causal)
        return z_THW
    # One split and one concatenation: slices would each have a gradient of the whole tensor's size.
    parts = (torch.split(x, [block.tokens for block in blocks]) for x in (q_THW, k_THW, v_THW))
    attended = []
    for block, q, k, v in zip(blocks, *parts, strict=True):
        q, k, v = (x.reshape(block.rows, block.length, heads, -1).transpose(1, 2) for x in (q, k, v))
        z = F.scaled_dot_product_attention(q, k, v, scale=1.0, is_causal=rows.causal)
        attended.append(z.transpose(1, 2).reshape(block.tokens, heads, -1))
    return torch.cat(attended)


class _DroppedAttention(torch.autograd.Function):
    """``(softmax(q k^T) * mask) v`` within each row, for packed ``[T, heads, width]``.

    The number of operations counts, and written out the gradient of slices goes where it belongs, and weights keep the
    dtype of their products (benchmarks/LOG.md). Padding is neither attended to, by a weight of 0, nor asked for, by the
    mask.
    """

    @staticmethod
    def forward(
        ctx: Any, q_THW: Tensor, k_THW: Tensor, v_THW: Tensor, mask_M: Tensor, blocks: Any, causal: bool
    ) -> Tensor:
        z_THW = q_THW.new_empty(*q_THW.shape[:2], v_THW.shape[2])
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
                if causal:
                    s.masked_fill_(torch.ones(s.shape[1:], dtype=torch.bool).triu(1), -torch.inf)
                p = s.softmax(-1)
                block.tokens_first(torch.bmm(p * mask.view_as(p), v), out=z)
                kept += (q, k, v, p)
        ctx.save_for_backward(mask_M, *kept)
        ctx.blocks, ctx.shapes = blocks, [x.shape for x in (q_THW, k_THW, v_THW)]
        return z_THW

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dz_THW: Tensor) -> tuple[Tensor, Tensor, Tensor, None, None, None]:
        mask_M, *kept = ctx.saved_tensors
        grads = [torch.empty(shape, dtype=dz_THW.dtype) for shape in ctx.shapes]
        for i, (block, mask, dz, dq, dk, dv) in enumerate(_by_block(ctx.blocks, mask_M, dz_THW, *grads)):
            q, k, v, p = kept[4 * i : 4 * i + 4]
            dz, mask = block.heads_first(dz, v.dtype), mask.view_as(p)
            dp = torch.bmm(dz, v.transpose(1, 2)).mul_(mask)
            ds = torch.ops.aten._softmax_backward_data(dp, p, -1, p.dtype)
            block.tokens_first(torch.bmm((p * mask).transpose(1, 2), dz), out=dv)
            block.tokens_first(torch.bmm(ds, k), out=dq)
            block.tokens_first(torch.bmm(ds.transpose(1, 2), q), out=dk)
        return grads[0], grads[1], grads[2], None, None, None


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


def _mask(*arguments: Any, **options: Any) -> Tensor | None:
    """Make the mask of padded rows; packed ones come without."""
    return None if options.get("attention_mask") is None else sdpa_mask(*arguments, **options)


AttentionInterface.register(_ATTENTION, _attend)
AttentionMaskInterface.register(_ATTENTION, _mask)
