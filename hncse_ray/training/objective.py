"""The objective of a run: the pure loss functions, with the settings, schedule and state that they need."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from hncse_ray import objectives
from hncse_ray.config import InstanceSmoothing, ObjectiveSettings

Metrics = dict[str, Tensor]


@dataclass(frozen=True)
class Neighbours:
    """Global neighbours of a batch's anchors.

    Attributes:
        vectors_BmD: unit norm; anything where not usable.
        mask_Bm: which are usable.
        columns_mask: ``[B, B * m]``, where every anchor is repelled from everyone's: from which of them.
    """

    vectors_BmD: Tensor
    mask_Bm: Tensor
    columns_mask: Tensor | None


class Objective:
    """Callable on the views of a global batch; what it remembers is in :meth:`state_dict`.

    Args:
        settings: which objective, and its settings.
        columns: whose global neighbours an anchor is repelled from.
        dimension: width D of the embeddings.
        device: where the views are.
    """

    def __init__(
        self,
        settings: ObjectiveSettings,
        *,
        dimension: int,
        device: torch.device,
        columns: Literal["own", "all", "none"] = "own",
    ) -> None:
        self.settings = settings
        self.columns = columns
        self.views = 3 if settings.name == "three_view" else 2
        self._buffer_KD: Tensor | None = None
        if isinstance(settings, InstanceSmoothing):
            self._buffer_KD = torch.zeros(settings.buffer_size, dimension, device=device)

    def __call__(
        self,
        views: Sequence[Tensor],
        neighbours: Neighbours | None = None,
        *,
        batch_mask: Tensor | None = None,
        step: int,
        total_steps: int,
        generator: torch.Generator,
    ) -> tuple[Tensor, Metrics]:
        """Compute the loss of one global batch.

        Args:
            views: ``views`` tensors ``[B, D]``, unit-norm rows.
            neighbours: of the anchors, from the whole corpus; what they are used for depends on the objective.
            batch_mask: bool ``[B, B]``, which rows of the batch may repel each other; None = all.
            step: optimiser steps taken so far.
            total_steps: optimiser steps of the run; schedules of the objective end there.
            generator: decides random pairs; seeded alike on every rank.

        Returns:
            Loss (scalar) and detached metrics.
        """
        s = self.settings
        if isinstance(s, InstanceSmoothing):
            return self._smooth(s, views, neighbours, batch_mask=batch_mask, step=step, total_steps=total_steps)
        arguments = s.model_dump(exclude={"name"}) | {"batch_mask": batch_mask}
        if neighbours is not None:
            arguments |= {
                "negatives": neighbours.vectors_BmD,
                "negatives_mask": neighbours.mask_Bm,
                "columns": self.columns,
                "columns_mask": neighbours.columns_mask,
            }
        if s.name in ("hard_negative_mixing", "hybrid"):
            arguments["generator"] = generator
        loss, metrics = getattr(objectives, s.name)(*views, **arguments)
        return loss, metrics

    def _smooth(
        self,
        s: InstanceSmoothing,
        views: Sequence[Tensor],
        neighbours: Neighbours | None,
        *,
        batch_mask: Tensor | None,
        step: int,
        total_steps: int,
    ) -> tuple[Tensor, Metrics]:
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
            neighbours=None if neighbours is None else neighbours.vectors_BmD,
            neighbours_mask=None if neighbours is None else neighbours.mask_Bm,
            batch_mask=batch_mask,
        )
        return loss, metrics

    def state_dict(self) -> dict[str, Tensor]:
        """What must survive a restart."""
        return {} if self._buffer_KD is None else {"buffer": self._buffer_KD}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Take up the state of :meth:`state_dict`."""
        if self._buffer_KD is not None:
            self._buffer_KD = state["buffer"].to(self._buffer_KD.device)
