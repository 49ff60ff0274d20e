"""Packed rows give what padded ones do, in every architecture that allows it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny import make_sentences
from transformers import AutoConfig, AutoModel

from hncse_ray.config import EncoderSettings
from hncse_ray.encoder import SentenceEncoder, load_encoder, packing
from hncse_ray.encoder.packing import Block, Packing, _block, _draw_mask, _DroppedAttention

SENTENCES = [*make_sentences(12, seed=3), "one", "word " * 40]
SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
POOLINGS = ["cls", "mean", "first_last_mean", "last_two_mean"]


def tiny(model: Path, pooling: str = "mean") -> SentenceEncoder:
    return load_encoder(model, EncoderSettings.model_validate({"model": str(model), "pooling": pooling})).eval()


def encoder_of(family: str, like: SentenceEncoder, pooling: str = "mean", **changed: Any) -> SentenceEncoder:
    small = {"dim": 32, "n_layers": 2, "n_heads": 4, "hidden_dim": 48} if family == "distilbert" else SMALL
    torch.manual_seed(0)
    config = AutoConfig.for_model(
        family, vocab_size=len(like.tokenizer), pad_token_id=like.tokenizer.pad_token_id, **small, **changed
    )
    backbone = AutoModel.from_config(config, attn_implementation="sdpa")
    return SentenceEncoder(backbone, like.tokenizer, pooling=pooling)


def both(encoder: SentenceEncoder) -> tuple[torch.Tensor, torch.Tensor]:
    """Vectors of padded and of packed rows, and the gradients of all weights behind them."""
    rows = encoder.tokenize(SENTENCES)
    assert len({len(row) for row in rows}) > 3
    results = []
    for tensors in (encoder.batch_tensors, encoder.packed_tensors):
        encoder.zero_grad()
        vectors = encoder(*tensors(rows))
        (vectors * torch.linspace(-1, 1, vectors.numel()).view_as(vectors)).sum().backward()
        gradients = [p.grad.flatten() for p in encoder.parameters() if p.grad is not None]
        results.append(torch.cat([vectors.detach().flatten(), *gradients]))
    return results[0], results[1]


@pytest.mark.parametrize("family", ["bert", "camembert", "distilbert", "electra", "roberta", "xlm-roberta"])
def test_vectors_and_gradients_are_those_of_padded_rows(tiny_model: Path, family: str) -> None:
    encoder = encoder_of(family, tiny(tiny_model)).eval()
    assert encoder.packs
    padded, packed = both(encoder)
    torch.testing.assert_close(packed, padded, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("pooling", POOLINGS)
def test_every_pooling(tiny_model: Path, pooling: str) -> None:
    encoder = tiny(tiny_model, pooling)
    padded, packed = both(encoder)
    torch.testing.assert_close(packed, padded, atol=1e-5, rtol=1e-4)


def test_no_row_sees_another(tiny_model: Path) -> None:
    encoder = tiny(tiny_model)
    rows = encoder.tokenize(SENTENCES)
    with torch.no_grad():
        before = encoder(*encoder.packed_tensors(rows))
        changed = [np.flip(rows[0]).copy(), *rows[1:]]
        after = encoder(*encoder.packed_tensors(changed))
    assert not torch.allclose(before[0], after[0], atol=1e-3)
    torch.testing.assert_close(after[1:], before[1:], atol=1e-6, rtol=0)


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


def dropped_attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask_M: torch.Tensor, blocks: Any) -> Any:
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
                p = torch.softmax(q[own, head] @ k[own, head].T, -1)
                heads.append((p * mask[row, head, :length, :length]) @ v[own, head])
            parts.append(torch.stack(heads, 1))
            at += length
    return torch.cat(parts)


@pytest.mark.parametrize("blocks", [EVEN, JOINED], ids=["even", "joined"])
def test_attention_with_dropout_is_its_formula_and_its_gradient(blocks: tuple[Block, ...]) -> None:
    (*qkv, _), mask = drawn(blocks, torch.float64)
    qkv = [x.requires_grad_() for x in qkv]

    def attend(*qkv: torch.Tensor) -> torch.Tensor:
        return _DroppedAttention.apply(*qkv, mask, blocks)

    assert 0 < mask.mean() < 1
    torch.testing.assert_close(attend(*qkv), dropped_attention(*qkv, mask, blocks))
    assert torch.autograd.gradcheck(attend, qkv)


@pytest.mark.parametrize("fp32_weights", [0, 30, 10**9], ids=["none in fp32", "some", "all"])
@pytest.mark.parametrize("blocks", [EVEN, JOINED], ids=["even", "joined"])
def test_attention_with_dropout_in_bf16_is_near_that_in_fp64(
    blocks: tuple[Block, ...], fp32_weights: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes = [HEADS * block.rows * block.length**2 for block in blocks]
    assert min(sizes) <= 30 < max(sizes)
    monkeypatch.setattr(packing, "_FP32_WEIGHTS", fp32_weights)
    found = []
    for dtype in (torch.float64, torch.bfloat16):
        (*qkv, dz), mask = drawn(blocks, dtype)
        qkv = [x.requires_grad_() for x in qkv]
        z = _DroppedAttention.apply(*qkv, mask, blocks)
        found.append([z, *torch.autograd.grad(z, qkv, dz)])
    for exact, rounded in zip(*found, strict=True):
        assert rounded.dtype == torch.bfloat16
        torch.testing.assert_close(rounded.double(), exact, atol=0.05, rtol=0.05)


def test_few_rows_of_like_length_are_joined_and_many_are_left_alone() -> None:
    runs = ((1, 4), (15, 5), (1, 6), (1, 7), (16, 8), (2, 9), (1, 12), (1, 13))
    positions = torch.arange(sum(rows * length for rows, length in runs))[None]
    blocks = Packing(positions, runs, torch.arange(38)).blocks
    assert [(block.rows, block.length) for block in blocks] == [(17, 6), (1, 7), (16, 8), (3, 12), (1, 13)]
    assert [block.is_token_NL is not None for block in blocks] == [True, False, False, True, False]
    assert sum(block.tokens for block in blocks) == positions.numel()
    x = torch.randn(blocks[0].tokens, HEADS, WIDTH)
    back = torch.empty_like(x)
    blocks[0].tokens_first(blocks[0].heads_first(x, torch.float64), out=back)
    assert torch.equal(back, x)


def test_the_mean_over_dropout_is_what_comes_without(tiny_model: Path) -> None:
    encoder = tiny(tiny_model)
    rows = encoder.tokenize(SENTENCES)
    with torch.no_grad():
        still = encoder(*encoder.packed_tensors(rows))
        encoder.train()
        dropped = torch.stack([encoder(*encoder.packed_tensors(rows)) for _ in range(200)])
    assert dropped.std(0).max() > 0.01
    assert torch.nn.functional.cosine_similarity(dropped.mean(0), still).min() > 0.98


def test_an_architecture_with_other_attention_is_not_packed(tiny_model: Path) -> None:
    small = {**SMALL, "cls_token_id": 2, "sep_token_id": 3, "bos_token_id": 2, "eos_token_id": 3}
    like = tiny(tiny_model)
    torch.manual_seed(0)
    config = AutoConfig.for_model("modernbert", vocab_size=len(like.tokenizer), pad_token_id=0, **small)
    encoder = SentenceEncoder(AutoModel.from_config(config), like.tokenizer, pooling="mean")
    assert not encoder.packs


def test_the_saved_configuration_does_not_know_of_it(tiny_model: Path, tmp_path: Path) -> None:
    tiny(tiny_model).backbone.save_pretrained(tmp_path)
    assert "packed" not in (tmp_path / "config.json").read_text()
