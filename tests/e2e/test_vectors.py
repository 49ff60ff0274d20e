"""Whatever hands vectors out: they are numbers, unit norm where cosines are meant, with the prompts of the model."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from invoke import assert_refused, hncse
from safetensors.torch import load_file, save_file
from sentence_transformers import SentenceTransformer
from tiny import make_collection, make_sentences

from hncse_ray.encoder import load_encoder
from hncse_ray.evaluation import evaluate_retrieval, read_collection
from hncse_ray.training.encoding import Alone, KnownEncode, ShardedEncode

SENTENCES = make_sentences(40, seed=21)


def export(tiny_model: Path, folder: Path, prompts: dict[str, str] | None = None) -> Path:
    """A folder of sentence-transformers without a Normalize stage, its vectors of unlike length."""
    from sentence_transformers.sentence_transformer.modules import Pooling, Transformer

    transformer = Transformer(str(tiny_model))
    model = SentenceTransformer(modules=[transformer, Pooling(32, "mean")], prompts=prompts, device="cpu")
    model.save_pretrained(str(folder), create_model_card=False)
    weights = folder / "model.safetensors"
    tensors = load_file(weights)
    for name, tensor in tensors.items():
        if name.endswith("output.LayerNorm.bias"):
            tensor += 0.5  # or the last LayerNorm would make all lengths nearly equal
    save_file(tensors, weights, metadata={"format": "pt"})
    return folder


@pytest.fixture(scope="module")
def model(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return export(tiny_model, tmp_path_factory.mktemp("model") / "raw")


@pytest.fixture(scope="module")
def prompted(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    prompts = {"query": "river river: ", "document": "old stone tree: "}
    return export(tiny_model, tmp_path_factory.mktemp("model") / "prompted", prompts)


@pytest.fixture
def recipe(small_run: dict[str, Any], tmp_path: Path) -> Path:
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(small_run))
    return path


def unit(rows_ND: np.ndarray) -> np.ndarray:
    return rows_ND / np.linalg.norm(rows_ND, axis=1, keepdims=True)


def test_a_model_whose_vectors_are_no_numbers_is_refused_by_all(
    model: Path, recipe: Path, corpus_file: Path, pairs_file: Path, tmp_path: Path
) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(model, broken)
    tensors = load_file(broken / "model.safetensors")
    tensors["embeddings.word_embeddings.weight"][7:] = float("nan")
    save_file(tensors, broken / "model.safetensors", metadata={"format": "pt"})
    before = sorted(tmp_path.rglob("*"))
    for args in (
        ("encode", broken, corpus_file, "--out", tmp_path / "v.npy"),
        ("search", broken, recipe, "a river"),
        ("search", model, recipe, "a river", "--compare", broken),
        ("evaluate", broken, "--pairs", pairs_file),
        ("mine", broken, corpus_file, "--out", tmp_path / "mined.parquet"),
    ):
        assert_refused(hncse(*args), "broken", "not numbers")
    assert [path for path in sorted(tmp_path.rglob("*")) if "cache" not in path.parts] == before


def test_what_is_evaluated_are_the_vectors_of_sentence_transformers(model: Path) -> None:
    """Also where they are of unlike length: transfer makes something of it."""
    expected = SentenceTransformer(str(model), device="cpu").encode(SENTENCES)
    lengths = np.linalg.norm(expected, axis=1)
    assert lengths.max() / lengths.min() > 1.05 and abs(lengths - 1).min() > 0.1
    encoder = load_encoder(model)
    for encode in (encoder.encode, ShardedEncode(encoder, 7), KnownEncode(Alone(encoder))):
        np.testing.assert_allclose(encode(SENTENCES), expected, atol=1e-4)


def test_encode_writes_unit_norm(model: Path, tmp_path: Path) -> None:
    (tmp_path / "texts.txt").write_text("\n".join(SENTENCES))
    assert hncse("encode", model, tmp_path / "texts.txt", "--out", tmp_path / "v.npy").exit_code == 0
    np.testing.assert_allclose(np.load(tmp_path / "v.npy"), unit(load_encoder(model).encode(SENTENCES)), atol=1e-5)


def test_search_goes_by_cosine_with_the_prompts_of_both_sides(
    model: Path, prompted: Path, recipe: Path, corpus_file: Path
) -> None:
    sentences, queries = corpus_file.read_text().splitlines(), [s[::-1] + s[:20] for s in SENTENCES[:10]]
    for folder in (model, prompted):
        result = hncse("search", folder, recipe, *queries, "--top", 3, "--json")
        assert result.exit_code == 0, result.stderr
        found = json.loads(result.stdout.splitlines()[-1])
        library = SentenceTransformer(str(folder), device="cpu")
        query_QD, sentence_ND = library.encode_query(queries), library.encode_document(sentences)
        nearest = [np.argsort(-scores)[:3] for scores in unit(query_QD) @ unit(sentence_ND).T]
        texts = [[hit["text"] for hit in of[str(folder)]] for of in found.values()]
        assert texts == [[sentences[i] for i in top] for top in nearest]
        by_product = [np.argsort(-scores)[:3] for scores in query_QD @ sentence_ND.T]
        alike = unit(library.encode(queries)) @ unit(library.encode(sentences)).T
        without_prompts = [np.argsort(-scores)[:3] for scores in alike]
        for other in (by_product, without_prompts) if folder == prompted else (by_product,):
            assert any(list(a) != list(b) for a, b in zip(nearest, other, strict=True))  # or this would show little


@pytest.mark.parametrize("encode", [lambda e: ShardedEncode(e, 16), lambda e: KnownEncode(Alone(e))])
def test_collections_are_searched_with_the_prompts_of_both_sides(
    prompted: Path, tmp_path: Path, encode: Callable[[Any], Any]
) -> None:
    data = read_collection(make_collection(tmp_path / "tiny"), ("test",))["test"]

    class Library:
        """sentence-transformers' own vectors."""

        def __init__(self, side: str | None = None) -> None:
            self.side = side

        def on_side(self, side: str) -> Library:
            return Library(side)

        def __call__(self, texts: list[str]) -> np.ndarray:
            model = SentenceTransformer(str(prompted), device="cpu")
            return {"query": model.encode_query, "document": model.encode_document}[self.side or ""](texts)

    encoder = load_encoder(prompted)
    found = evaluate_retrieval(encode(encoder), data)
    assert found == pytest.approx(evaluate_retrieval(Library(), data), abs=1e-3)
    assert found["ndcg@10"] != pytest.approx(evaluate_retrieval(encoder.encode, data)["ndcg@10"], abs=1e-3)
