"""LoRA: only adapters are trained, kept and published; what is exported needs no peft."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from families import make_family
from sentence_transformers import SentenceTransformer
from sentence_transformers.base.modules import Dense
from tiny import make_sentences

from hncse_ray.config import EncoderSettings
from hncse_ray.encoder import SentenceEncoder, freeze_unused, load_encoder
from hncse_ray.errors import ModelError

TEXTS = make_sentences(6)


def with_lora(folder: Path, **settings: object) -> SentenceEncoder:
    lora = {"r": 2, "alpha": 8} | settings
    return load_encoder(folder, EncoderSettings(model=str(folder), precision="fp32", head="tanh", lora=lora))


@pytest.fixture(params=["bert", "qwen3", "gpt2"])
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    return make_family(request.param, tmp_path / "base")


def train(encoder: SentenceEncoder) -> None:
    freeze_unused(encoder)
    optimizer = torch.optim.SGD([p for p in encoder.parameters() if p.requires_grad], lr=0.1)
    encoder.train()
    for _ in range(3):
        optimizer.zero_grad()
        (encoder(encoder.features(encoder.tokenize(TEXTS))) ** 3).sum().backward()
        optimizer.step()


def test_new_adapters_change_nothing_and_training_changes_them_alone(folder: Path) -> None:
    plain, encoder = load_encoder(folder), with_lora(folder)
    np.testing.assert_allclose(encoder.encode(TEXTS), plain.encode(TEXTS), atol=1e-6)
    frozen = {
        n: p.clone() for n, p in encoder.named_parameters() if "lora_" not in n and not n.startswith("model.head")
    }
    before = encoder.weights()
    assert all("lora_" in name or name.startswith("model.head.") for name in before)
    train(encoder)
    assert any(not torch.equal(before[name], value) for name, value in encoder.weights().items())
    parameters = dict(encoder.named_parameters())
    assert all(torch.equal(parameters[name], value) for name, value in frozen.items())


def test_weights_travel_to_another_encoder_and_the_export_has_them_merged(folder: Path, tmp_path: Path) -> None:
    encoder, shard = with_lora(folder), with_lora(folder)
    train(encoder)
    vectors = encoder.encode(TEXTS)
    assert np.abs(vectors - shard.encode(TEXTS)).max() > 1e-3
    shard.load_weights(encoder.weights())
    np.testing.assert_array_equal(shard.encode(TEXTS), vectors)

    out = tmp_path / "out"
    out.mkdir()
    encoder.save(out, readme="")
    assert not list(out.rglob("adapter*"))
    np.testing.assert_allclose(SentenceTransformer(str(out), device="cpu").encode(TEXTS), vectors, atol=1e-5)
    np.testing.assert_array_equal(encoder.encode(TEXTS), vectors)  # still with adapters: training may go on


def test_layers_that_do_not_exist_are_refused_with_those_that_do(folder: Path) -> None:
    with pytest.raises(ModelError, match=r"Target modules \{'nonsense'\}[^.]*\. Its linear layers are"):
        with_lora(folder, target_modules=["nonsense"])


def test_weights_of_another_kind_are_refused(folder: Path) -> None:
    with pytest.raises(ModelError, match="another model"):
        load_encoder(folder).load_weights(with_lora(folder).weights())


def test_recomputed_activations_give_the_same_gradient(folder: Path) -> None:
    gradients = []
    for recompute in (False, True):
        settings = EncoderSettings(model=str(folder), precision="fp32", gradient_checkpointing=recompute)
        encoder = load_encoder(folder, settings).train()
        torch.manual_seed(3)
        (encoder(encoder.features(encoder.tokenize(TEXTS))) ** 3).sum().backward()
        gradients.append([p.grad for p in encoder.parameters() if p.grad is not None])
    assert len(gradients[0]) == len(gradients[1]) > 10
    for first, second in zip(*gradients, strict=True):
        torch.testing.assert_close(first, second)


def test_a_dense_stage_of_the_models_own_stands_still(tmp_path: Path) -> None:
    theirs = SentenceTransformer(str(make_family("bert", tmp_path / "base")), device="cpu")
    theirs.append(Dense(theirs.get_embedding_dimension(), 8))
    theirs.save(str(tmp_path / "dense"))
    encoder, shard = with_lora(tmp_path / "dense"), with_lora(tmp_path / "dense")
    train(encoder)
    kept = encoder.weights()
    assert {name for name, parameter in encoder.named_parameters() if parameter.requires_grad} <= kept.keys()
    assert any(name.startswith("model.head.") for name in kept)
    shard.load_weights(kept)
    np.testing.assert_array_equal(shard.encode(TEXTS), encoder.encode(TEXTS))
