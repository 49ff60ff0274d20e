"""How long a run is, its batches, optimiser and learning-rate schedule."""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt
import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR

from hncse_ray.config import Settings, TrainSettings
from hncse_ray.corpus import BatchPlan, RowLengths
from hncse_ray.errors import SettingsError, counted


def plan_batches(
    settings: Settings, lengths: RowLengths, *, left_out: npt.NDArray[np.int64] | None = None
) -> BatchPlan:
    """Return the batches of a run over a corpus whose rows have these lengths `[N]`, without those left out."""
    return BatchPlan(
        lengths,
        batch_size=settings.train.batch_size,
        seed=settings.run.seed,
        bucket_by_length=settings.train.bucket_by_length,
        min_batch=settings.smallest_batch,
        left_out=left_out,
    )


def count_steps(settings: TrainSettings, plan: BatchPlan) -> int:
    """Return the optimiser steps of a run.

    Raises:
        SettingsError: they are over before the warm-up is.
    """
    epoch_steps = plan.batches_per_epoch * settings.epochs / settings.accumulation_steps
    steps = settings.max_steps or max(1, math.ceil(round(epoch_steps, 6)))  # 25 * 0.28 is a little over 7
    if settings.warmup_steps >= steps:
        raise SettingsError(
            f"{settings.warmup_steps} is not less than the {counted(steps, 'step')} of this run",
            "train.warmup_steps",
            "Lower it, or raise train.epochs",
        )
    return steps


def build_optimizer(model: nn.Module, settings: TrainSettings) -> torch.optim.AdamW:
    """AdamW; biases and norms (one-dimensional parameters) are not decayed."""
    trainable = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in trainable if p.ndim > 1], "weight_decay": settings.weight_decay},
        {"params": [p for p in trainable if p.ndim <= 1], "weight_decay": 0.0},
    ]
    # fused: one pass over all parameters; on a CPU six times as fast as the default loop over tensors.
    return torch.optim.AdamW(groups, lr=settings.learning_rate, fused=True)


def build_schedule(optimizer: torch.optim.Optimizer, settings: TrainSettings, total_steps: int) -> LambdaLR:
    """Linear warm-up, then linear or cosine decay to zero at ``total_steps``, or none."""

    def factor(step: int) -> float:
        if step < settings.warmup_steps:
            return (step + 1) / (settings.warmup_steps + 1)
        if settings.schedule == "constant":
            return 1.0
        done = (step - settings.warmup_steps) / (total_steps - settings.warmup_steps)
        return max(0.0, 1 - done) if settings.schedule == "linear" else (1 + math.cos(math.pi * min(1.0, done))) / 2

    return LambdaLR(optimizer, factor)
