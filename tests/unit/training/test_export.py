"""What a finished run exports: a model that sentence-transformers loads, with a card that the hub's reader takes."""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from families import make_family
from huggingface_hub import ModelCard
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import Normalize, Pooling
from tiny import make_sentences

from hncse_ray.config import EncoderSettings, LoraSettings, load_settings
from hncse_ray.corpus import PrepareReport, prepare_corpus
from hncse_ray.encoder import SentenceEncoder, load_encoder
from hncse_ray.reporting.model_card import CardFacts, model_card
from hncse_ray.storage import write_folder
from hncse_ray.training import TrainJob, fit, load_evaluation_sets
from hncse_ray.training.checkpoint import Request, TrainState
from hncse_ray.training.export import usage


class OnlyTheModel:
    """A RunStore that keeps no checkpoints."""

    def __init__(self, model: Path) -> None:
        self.model = model

    def checkpoints(self) -> list[Path]:
        return []

    def save(self, step: int, write: object) -> None:
        pass

    def requested(self) -> Request:
        return Request.NOTHING

    def export(self, write: Any) -> None:
        write_folder(self.model, write)


def test_the_card_of_a_run(small_run: dict[str, Any], tmp_path: Path) -> None:
    base = tmp_path / "base"
    tiny = load_encoder(small_run["encoder"]["model"], load_settings(small_run).encoder)
    tiny.backbone.save_pretrained(base)
    tiny.tokenizer.save_pretrained(base)
    (base / "README.md").write_text("---\nlicense: mit\nlanguage: en\n---\n")
    settings = load_settings(small_run, [f"encoder.model={base}", "train.max_steps=4"])
    encoder = load_encoder(base, settings.encoder)
    digest = encoder.tokenizer_digest()
    corpus = prepare_corpus(settings.corpus, tokenize=encoder.token_rows, tokenizer_digest=digest, max_length=24)
    sets = load_evaluation_sets(settings.evaluation, settings.corpus)
    finished = fit(TrainJob(settings, corpus, encoder, sets), OnlyTheModel(tmp_path / "model"), lambda event: None)

    card = ModelCard.load(tmp_path / "model" / "README.md")
    assert card.data.license == "mit" and card.data.language == ["en"] and card.data.model_name == "small"
    scores = {f"{r.dataset_type}/{r.metric_name}": r.metric_value for r in card.data.eval_results}
    assert scores == {name: round(value, 4) for name, value in finished.after["test"].items()}
    for said in (corpus.digest, "300 unique sentences", "seed: 3", f"are those of step {finished.best_step}"):
        assert said in card.text
    for path in (tmp_path / "model").rglob("*"):
        assert path.is_dir() or path.name == "settings.yaml" or str(tmp_path).encode() not in path.read_bytes(), path

    texts = make_sentences(5, seed=3)
    theirs = SentenceTransformer(str(tmp_path / "model"), device="cpu").encode(texts)
    np.testing.assert_allclose(theirs, load_encoder(tmp_path / "model").encode(texts), atol=1e-6)


# ------------------------------------------------------------------------------------------------ the code in the card


def card_of(encoder: SentenceEncoder) -> str:
    """The card of a run that took no step."""
    settings = load_settings({"corpus": {"path": "x.txt"}}).model_dump(mode="json")
    report = PrepareReport(rows=1, read=1, dropped={}, seconds=0.0, mean_tokens=1.0)
    return model_card(CardFacts(settings, usage(encoder), {}, asdict(report), asdict(TrainState()), {"dev": {}}))


def run_code(card: str, folder: Path) -> list[np.ndarray]:
    """Run each block of Python that a card shows; return the vectors that each leaves behind."""
    card, found = card.replace("Another one.", "Another one of the old books is quiet."), []  # so one is padded
    for block in re.findall(r"```python\n(.*?)```", card, flags=re.DOTALL):
        names: dict[str, Any] = {}
        exec(block.replace("PATH", str(folder)), names)
        vectors = names["vectors"] if "vectors" in names else np.concatenate([names["queries"], names["documents"]])
        found.append(np.asarray(vectors))
    return found


def check_code(encoder: SentenceEncoder, folder: Path, *, plain: bool) -> str:
    """See that the ways of use which a card shows give the same vectors."""
    card = card_of(encoder)
    encoder.save(folder, readme=card)
    theirs, *others = run_code(card, folder)
    assert len(others) == 1 + plain and theirs.shape == (2, encoder.dimension)
    assert np.abs(theirs[0] - theirs[1]).max() > 1e-3
    for vectors in others:
        np.testing.assert_allclose(vectors, theirs, atol=1e-5)
    return card


@pytest.mark.parametrize("family", ["bert", "modernbert", "roberta-pad1"])
@pytest.mark.parametrize(("pooling", "plain"), [("mean", True), ("cls", True), ("lasttoken", True), ("max", False)])
def test_the_three_ways_of_use_agree(family: str, pooling: Any, plain: bool, tmp_path: Path) -> None:
    base = make_family(family, tmp_path / "base")
    encoder = load_encoder(base, EncoderSettings(model=str(base), pooling=pooling))
    if pooling == "cls":
        encoder.model.append(Normalize())
    if pooling == "lasttoken":
        encoder.tokenizer.padding_side = "left" if family == "bert" else "right"
    card = check_code(encoder, tmp_path / "model", plain=plain)
    assert f"Transformer, Pooling ({pooling})" in card and ("not of unit norm" in card) == (pooling != "cls")


def test_a_causal_model(tmp_path: Path) -> None:
    base = make_family("qwen3", tmp_path / "base")
    check_code(load_encoder(base), tmp_path / "model", plain=True)


@pytest.mark.parametrize("pooled", [True, False])
def test_with_prompts(tiny_model: Path, tmp_path: Path, pooled: bool) -> None:
    prompts = {"query": "river house:\n", "document": "the 'old' book: "}
    encoder = load_encoder(tiny_model, EncoderSettings(model=str(tiny_model), pooling="mean", prompts=prompts))
    encoder.model[1].include_prompt = pooled
    card = check_code(encoder, tmp_path, plain=pooled)
    assert "encode_query" in card and "river house" in card


def test_with_a_default_prompt(tiny_model: Path, tmp_path: Path) -> None:
    prompts = {"query": "river house: ", "document": "river house: "}
    settings = EncoderSettings(model=str(tiny_model), pooling="mean", prompts=prompts, default_prompt="document")
    assert "encode_query" not in check_code(load_encoder(tiny_model, settings), tmp_path, plain=True)


def test_stages_that_transformers_lacks(tiny_model: Path, tmp_path: Path) -> None:
    def load(**changes: Any) -> SentenceEncoder:
        return load_encoder(tiny_model, EncoderSettings(model=str(tiny_model), **{"pooling": "mean"} | changes))

    dense, both, cut = load(head="tanh", head_in_training_only=False), load(), load()
    both.model[1] = Pooling(32, ("cls", "mean"))
    cut.model.truncate_dim = 16
    t5 = load_encoder(make_family("t5", tmp_path / "t5"))
    for name, encoder in {"dense": dense, "layers": load(pooling="first_last_mean"), "both": both, "t5": t5}.items():
        check_code(encoder, tmp_path / f"{name}-model", plain=False)
    assert "transformers alone" not in card_of(cut)
    assert "Pooling (cls + mean)" in card_of(both)

    head = load(head="tanh")  # is left out of what is saved, so out of the card too
    assert "Dense" in card_of(dense) and "TrainingHead" not in check_code(head, tmp_path / "head", plain=True)


def test_adapters(tiny_model: Path, tmp_path: Path) -> None:
    pytest.importorskip("peft", reason="peft is not installed (the extra lora)")
    encoder = load_encoder(tiny_model, EncoderSettings(model=str(tiny_model), pooling="mean", lora=LoraSettings()))
    check_code(encoder, tmp_path, plain=True)


def test_a_model_with_code_of_its_own(tiny_model: Path, tmp_path: Path) -> None:
    base = shutil.copytree(tiny_model, tmp_path / "base")
    (base / "own_bert.py").write_text("from transformers import BertModel\n\n\nclass OwnBert(BertModel):\n    pass\n")
    config = json.loads((base / "config.json").read_text())
    config["auto_map"] = {"AutoModel": "own_bert.OwnBert"}
    (base / "config.json").write_text(json.dumps(config))
    encoder = load_encoder(base, EncoderSettings(model=str(base), pooling="mean", trust_remote_code=True))
    card = check_code(encoder, tmp_path / "model", plain=False)
    assert card.count("trust_remote_code=True") == 2 and (tmp_path / "model" / "own_bert.py").is_file()
