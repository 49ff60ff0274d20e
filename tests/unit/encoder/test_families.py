"""Every family of models: its vectors are sentence-transformers', it trains, and what is exported loads elsewhere."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from families import DECODERS, FAMILIES, LIMIT, make_family
from sentence_transformers import SentenceTransformer
from tiny import make_sentences
from transformers import AutoModel, AutoTokenizer, T5EncoderModel

from hncse_ray.config import EncoderSettings, InfoNCE
from hncse_ray.encoder import SentenceEncoder, freeze_unused, has_dropout, load_encoder
from hncse_ray.training.objective import Objective
from hncse_ray.training.step import LocalBatch, StepContext, StepNegatives, train_step

SENTENCES = make_sentences(8)
TEXTS = [*SENTENCES, "river", " ".join(make_sentences(12, seed=4))]  # the last is cut at the limit
PADDED = {
    "mpnet", "deberta", "deberta-v2", "mobilebert", "convbert", "longformer", "big_bird", "roformer", "rembert", "t5",
}  # fmt: skip


@pytest.fixture(scope="module", params=FAMILIES)
def family(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    return request.param, make_family(request.param, tmp_path_factory.mktemp(request.param))


def unit(vectors: np.ndarray) -> np.ndarray:
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def train_two_steps(encoder: SentenceEncoder) -> list[float]:
    freeze_unused(encoder)
    objective = Objective(InfoNCE(temperature=1), dimension=encoder.dimension, device=encoder.device, columns="own")
    optimizer = torch.optim.SGD(encoder.parameters(), lr=1e-3)
    rows = encoder.tokenize(SENTENCES)
    negatives = StepNegatives(
        mask_bm=np.ones((4, 1), dtype=bool), stored_bmD=None, fresh_bm=[[row] for row in rows[4:]]
    )
    context = StepContext(objective=objective, seed=0, step=0, total_steps=2, chunk_size=None)
    batch = LocalBatch(number=0, rows=rows[:4], sizes=(4,), negatives=negatives)
    steps = [train_step(encoder, optimizer, [batch], context, max_grad_norm=1.0)[0] for _ in range(2)]
    return [float(metrics["loss"]) for metrics in steps]


def by_transformers(folder: Path, name: str) -> np.ndarray:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = (T5EncoderModel if name == "t5" else AutoModel).from_pretrained(folder).eval()
    batch = tokenizer(
        TEXTS, padding=True, truncation=True, max_length=LIMIT, return_tensors="pt", return_token_type_ids=False
    )
    with torch.no_grad():
        states = model(**batch).last_hidden_state
    kept = [row[mask.bool()] for row, mask in zip(states, batch["attention_mask"], strict=True)]
    return torch.stack([row[-1] if name in DECODERS else row.mean(dim=0) for row in kept]).numpy()


def test_a_family_encodes_trains_and_is_exported(family: tuple[str, Path], tmp_path: Path) -> None:
    name, folder = family
    encoder = load_encoder(folder, EncoderSettings(model=str(folder), precision="fp32"))
    assert encoder.packs == (name not in PADDED)
    reference = SentenceTransformer(str(folder), device="cpu")
    if name in DECODERS:
        reference[1].pooling_mode = "lasttoken"  # the folder says nothing, and its attention is causal
    before = encoder.encode(TEXTS)
    np.testing.assert_allclose(unit(before), unit(reference.encode(TEXTS)), atol=1e-5)
    assert np.min(unit(before) @ unit(before).T) < 0.99  # else all vectors would be alike, and equal anything
    assert has_dropout(encoder)

    first, second = train_two_steps(encoder)
    assert second < first
    after = encoder.encode(TEXTS)
    assert np.abs(after - before).max() > 1e-5

    encoder.save(tmp_path, readme="# a model\n")
    np.testing.assert_allclose(SentenceTransformer(str(tmp_path), device="cpu").encode(TEXTS), after, atol=1e-5)
    np.testing.assert_allclose(load_encoder(tmp_path).encode(TEXTS), after, atol=1e-5)
    np.testing.assert_allclose(by_transformers(tmp_path, name), after, atol=1e-5)
