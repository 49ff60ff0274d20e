"""Merged weights and whitening: the maths, and the stages that sentence-transformers loads."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.base.modules import Normalize
from tiny import make_sentences

from hncse_ray.config import EncoderSettings, LoraSettings
from hncse_ray.encoder import SentenceEncoder, load_encoder
from hncse_ray.errors import DataError
from hncse_ray.evaluation import unit_rows
from hncse_ray.training.merging import merged
from hncse_ray.training.whitening import Spread, add_whitening

TEXTS = make_sentences(12, seed=5)


def load(model: Path, **changes: Any) -> SentenceEncoder:
    return load_encoder(model, EncoderSettings(model=str(model), **{"pooling": "mean", "precision": "fp32"} | changes))


def stirred(encoder: SentenceEncoder, *, seed: int = 0) -> dict[str, torch.Tensor]:
    """The weights of the encoder after something like training."""
    generator = torch.Generator().manual_seed(seed)
    return {
        name: value + 0.05 * torch.randn(value.shape, generator=generator) if value.is_floating_point() else value
        for name, value in encoder.weights().items()
    }


# ------------------------------------------------------------------------------------------------ whitening


@pytest.fixture(scope="module")
def vectors() -> np.ndarray:
    rng = np.random.default_rng(0)
    return rng.normal(size=(500, 8)) * np.array([9, 5, 3, 2, 1, 0.5, 0.2, 0.1]) @ rng.normal(size=(8, 8)) + 4


@pytest.mark.parametrize("power", [0.0, 0.125, 0.25, 0.5])
def test_variances_are_levelled_by_the_power(vectors: np.ndarray, power: float) -> None:
    spread = Spread.of(vectors)
    whitened = spread.whitened(vectors, power)
    np.testing.assert_allclose(whitened.mean(axis=0), 0, atol=1e-9)
    found = np.linalg.eigvalsh(np.cov(whitened.T))
    wanted = np.sort((spread.variances_D / spread.variances_D.max()) ** (1 - 2 * power))
    np.testing.assert_allclose(np.sort(found / found.max()), wanted, rtol=1e-6)


def test_cosines_are_those_of_the_usual_form(vectors: np.ndarray) -> None:
    """The principal components scaled, without the turn back: what the literature writes."""
    spread = Spread.of(vectors)
    usual = (vectors - spread.mean_D) @ (spread.directions_DD * spread.variances_D**-0.25)
    ours = spread.whitened(vectors, 0.25)
    np.testing.assert_allclose(unit_rows(ours) @ unit_rows(ours).T, unit_rows(usual) @ unit_rows(usual).T, atol=1e-9)


def test_directions_that_a_corpus_does_not_have_are_not_blown_up() -> None:
    few = np.random.default_rng(0).normal(size=(5, 32))  # four directions of 32
    assert np.abs(Spread.of(few).matrix(0.25)).max() <= 1e-6**-0.25 * (1 + 1e-9)


def test_equal_vectors_are_refused() -> None:
    with pytest.raises(DataError, match="same vector.*export.whiten=none"):
        Spread.of(np.ones((10, 4)))


@pytest.mark.parametrize("kind", ["plain", "head in training", "head", "cut", "normalised"])
def test_the_stage_loads_in_sentence_transformers(tiny_model: Path, tmp_path: Path, kind: str) -> None:
    heads: dict[str, Any] = {
        "head": {"head": "tanh", "head_in_training_only": False},
        "head in training": {"head": "tanh"},
    }
    encoder = load(tiny_model, **heads.get(kind, {}))
    if kind == "cut":
        encoder.model.truncate_dim = 16
    if kind == "normalised":
        encoder.model.append(Normalize())
    plain = encoder.encode(TEXTS)
    spread = Spread.of(encoder.encode(make_sentences(200)))
    add_whitening(encoder.model, spread, 0.25)
    found = encoder.encode(TEXTS)
    np.testing.assert_allclose(found, unit_rows(spread.whitened(plain, 0.25)), atol=2e-5)
    assert found.shape == plain.shape and np.abs(found - unit_rows(plain)).max() > 0.05
    encoder.save(tmp_path, readme="# a model\n")
    theirs = SentenceTransformer(str(tmp_path), device="cpu")
    np.testing.assert_allclose(theirs.encode(TEXTS), found, atol=1e-5)
    np.testing.assert_allclose(load_encoder(tmp_path).encode(TEXTS), found, atol=1e-5)
    assert [type(stage).__name__ for stage in theirs][-2:] == ["Dense", "Normalize"]


# ------------------------------------------------------------------------------------------------ merging


def test_weights_are_interpolated(tiny_model: Path) -> None:
    encoder = load(tiny_model)
    base, trained = encoder.weights(), stirred(encoder)
    assert merged(base, trained, 1.0) is trained and merged(base, trained, 0.0) is base
    found = merged(base, trained, 0.75)
    assert found.keys() == base.keys()
    for name, value in found.items():
        torch.testing.assert_close(value, 0.25 * base[name] + 0.75 * trained[name])


@pytest.mark.parametrize("modules", [(), ("query", "word_embeddings")])
def test_of_adapters_their_difference_is_scaled(tiny_model: Path, modules: tuple[str, ...]) -> None:
    """Adapters merged into the weights, then interpolated, are the adapters interpolated, then merged."""
    pytest.importorskip("peft", reason="peft is not installed (the extra lora)")
    lora = LoraSettings(r=4, target_modules=modules)
    encoder = load(tiny_model, lora=lora)
    base, trained = encoder.weights(), stirred(encoder)

    def folded(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        other = load(tiny_model, lora=lora)
        other.load_weights(weights)
        return dict(other.model[0].model.merge_and_unload().state_dict())

    untouched, whole, part = folded(base), folded(trained), folded(merged(base, trained, 0.25))
    assert any((whole[name] - value).abs().max() > 1e-3 for name, value in untouched.items())
    for name, value in part.items():
        torch.testing.assert_close(value, untouched[name].lerp(whole[name], 0.25), atol=1e-6, rtol=1e-5)
