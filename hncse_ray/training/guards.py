"""Conditions under which training must not go on, each with its cause."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from hncse_ray.config import TrainSettings
from hncse_ray.errors import TrainingError

_COLLAPSED_LOGS = 3
_SAMPLE_ROWS = 1024


def batch_uniformity(z_BD: Tensor) -> Tensor:
    """Uniformity (Wang & Isola 2020, arXiv 2005.10242) of a batch, from 0 (all the same) to about -4; 0-d, fp32.

    Of more than 1,024 rows it takes 1,024, evenly spaced, so that it costs the same whatever the batch.

    Args:
        z_BD: unit-norm rows, B >= 2, on any device.
    """
    rows = len(z_BD)
    if rows > _SAMPLE_ROWS:
        z_BD = z_BD[torch.linspace(0, rows - 1, _SAMPLE_ROWS, device=z_BD.device).long()]
    return torch.pdist(z_BD.float()).square().mul(-2).exp().mean().log()


class Guards:
    """Looks at the logged means; pure of I/O.

    Args:
        settings: ``max_uniformity`` is the bound of collapse.
    """

    def __init__(self, settings: TrainSettings) -> None:
        self._bound = settings.max_uniformity
        self._collapsed = 0

    def check(self, step: int, metrics: dict[str, float]) -> None:
        """Raise if the means up to ``step`` show that training has failed.

        Raises:
            TrainingError: loss or gradient is not a number, or the embeddings have collapsed to a point.
        """
        for name in ("loss", "grad_norm"):
            if not math.isfinite(metrics[name]):
                raise TrainingError(
                    f"{name} is {metrics[name]} at step {step}",
                    hint="Lower train.learning_rate or raise objective.temperature; or set encoder.precision=fp32",
                )
        uniformity = metrics["uniformity"]
        self._collapsed = self._collapsed + 1 if uniformity > self._bound else 0
        if self._collapsed >= _COLLAPSED_LOGS:
            raise TrainingError(
                f"the embeddings have collapsed: uniformity {uniformity:.4f} at step {step}, above {self._bound}"
                f" (train.max_uniformity) for {_COLLAPSED_LOGS} logs; 0 means that all sentences get one vector",
                hint="Lower train.learning_rate, or see whether the corpus repeats one sentence",
            )
