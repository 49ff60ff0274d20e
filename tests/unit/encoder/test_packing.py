"""Packed rows give what padded ones do, in every architecture that allows it."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from families import DECODERS, make_family
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import Pooling
from tiny import make_sentences

from hncse_ray.config import EncoderSettings
from hncse_ray.encoder import SentenceEncoder, attention, load_encoder
from hncse_ray.encoder.attention import (
    Block,
    Rows,
    _attend_flash,
    _attend_grouped,
    _attend_nested,
    _block,
    _blocks,
    _draw_mask,
    _DroppedAttention,
)

SENTENCES = [*make_sentences(12, seed=3), "one", "one river", "river " * 40]
POOLINGS = [
    "cls", "mean", "max", "mean_sqrt_len_tokens", "weightedmean", "lasttoken", "first_last_mean", "last_two_mean",
]  # fmt: skip


def tiny(model: Path, pooling: str = "mean", **changes: Any) -> SentenceEncoder:
    tree = {"model": str(model), "pooling": pooling, "precision": "fp32"} | changes
    return load_encoder(model, EncoderSettings.model_validate(tree)).eval()


def both(encoder: SentenceEncoder, rows: list[np.ndarray]) -> tuple[torch.Tensor, torch.Tensor]:
    """Vectors of padded and of packed rows, and the gradients of all weights behind them."""
    assert len({len(row) for row in rows}) > 3
    results = []
    for pack in (False, True):
        encoder.zero_grad()
        vectors = encoder(encoder.features(rows, pack=pack))
        (vectors * torch.linspace(-1, 1, vectors.numel()).view_as(vectors)).sum().backward()
        gradients = [p.grad.flatten() for p in encoder.parameters() if p.grad is not None]
        results.append(torch.cat([vectors.detach().flatten(), *gradients]))
    return results[0], results[1]


def test_rows_lie_behind_each_other_the_shortest_first(tiny_model: Path) -> None:
    encoder = tiny(tiny_model)
    rows = encoder.tokenize(["one river today", "one", "one river"])
    features = encoder.features(rows)
    assert features["cu_seq_lens_q"].tolist() == features["cu_seq_lens_k"].tolist() == [0, 3, 7, 12]
    assert features["max_length_q"] == features["max_length_k"] == 5
    assert features["input_ids"].tolist() == [[*rows[1], *rows[2], *rows[0]]]
    assert features["position_ids"].tolist() == [[*range(3), *range(4), *range(5)]]
    assert features["order"].tolist() == [2, 0, 1]


@pytest.mark.parametrize(
    "family",
    ["roberta-pad0", "roberta-pad3", "distilbert", "electra", "modernbert", "nomic_bert", "llama", "qwen3", "gpt2"],
)
def test_vectors_and_gradients_are_those_of_padded_rows(tmp_path: Path, family: str) -> None:
    encoder = tiny(make_family(family, tmp_path), "lasttoken" if family in DECODERS else "mean")
    assert encoder.packs
    rows = [row for row in encoder.tokenize(SENTENCES) if len(row) <= encoder._reach]
    padded, packed = both(encoder, rows)
    torch.testing.assert_close(packed, padded, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("pooling", POOLINGS)
def test_every_pooling(tiny_model: Path, pooling: str) -> None:
    encoder = tiny(tiny_model, pooling)
    padded, packed = both(encoder, encoder.tokenize(SENTENCES))
    torch.testing.assert_close(packed, padded, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(
    ("family", "cut"),
    [("bert", True), ("roberta-pad1", True), ("electra", True), ("distilbert", False), ("modernbert", False)],
)
def test_with_cls_pooling_the_last_layer_is_for_first_tokens_alone(tmp_path: Path, family: str, cut: bool) -> None:
    encoder = tiny(make_family(family, tmp_path), "cls", gradient_checkpointing=True)
    rows = [row for row in encoder.tokenize(SENTENCES) if len(row) <= encoder._reach]
    features = encoder.features(rows)
    states = encoder.model[0](dict(features))["token_embeddings"]
    assert states.shape[1] == (len(rows) if cut else features["input_ids"].shape[1])
    padded, packed = both(encoder, rows)
    torch.testing.assert_close(packed, padded, atol=1e-5, rtol=1e-4)


def test_two_batches_may_pass_before_their_gradient_is_asked_for(tiny_model: Path) -> None:
    gradients = []
    for recompute in (False, True):  # each batch begins its rows elsewhere
        encoder = tiny(tiny_model, "cls", gradient_checkpointing=recompute, dropout=0.0).train()
        rows = encoder.tokenize(SENTENCES)
        first, second = (encoder(encoder.features(part)) for part in (rows[:6], rows[6:12]))
        (first * second).sum().backward()
        gradients.append(torch.cat([p.grad.flatten() for p in encoder.parameters() if p.grad is not None]))
    torch.testing.assert_close(*gradients)


def test_two_threads_may_encode_at_once(tiny_model: Path) -> None:
    encoder = tiny(tiny_model, "cls")
    rows = encoder.tokenize(SENTENCES)
    alone = [encoder.encode_rows(part) for part in (rows[:6], rows[6:])]
    meanwhile: list[np.ndarray] = []

    def encode_others(*_: Any) -> None:  # in the middle of the last layer
        hook.remove()
        with ThreadPoolExecutor(1) as thread:
            meanwhile.append(thread.submit(encoder.encode_rows, rows[6:]).result())

    hook = encoder.backbone.encoder.layer[-1].attention.self.register_forward_pre_hook(encode_others)
    for found, wanted in zip((encoder.encode_rows(rows[:6]), *meanwhile), alone, strict=True):
        np.testing.assert_array_equal(found, wanted)


def test_a_prompt_that_is_not_pooled_leaves_the_last_layer_as_it_is(tiny_model: Path, tmp_path: Path) -> None:
    theirs = SentenceTransformer(str(tiny_model), device="cpu", prompts={"query": "the old river: "})
    theirs[1] = Pooling(32, "cls", include_prompt=False)
    theirs.save(str(tmp_path))
    np.testing.assert_allclose(
        load_encoder(tmp_path).encode(SENTENCES, side="query"), theirs.encode_query(SENTENCES), atol=1e-5
    )


@pytest.mark.parametrize("family", ["bert", "llama"])
def test_no_row_sees_another(tmp_path: Path, family: str) -> None:
    encoder = tiny(make_family(family, tmp_path), "lasttoken" if family in DECODERS else "mean")
    rows = encoder.tokenize(SENTENCES)
    changed = [np.concatenate([rows[0][:1], rows[0][-2:0:-1], rows[0][-1:]]), *rows[1:]]
    with torch.no_grad():
        before, after = encoder(encoder.features(rows)), encoder(encoder.features(changed))
    assert not torch.allclose(before[0], after[0], atol=1e-3)
    torch.testing.assert_close(after[1:], before[1:], atol=1e-6, rtol=0)


@pytest.mark.parametrize("family", ["gemma3", "mistral", "modernbert"])
def test_rows_longer_than_attention_reaches_are_padded(tmp_path: Path, family: str) -> None:
    encoder = tiny(make_family(family, tmp_path), "lasttoken" if family in DECODERS else "mean")
    short, long = encoder.tokenize(["one river", "river " * 35])
    assert len(short) < encoder._reach < len(long)
    assert "cu_seq_lens_q" in encoder.features([short])
    assert "cu_seq_lens_q" not in encoder.features([short, long])
    with torch.no_grad():
        together, alone = encoder(encoder.features([short, long])), encoder(encoder.features([long]))
        unpacked = encoder(encoder.features([short], pack=False))
    torch.testing.assert_close(together, torch.cat([unpacked, alone]), atol=1e-5, rtol=0)


HEADS, WIDTH = 2, 3
EVEN = tuple(Block(rows, length, rows * length) for rows, length in ((2, 3), (1, 4), (3, 2)))
JOINED = (_block([(1, 2), (2, 3), (1, 4)]), Block(2, 2, 4))


def drawn(blocks: tuple[Block, ...], dtype: torch.dtype) -> tuple[list[torch.Tensor], torch.Tensor]:
    """Queries, keys, values and a gradient of the result; and a mask as it is drawn."""
    generator = torch.Generator().manual_seed(0)
    shape = sum(block.tokens for block in blocks), HEADS, WIDTH
    torch.manual_seed(0)
    mask_M, _ = _draw_mask(blocks, HEADS, 0.3, dtype)
    return [torch.randn(shape, generator=generator).bfloat16().to(dtype) for _ in range(4)], mask_M


def dropped_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask_M: torch.Tensor, blocks: Any, causal: bool
) -> torch.Tensor:
    """What `_DroppedAttention` computes, a row and a head at a time."""
    parts, at, taken = [], 0, 0
    for block in blocks:
        size = block.rows * HEADS * block.length**2
        mask = mask_M[taken : taken + size].view(block.rows, HEADS, block.length, block.length)
        taken += size
        for row in range(block.rows):
            length = block.length if block.is_token_NL is None else int(block.is_token_NL[row].sum())
            own, heads = slice(at, at + length), []
            for head in range(HEADS):
                s = q[own, head] @ k[own, head].T
                p = torch.softmax(s.masked_fill(torch.ones_like(s).triu(1) > 0, -torch.inf) if causal else s, -1)
                heads.append((p * mask[row, head, :length, :length]) @ v[own, head])
            parts.append(torch.stack(heads, 1))
            at += length
    return torch.cat(parts)


@pytest.mark.parametrize("blocks", [EVEN, JOINED], ids=["even", "joined"])
@pytest.mark.parametrize("causal", [False, True])
def test_attention_with_dropout_is_its_formula_and_its_gradient(blocks: tuple[Block, ...], causal: bool) -> None:
    (*qkv, _), mask = drawn(blocks, torch.float64)
    qkv = [x.requires_grad_() for x in qkv]

    def attend(*qkv: torch.Tensor) -> torch.Tensor:
        return _DroppedAttention.apply(*qkv, mask, blocks, causal)

    assert 0 < mask.mean() < 1
    torch.testing.assert_close(attend(*qkv), dropped_attention(*qkv, mask, blocks, causal))
    assert torch.autograd.gradcheck(attend, qkv)


@pytest.mark.parametrize("fp32_weights", [0, 30, 10**9], ids=["none in fp32", "some", "all"])
@pytest.mark.parametrize("blocks", [EVEN, JOINED], ids=["even", "joined"])
def test_attention_with_dropout_in_bf16_is_near_that_in_fp64(
    blocks: tuple[Block, ...], fp32_weights: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes = [HEADS * block.rows * block.length**2 for block in blocks]
    assert min(sizes) <= 30 < max(sizes)
    monkeypatch.setattr(attention, "_FP32_WEIGHTS", fp32_weights)
    found = []
    for dtype in (torch.float64, torch.bfloat16):
        (*qkv, dz), mask = drawn(blocks, dtype)
        qkv = [x.requires_grad_() for x in qkv]
        z = _DroppedAttention.apply(*qkv, mask, blocks, False)
        found.append([z, *torch.autograd.grad(z, qkv, dz)])
    for exact, rounded in zip(*found, strict=True):
        assert rounded.dtype == torch.bfloat16
        torch.testing.assert_close(rounded.double(), exact, atol=0.05, rtol=0.05)


def test_few_rows_of_like_length_are_joined_and_many_are_left_alone() -> None:
    runs = ((1, 4), (15, 5), (1, 6), (1, 7), (16, 8), (2, 9), (1, 12), (1, 13))
    lengths = [length for rows, length in runs for _ in range(rows)]
    bounds = tuple(np.cumsum([0, *lengths]).tolist())
    blocks, even = _blocks(bounds, joined=True), _blocks(bounds, joined=False)
    assert tuple((block.rows, block.length) for block in even) == runs
    assert [(block.rows, block.length) for block in blocks] == [(17, 6), (1, 7), (16, 8), (3, 12), (1, 13)]
    assert [block.is_token_NL is not None for block in blocks] == [True, False, False, True, False]
    assert sum(block.tokens for block in blocks) == sum(lengths)
    x = torch.randn(blocks[0].tokens, HEADS, WIDTH)
    back = torch.empty_like(x)
    blocks[0].tokens_first(blocks[0].heads_first(x, torch.float64), out=back)
    assert torch.equal(back, x)


def test_the_mean_over_dropout_is_what_comes_without(tiny_model: Path) -> None:
    encoder = tiny(tiny_model)
    features = encoder.features(encoder.tokenize(SENTENCES))
    with torch.no_grad():
        still = encoder(features)
        encoder.train()
        dropped = torch.stack([encoder(features) for _ in range(200)])
    assert dropped.std(0).max() > 0.01
    assert torch.nn.functional.cosine_similarity(dropped.mean(0), still).min() > 0.98


def test_attention_drops_as_many_weights_as_asked_for_and_scales_the_rest() -> None:
    bounds = torch.tensor([0, *np.cumsum([9] * 20 + [17] * 20)], dtype=torch.int32)
    zero, ones = torch.zeros(int(bounds[-1]), 4, 2), torch.ones(int(bounds[-1]), 4, 2)
    torch.manual_seed(0)
    z = _attend_grouped(zero, zero, ones, Rows(bounds, 17, dropout=0.3))  # all weights are equal
    weights = 4 * (20 * 9 * 9 + 20 * 17 * 17)
    assert z.mean().item() == pytest.approx(1, abs=5 * (0.3 / 0.7 / weights) ** 0.5 * 2)
    torch.testing.assert_close(z[:180] * 9 * 0.7, (z[:180] * 9 * 0.7).round(), atol=1e-3, rtol=0)


def test_the_seed_decides_which_weights_are_dropped(tiny_model: Path) -> None:
    encoder = tiny(tiny_model).train()
    features = encoder.features(encoder.tokenize(SENTENCES))
    with torch.no_grad():
        first, other, again = (torch.manual_seed(seed) and encoder(features) for seed in (1, 2, 1))
    assert torch.equal(first, again)
    assert (first - other).norm(dim=1).min() > 1e-3


def test_the_kernels_of_cpu_and_gpu_agree() -> None:  # PyTorch has the second on CPUs too, but not causal
    bounds = torch.tensor([0, 3, 6, 10, 11, 20], dtype=torch.int32)
    found = []
    for attend in (_attend_grouped, _attend_nested):
        torch.manual_seed(0)
        qkv = [torch.randn(20, HEADS, 8, requires_grad=True) for _ in range(3)]
        z = attend(*qkv, Rows(bounds, 9, scale=0.3))
        found.append([z, *torch.autograd.grad(z.square().sum(), qkv)])
    for grouped, nested in zip(*found, strict=True):
        torch.testing.assert_close(nested, grouped, atol=1e-5, rtol=1e-4)


def test_flash_attention_is_called_as_pytorch_declares_it() -> None:  # shapes and gradient's; no CPU has the kernel
    bounds = torch.tensor([0, 4, 10], dtype=torch.int32, device="meta")
    q, k, v = (torch.empty(10, HEADS, 16, dtype=torch.bfloat16, device="meta", requires_grad=True) for _ in range(3))
    z = _attend_flash(q, k, v, Rows(bounds, 6, dropout=0.1, scale=0.25, causal=True))
    assert z.shape == q.shape and z.dtype == q.dtype
    assert all(grad.shape == q.shape for grad in torch.autograd.grad(z.sum(), (q, k, v)))
