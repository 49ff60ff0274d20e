"""One optimiser step: what dropout hangs on, clipping, and accumulation."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from tiny import make_sentences
from torch import Tensor

from hncse_ray.config import load_settings
from hncse_ray.encoder import SentenceEncoder, load_encoder
from hncse_ray.training.objective import Objective
from hncse_ray.training.step import (
    LocalBatch,
    Seen,
    StepContext,
    StepNegatives,
    train_step,
)

SENTENCES = make_sentences(24, seed=11)
Views = list[list[Tensor]]


class Watched(Objective):
    """The real objective, which keeps the views that it was given."""

    seen: Views

    def __call__(self, views, neighbours=None, **how):  # type: ignore[no-untyped-def]
        self.__dict__.setdefault("seen", []).append([view.detach().clone() for view in views])
        return super().__call__(views, neighbours, **how)


def build(model: Path, *overrides: str) -> tuple[SentenceEncoder, Watched]:
    encoder = {"model": str(model), "pooling": "mean", "precision": "fp32"}
    tree = {"corpus": {"source": "python-docs"}, "encoder": encoder}
    settings = load_settings(tree, overrides)
    encoder = load_encoder(model, settings.encoder)
    return encoder, Watched(settings.objective, dimension=encoder.dimension, device=encoder.device)


def take(
    encoder: SentenceEncoder,
    objective: Objective,
    *numbers: int,
    seed: int = 1,
    rate: float = 0.0,
    chunk: int | None = None,
    max_grad_norm: float = 1e9,
    texts: list[str] = SENTENCES[:8],
) -> tuple[dict[str, Tensor], Seen]:
    rows = encoder.tokenize(texts)
    batches = [LocalBatch(number, rows, (len(rows),)) for number in numbers]
    context = StepContext(objective=objective, seed=seed, step=0, total_steps=10, chunk_size=chunk)
    optimizer = torch.optim.SGD([p for p in encoder.parameters() if p.requires_grad], lr=rate)
    return train_step(encoder, optimizer, batches, context, max_grad_norm=max_grad_norm)


def gradient(encoder: SentenceEncoder) -> Tensor:
    return torch.cat([p.grad.flatten() for p in encoder.parameters() if p.grad is not None])


@pytest.mark.parametrize("objective", ["info_nce", "three_view"])
def test_every_view_has_dropout_of_its_own(tiny_model: Path, objective: str) -> None:
    encoder, watched = build(tiny_model, f"objective.name={objective}")
    take(encoder, watched, 0)
    views = watched.seen[0]
    assert len(views) == (3 if objective == "three_view" else 2)
    for i, left in enumerate(views):
        for right in views[i + 1 :]:
            assert (left - right).norm(dim=1).min() > 1e-3


@pytest.mark.parametrize("chunk", [None, 3])
def test_dropout_hangs_on_seed_and_batch_alone(tiny_model: Path, chunk: int | None) -> None:
    encoder, watched = build(tiny_model)
    torch.manual_seed(99)
    take(encoder, watched, 5, chunk=chunk)
    torch.randn(1000)  # whatever was drawn in between
    take(encoder, watched, 5, chunk=chunk)
    take(encoder, watched, 6, chunk=chunk)
    take(encoder, watched, 5, seed=2, chunk=chunk)
    first, again, next_batch, other_seed = (seen[0] for seen in watched.seen)
    assert torch.equal(first, again)
    assert (first - next_batch).norm(dim=1).min() > 1e-3
    assert (first - other_seed).norm(dim=1).min() > 1e-3


def test_chunks_of_a_batch_have_dropout_of_their_own(tiny_model: Path) -> None:
    encoder, watched = build(tiny_model)
    take(encoder, watched, 0, chunk=2, texts=SENTENCES[:2] * 3)
    first, second, third = watched.seen[0][0].split(2)
    assert (first - second).norm(dim=1).min() > 1e-3
    assert (second - third).norm(dim=1).min() > 1e-3


def test_random_pairs_hang_on_seed_and_batch_alone(tiny_model: Path) -> None:
    encoder, watched = build(
        tiny_model, "encoder.dropout=0", "objective.name=hard_negative_mixing", "objective.k=4", "objective.n_mixes=3"
    )
    losses = [
        float(take(encoder, watched, number, seed=seed)[0]["loss"]) for number, seed in ((0, 1), (0, 1), (1, 1), (0, 2))
    ]
    assert losses[0] == losses[1]
    assert len(set(losses)) == 3


def test_random_pairs_and_the_dropout_of_a_rank_have_seeds_of_their_own(
    tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    encoder, watched = build(tiny_model, "objective.name=hard_negative_mixing")
    seeds: list[int] = []
    seed_dropout, seed_pairs = torch.manual_seed, torch.Generator.manual_seed

    class Generator(torch.Generator):
        def manual_seed(self, seed: int) -> torch.Generator:
            seeds.append(seed)
            return seed_pairs(self, seed)

    monkeypatch.setattr(torch, "Generator", Generator)
    monkeypatch.setattr(torch, "manual_seed", lambda seed: (seeds.append(seed), seed_dropout(seed))[1])
    take(encoder, watched, 7, chunk=4)
    assert len(seeds) == 5 and len(set(seeds)) == 3  # two chunks, each twice, and the pairs


@pytest.mark.parametrize("bound", [0.01, 1e9])
def test_the_gradient_is_clipped_and_its_true_norm_reported(tiny_model: Path, bound: float) -> None:
    encoder, watched = build(tiny_model)
    before = torch.cat([p.detach().clone().flatten() for p in encoder.parameters()])
    metrics, _ = take(encoder, watched, 0, rate=1.0, max_grad_norm=bound)
    moved = torch.cat([p.detach().flatten() for p in encoder.parameters()]) - before
    assert metrics["grad_norm"] > 0.05
    assert moved.norm() == pytest.approx(min(bound, float(metrics["grad_norm"])), rel=1e-3)


@pytest.mark.parametrize("chunk", [None, 3])
def test_accumulated_batches_are_averaged(tiny_model: Path, chunk: int | None) -> None:
    encoder, watched = build(tiny_model)
    losses, gradients = [], []
    for number in (0, 1, 2):
        metrics, _ = take(encoder, watched, number, chunk=chunk)
        losses.append(float(metrics["loss"]))
        gradients.append(gradient(encoder))
    metrics, seen = take(encoder, watched, 0, 1, 2, chunk=chunk)
    assert float(metrics["loss"]) == pytest.approx(np.mean(losses), rel=1e-6)
    mean = torch.stack(gradients).mean(0)
    assert (gradient(encoder) - mean).norm() <= 1e-5 * mean.norm()
    assert metrics["grad_norm"] == pytest.approx(float(mean.norm()), rel=1e-5)
    assert torch.equal(seen.z1_bD, watched.seen[-1][0])  # of the last batch


def test_a_step_forgets_the_gradient_before_it(tiny_model: Path) -> None:
    encoder, watched = build(tiny_model)
    take(encoder, watched, 0)
    first = gradient(encoder)
    take(encoder, watched, 1)
    take(encoder, watched, 0)
    assert torch.equal(gradient(encoder), first)


def test_a_step_trains_though_the_encoder_was_evaluating(tiny_model: Path) -> None:
    encoder, watched = build(tiny_model)
    encoder.eval()
    take(encoder, watched, 0)
    assert not torch.equal(*watched.seen[0])


def test_what_a_step_returns_holds_no_graph(tiny_model: Path) -> None:
    encoder, watched = build(tiny_model, "objective.name=hybrid", "objective.k=4")
    for chunk in (None, 3):
        metrics, seen = take(encoder, watched, 0, chunk=chunk)
        assert not seen.z1_bD.requires_grad and not seen.z2_bD.requires_grad
        assert all(value.ndim == 0 and not value.requires_grad for value in metrics.values())
        assert {"loss", "grad_norm"} <= metrics.keys()


@pytest.mark.parametrize("chunk", [None, 3])
def test_a_step_is_the_same_whether_its_rows_are_packed_or_padded(tiny_model: Path, chunk: int | None) -> None:
    gradients = []
    for packs in (True, False):
        encoder, watched = build(tiny_model, "encoder.dropout=0", "objective.name=info_nce")
        assert encoder.packs
        encoder.packs = packs
        rows = encoder.tokenize(SENTENCES[:8])
        fresh = encoder.tokenize([SENTENCES[8], "one", " ".join(SENTENCES[9:12]), *SENTENCES[12:24]])
        slots = [fresh[2 * i : 2 * i + 2] if i != 4 else [None, fresh[14]] for i in range(7)] + [[None, None]]
        mask = np.array([[tokens is not None for tokens in own] for own in slots])
        batch = LocalBatch(0, rows, (8,), StepNegatives(mask, None, slots))
        context = StepContext(objective=watched, seed=1, step=0, total_steps=10, chunk_size=chunk)
        train_step(encoder, torch.optim.SGD(encoder.parameters(), lr=0.0), [batch], context, max_grad_norm=1e9)
        gradients.append(gradient(encoder))
    assert gradients[0].norm() > 0
    torch.testing.assert_close(*gradients, atol=1e-6, rtol=1e-4)
