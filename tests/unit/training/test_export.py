"""What a finished run exports: a model that sentence-transformers loads, with a card that the hub's reader takes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from huggingface_hub import ModelCard
from sentence_transformers import SentenceTransformer
from tiny import make_sentences

from hncse_ray.config import load_settings
from hncse_ray.corpus import prepare_corpus
from hncse_ray.encoder import load_encoder, tokenizer_digest
from hncse_ray.storage import write_folder
from hncse_ray.training import TrainJob, fit, load_evaluation_sets
from hncse_ray.training.checkpoint import Wish


class OnlyTheModel:
    """A RunStore that keeps no checkpoints."""

    def __init__(self, model: Path) -> None:
        self.model = model

    def checkpoints(self) -> list[Path]:
        return []

    def save(self, step: int, write: object) -> None:
        pass

    def wish(self) -> Wish:
        return Wish.NOTHING

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
    digest = tokenizer_digest(encoder.tokenizer)
    corpus = prepare_corpus(settings.corpus, tokenizer=encoder.tokenizer, tokenizer_digest=digest, max_length=24)
    sets = load_evaluation_sets(settings.evaluation, settings.corpus)
    finished = fit(TrainJob(settings, corpus, encoder, sets), OnlyTheModel(tmp_path / "model"), lambda event: None)

    card = ModelCard.load(tmp_path / "model" / "README.md")
    assert card.data.license == "mit" and card.data.language == ["en"] and card.data.model_name == "small"
    scores = {f"{r.dataset_type}/{r.metric_name}": r.metric_value for r in card.data.eval_results}
    assert scores == {name: round(value, 4) for name, value in finished.after["test"].items()}
    for said in (corpus.digest, "300 unique sentences", "seed: 3", f"are those of step {finished.best_step}"):
        assert said in card.text
    assert str(tmp_path) not in card.content

    texts = make_sentences(5, seed=3)
    theirs = SentenceTransformer(str(tmp_path / "model"), device="cpu").encode(texts)
    np.testing.assert_allclose(theirs, load_encoder(tmp_path / "model").encode(texts), atol=1e-6)
