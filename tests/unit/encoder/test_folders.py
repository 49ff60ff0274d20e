"""Folders as their owners made them: stages, prompts and old file names give what sentence-transformers gives."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from families import make_family
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import Dense, LayerNorm, Normalize, Pooling, Transformer
from tiny import make_sentences, make_tokenizer
from torch import nn

from hncse_ray.config import EncoderSettings
from hncse_ray.encoder import load_encoder

WIDTH = 32
TEXTS = [*make_sentences(9, seed=5), "one", "River CITY garden", "river " * 100]
PROMPTS = {"query": "the river: ", "document": "a city or a garden: "}


def stages(model: Path, *pooling: str, after: tuple[nn.Module, ...] = (), **options: Any) -> SentenceTransformer:
    """A model of the tiny transformer, its pooling and what follows, with random weights."""
    modes = pooling if len(pooling) > 1 else pooling[0]
    include = options.pop("include_prompt", True)
    return SentenceTransformer(
        modules=[Transformer(str(model)), Pooling(WIDTH, modes, include_prompt=include), *after],
        device="cpu",
        **options,
    )


def dense(inputs: int, outputs: int, activation: nn.Module | None = None, seed: int = 0, bias: bool = True) -> Dense:
    torch.manual_seed(seed)
    return Dense(inputs, outputs, bias=bias, activation_function=activation or nn.Tanh())


FOLDERS: dict[str, Callable[[Path], SentenceTransformer]] = {
    "two Dense stages": lambda m: stages(m, "mean", after=(dense(32, 48), dense(48, 16, nn.Identity(), 1, bias=False))),
    "cls and mean": lambda m: stages(m, "cls", "mean"),
    "mean and max": lambda m: stages(m, "mean", "max"),
    "mean and max behind a Dense stage": lambda m: stages(m, "mean", "max", after=(dense(64, 24, nn.GELU()),)),
    "truncate_dim": lambda m: stages(m, "mean", truncate_dim=12),
    "a default prompt": lambda m: stages(m, "mean", prompts=PROMPTS, default_prompt_name="query"),
    "a default prompt that is not pooled": lambda m: stages(
        m, "mean", prompts=PROMPTS, default_prompt_name="query", include_prompt=False
    ),
    "Normalize before Dense": lambda m: stages(m, "mean", after=(Normalize(), dense(32, 32))),
    "Normalize": lambda m: stages(m, "cls", after=(Normalize(),)),
    "LayerNorm": lambda m: stages(m, "cls", after=(LayerNorm(32),)),
}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_family("bert", tmp_path_factory.mktemp("bert"))


def unit(vectors: np.ndarray) -> np.ndarray:
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def assert_the_same(folder: Path, tmp_path: Path, **how: Any) -> np.ndarray:
    """Compare the vectors of a folder, and of its export, with the library's."""
    theirs = SentenceTransformer(str(folder), device="cpu").encode(TEXTS)
    encoder = load_encoder(folder, **how)
    ours = encoder.encode(TEXTS)
    assert ours.shape == theirs.shape == (len(TEXTS), encoder.dimension)
    np.testing.assert_allclose(unit(ours), unit(theirs), atol=1e-5)
    export = tmp_path / "export"
    export.mkdir()
    encoder.save(export, readme="# A model\n")
    np.testing.assert_allclose(SentenceTransformer(str(export), device="cpu").encode(TEXTS), theirs, atol=1e-5)
    np.testing.assert_allclose(load_encoder(export).encode(TEXTS), theirs, atol=1e-5)
    return theirs


@pytest.mark.parametrize("name", FOLDERS)
def test_vectors_are_those_of_the_owners_library(model: Path, tmp_path: Path, name: str) -> None:
    FOLDERS[name](model).save(str(tmp_path / "model"))
    theirs = assert_the_same(tmp_path / "model", tmp_path)
    assert np.ptp(unit(theirs) @ unit(theirs).T) > 0.01  # else all vectors would be alike, and equal anything


@pytest.mark.parametrize("include_prompt", [True, False])
def test_the_prompt_matters_and_so_does_whether_it_is_pooled(model: Path, tmp_path: Path, include_prompt: bool) -> None:
    def vectors(folder: str, **options: Any) -> np.ndarray:
        stages(model, "mean", **options).save(str(tmp_path / folder))
        return load_encoder(tmp_path / folder).encode(TEXTS[:9])

    without = vectors("without", prompts=PROMPTS)
    with_prompt = vectors("with", prompts=PROMPTS, default_prompt_name="query", include_prompt=include_prompt)
    other = vectors("other", prompts=PROMPTS, default_prompt_name="query", include_prompt=not include_prompt)
    assert abs(without - with_prompt).max() > 1e-2
    assert abs(other - with_prompt).max() > 1e-2


@pytest.mark.parametrize("include_prompt", [True, False])
def test_each_side_gets_its_prompt(model: Path, tmp_path: Path, include_prompt: bool) -> None:
    stages(model, "mean", prompts=PROMPTS, include_prompt=include_prompt).save(str(tmp_path))
    theirs, encoder = SentenceTransformer(str(tmp_path), device="cpu"), load_encoder(tmp_path)
    np.testing.assert_allclose(encoder.encode(TEXTS, side="query"), theirs.encode_query(TEXTS), atol=1e-5)
    np.testing.assert_allclose(encoder.encode(TEXTS, side="document"), theirs.encode_document(TEXTS), atol=1e-5)
    np.testing.assert_allclose(encoder.encode(TEXTS), theirs.encode(TEXTS), atol=1e-5)
    rows = encoder.tokenize(TEXTS, side="query")
    np.testing.assert_allclose(encoder.encode_rows(rows, side="query"), theirs.encode_query(TEXTS), atol=1e-5)


def test_prompts_of_the_settings_override_the_folder_and_are_exported(model: Path, tmp_path: Path) -> None:
    stages(model, "mean", prompts=PROMPTS, default_prompt_name="query").save(str(tmp_path / "model"))
    settings = EncoderSettings.model_validate(
        {"model": str(tmp_path / "model"), "prompts": {"document": "stone "}, "default_prompt": "document"}
    )
    encoder = load_encoder(tmp_path / "model", settings)
    (tmp_path / "export").mkdir()
    encoder.save(tmp_path / "export", readme="# A model\n")
    theirs = SentenceTransformer(str(tmp_path / "export"), device="cpu")
    assert theirs.prompts == {"query": PROMPTS["query"], "document": "stone "}
    np.testing.assert_allclose(encoder.encode(TEXTS), theirs.encode(TEXTS, prompt="stone "), atol=1e-5)
    np.testing.assert_allclose(theirs.encode(TEXTS), encoder.encode(TEXTS), atol=1e-5)


class TestOldFiles:
    """What sentence-transformers wrote before its version 3."""

    @pytest.fixture
    def old(self, tmp_path: Path) -> Path:
        """A cased tokenizer, so that lower case matters; nothing but the files of then."""
        folder = make_family("bert", tmp_path / "old")
        make_tokenizer(lowercase=False).save_pretrained(folder)
        self.write(folder / "modules.json", [
            {"idx": 0, "name": "0", "path": "", "type": "sentence_transformers.models.Transformer"},
            {"idx": 1, "name": "1", "path": "1_Pooling", "type": "sentence_transformers.models.Pooling"},
        ])  # fmt: skip
        self.pooling(folder, "cls_token")
        return folder

    @staticmethod
    def write(path: Path, value: object) -> None:
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps(value))

    def pooling(self, folder: Path, *modes: str) -> None:
        known = ("cls_token", "mean_tokens", "max_tokens", "mean_sqrt_len_tokens")
        self.write(
            folder / "1_Pooling" / "config.json",
            {"word_embedding_dimension": WIDTH} | {f"pooling_mode_{mode}": mode in modes for mode in known},
        )

    @pytest.mark.parametrize("modes", [("cls_token",), ("max_tokens",), ("mean_sqrt_len_tokens", "cls_token")])
    def test_the_names_of_poolings(self, old: Path, tmp_path: Path, modes: tuple[str, ...]) -> None:
        self.pooling(old, *modes)
        assert_the_same(old, tmp_path)

    def test_lower_case(self, old: Path, tmp_path: Path) -> None:
        upper = [text.upper() for text in TEXTS]
        cased = load_encoder(old).encode(upper)
        self.write(old / "sentence_bert_config.json", {"max_seq_length": 20, "do_lower_case": True})
        assert_the_same(old, tmp_path)
        encoder = load_encoder(old)
        np.testing.assert_allclose(encoder.encode(upper), encoder.encode(TEXTS), atol=1e-6)
        assert abs(encoder.encode(upper) - cased).max() > 1e-2

    @pytest.mark.parametrize("name", ["sentence_bert_config.json", "sentence_roberta_config.json"])
    def test_the_length_of_a_text(self, old: Path, tmp_path: Path, name: str) -> None:
        self.write(old / name, {"max_seq_length": 9, "do_lower_case": False})
        assert_the_same(old, tmp_path)
        assert load_encoder(old).length_limit == 9

    def test_the_transformer_in_a_folder_of_its_own(self, old: Path, tmp_path: Path) -> None:
        inner = old / "0_Transformer"
        inner.mkdir()
        for path in list(old.iterdir()):
            if path.is_file() and path.name != "modules.json":
                shutil.move(path, inner / path.name)
        self.write(inner / "sentence_bert_config.json", {"max_seq_length": 30, "do_lower_case": True})
        listed = json.loads((old / "modules.json").read_text())
        listed[0]["path"] = "0_Transformer"
        self.write(old / "modules.json", listed)
        assert_the_same(old, tmp_path)
        settings = EncoderSettings.model_validate({"model": str(old), "dropout": 0.3})
        assert load_encoder(old, settings).backbone.config.hidden_dropout_prob == 0.3
