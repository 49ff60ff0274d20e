"""The objective of a run: the pure loss functions, with the settings, schedule and state that they need."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from hncse_ray import objectives
from hncse_ray.config import InstanceSmoothing, ObjectiveSettings

Metrics = dict[str, Tensor]


class Objective:
    """Callable on the views of a global batch; what it remembers is in :meth:`state_dict`.

    Args:
        settings: which objective, and its settings.
        dimension: width D of the embeddings.
        device: where the views are.
    """

    def __init__(self, settings: ObjectiveSettings, *, dimension: int, device: torch.device) -> None:
        self.settings = settings
        self.views = 3 if settings.name == "three_view" else 2
        self._buffer_KD: Tensor | None = None
        if isinstance(settings, InstanceSmoothing):
            self._buffer_KD = torch.zeros(settings.buffer_size, dimension, device=device)

    def __call__(
        self, views: Sequence[Tensor], *, step: int, total_steps: int, generator: torch.Generator
    ) -> tuple[Tensor, Metrics]:
        """Compute the loss of one global batch.

        Args:
            views: ``views`` tensors ``[B, D]``, unit-norm rows.
            step: optimiser steps taken so far.
            total_steps: optimiser steps of the run; schedules of the objective end there.
            generator: decides random pairs; seeded alike on every rank.

        Returns:
            Loss (scalar) and detached metrics.
        """
        s = self.settings
        if s.name == "info_nce":
            return objectives.info_nce(*views, temperature=s.temperature)
        if s.name == "three_view":
            return objectives.three_view(*views, temperature=s.temperature)
        if isinstance(s, InstanceSmoothing):
            assert self._buffer_KD is not None
            weight = s.weight
            if s.weight_start is not None:
                weight = objectives.cosine_ramp(step, total_steps, start=s.weight_start, end=s.weight)
            loss, metrics, self._buffer_KD = objectives.instance_smoothing(
                views[0],
                views[1],
                self._buffer_KD,
                temperature=s.temperature,
                group_size=s.group_size,
                attention_temperature=s.attention_temperature,
                weight=weight,
            )
            return loss, metrics
        arguments = s.model_dump(exclude={"name"})
        if s.name == "positive_mixing":
            return objectives.positive_mixing(*views, **arguments)
        mixing = objectives.hybrid if s.name == "hybrid" else objectives.hard_negative_mixing
        return mixing(*views, **arguments, generator=generator)

    def state_dict(self) -> dict[str, Tensor]:
        """What must survive a restart."""
        return {} if self._buffer_KD is None else {"buffer": self._buffer_KD}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Take up the state of :meth:`state_dict`."""
        if self._buffer_KD is not None:
            self._buffer_KD = state["buffer"].to(self._buffer_KD.device)
