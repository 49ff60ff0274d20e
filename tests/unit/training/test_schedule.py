"""The optimiser's groups and the learning rate of every step."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from hncse_ray.config import TrainSettings, load_settings
from hncse_ray.encoder import freeze_unused, load_encoder
from hncse_ray.errors import SettingsError
from hncse_ray.training.schedule import build_optimizer, build_schedule, count_steps, plan_batches


def rates(total: int, **changes: object) -> list[float]:
    """The learning rate of each step, and the one after the last."""
    settings = TrainSettings.model_validate({"learning_rate": 0.1} | changes)
    optimizer = build_optimizer(nn.Linear(2, 2), settings)
    schedule = build_schedule(optimizer, settings, total)
    found = []
    for _ in range(total + 1):
        assert all(group["lr"] == schedule.get_last_lr()[0] for group in optimizer.param_groups)
        found.append(schedule.get_last_lr()[0])
        optimizer.step()
        schedule.step()
    return found


def test_linear_falls_to_zero_at_the_end() -> None:
    assert rates(10) == pytest.approx([0.1 * (1 - step / 10) for step in range(11)])


def test_cosine_falls_to_zero_at_the_end() -> None:
    assert rates(8, schedule="cosine") == pytest.approx(
        [0.05 * (1 + math.cos(math.pi * step / 8)) for step in range(9)], abs=1e-12
    )


def test_constant_stays() -> None:
    assert rates(5, schedule="constant") == [0.1] * 6


@pytest.mark.parametrize("schedule", ["linear", "cosine", "constant"])
def test_warm_up_rises_evenly_to_the_full_rate_and_never_starts_at_zero(schedule: str) -> None:
    found = rates(10, schedule=schedule, warmup_steps=4)
    assert found[:5] == pytest.approx([0.02, 0.04, 0.06, 0.08, 0.1])
    assert max(found) == pytest.approx(0.1)
    assert found[-1] == pytest.approx(0.1 if schedule == "constant" else 0.0, abs=1e-12)
    assert all(left >= right for left, right in zip(found[4:], found[5:], strict=False))


@pytest.mark.parametrize(("warmup", "refused"), [(0, False), (7, False), (8, True), (500, True)])
def test_a_warm_up_ends_before_the_run_does(warmup: int, refused: bool) -> None:
    overrides = ["train.batch_size=4", "train.epochs=1.5", "train.accumulation_steps=2", f"train.warmup_steps={warmup}"]
    settings = load_settings({"corpus": {"source": "python-docs"}}, overrides)
    plan = plan_batches(settings, np.ones(40, dtype=np.int64))  # 10 batches, so 15 / 2 steps
    if refused:
        with pytest.raises(SettingsError, match=rf"train.warmup_steps: {warmup} is not less than the 8 steps"):
            count_steps(settings.train, plan)
    else:
        assert count_steps(settings.train, plan) == 8


def test_matrices_decay_and_biases_and_norms_do_not(tiny_model: Path) -> None:
    settings = load_settings(
        {"corpus": {"source": "python-docs"}},
        ["train.weight_decay=0.3", "encoder.pooling=cls", "encoder.head=tanh"],
    )
    encoder = load_encoder(tiny_model, settings.encoder)
    freeze_unused(encoder)
    optimizer = build_optimizer(encoder, settings.train)
    decay = {id(p): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    for name, parameter in encoder.named_parameters():
        if "pooler" in name:
            assert id(parameter) not in decay
        else:
            plain = name.endswith("bias") or "LayerNorm" in name
            assert decay[id(parameter)] == (0.0 if plain else 0.3), name
    assert "head.linear.weight" in {name.removeprefix("model.") for name, _ in encoder.named_parameters()}
    assert sum("pooler" in name for name, _ in encoder.named_parameters()) == 2


def test_decay_shrinks_a_matrix_without_gradient_and_leaves_a_bias() -> None:
    model = nn.Linear(2, 2)
    before = [p.detach().clone() for p in model.parameters()]
    optimizer = build_optimizer(model, TrainSettings(learning_rate=0.5, weight_decay=0.1))
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    optimizer.step()
    torch.testing.assert_close(model.weight.detach(), before[0] * 0.95)
    torch.testing.assert_close(model.bias.detach(), before[1])
