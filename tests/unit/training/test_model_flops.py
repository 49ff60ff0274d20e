"""Model FLOPs utilisation: counted as by hand, of all that a step embeds."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from hncse_ray.config import EncoderSettings
from hncse_ray.encoder import SentenceEncoder, load_encoder
from hncse_ray.training.model_flops import ModelFlops, peak_flops, peak_of
from hncse_ray.training.step import LocalBatch, StepNegatives, lay_out

LAYERS, WIDTH = 2, 32


def by_hand(encoder: SentenceEncoder) -> tuple[float, float]:
    """FLOPs of a forward: so many a token, so many a pair of tokens; two products of attention, six layers."""
    wide = encoder.backbone.config.intermediate_size
    return 2.0 * LAYERS * (4 * WIDTH**2 + 2 * WIDTH * wide), 4.0 * LAYERS * WIDTH


@pytest.mark.parametrize("head", ["none", "tanh"])
def test_forward_and_backward_of_the_layers_are_counted(tiny_model: Path, head: str) -> None:
    encoder = load_encoder(tiny_model, EncoderSettings(model=str(tiny_model), head=head))
    token, pair = by_hand(encoder)
    found = ModelFlops.count(encoder.train())
    assert (found.token, found.pair) == (pytest.approx(3 * token), pytest.approx(3 * pair)) and encoder.training


def test_weights_that_stand_still_need_no_gradient(tiny_model: Path) -> None:
    lora = {"r": 1, "target_modules": ["query"]}
    encoder = load_encoder(tiny_model, EncoderSettings(model=str(tiny_model), lora=lora))
    token, pair = by_hand(encoder)
    found = ModelFlops.count(encoder)
    adapters = 2.0 * LAYERS * 2 * WIDTH
    assert (found.token, found.pair) == (pytest.approx(2 * (token + adapters)), pytest.approx(2 * pair))


def test_all_views_and_fresh_negatives_of_all_chunks_count(tiny_model: Path) -> None:
    encoder = load_encoder(tiny_model)
    rows = [np.full(length, 7, dtype=np.int32) for length in (3, 5, 8)]
    fresh = [[np.full(4, 7, dtype=np.int32), None], [None, None], [None, np.full(6, 7, dtype=np.int32)]]
    negatives = StepNegatives(np.array([[token is not None for token in row] for row in fresh]), None, fresh)
    batch = LocalBatch(0, rows, (3,), negatives)
    lengths = [3, 5, 8, 3, 5, 8, 4, 6]
    flops = ModelFlops(token=10.0, pair=0.5)
    wanted = 10.0 * sum(lengths) + 0.5 * sum(length**2 for length in lengths)
    for chunk_size in (None, 2):
        laid_out = lay_out(batch, encoder, views=2, chunk_size=chunk_size)
        assert flops.of([laid_out]) == wanted and flops.of([laid_out, laid_out]) == 2 * wanted


def test_a_peak_is_that_of_the_gpu_named() -> None:
    names = {
        "NVIDIA A100-SXM4-40GB": 312e12,
        "NVIDIA A10": 125e12,
        "NVIDIA H100 80GB HBM3": 989e12,
        "NVIDIA H100 PCIe": 756e12,
        "NVIDIA H200": 989e12,
        "NVIDIA L4": 121e12,
        "NVIDIA L40S": 362e12,
        "NVIDIA L40": None,
        "NVIDIA A10G": None,
    }
    assert {name: peak_of(name) for name in names} == names


def test_a_cpu_has_no_peak(tiny_model: Path) -> None:
    assert peak_flops(load_encoder(tiny_model)) is None
