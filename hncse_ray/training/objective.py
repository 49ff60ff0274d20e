"""The objective of a run: the pure loss functions, with the settings, schedule and state that they need."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor

from hncse_ray import objectives
from hncse_ray.config import InstanceSmoothing, ObjectiveSettings, OwnObjective, Settings
from hncse_ray.errors import SettingsError
from hncse_ray.objectives import Share
from hncse_ray.training.own_objective import OwnFunction

Metrics = dict[str, Tensor]

_OF_NEIGHBOURS = ("negatives", "negatives_mask", "columns", "columns_mask", "teacher")
GIVEN = (*_OF_NEIGHBOURS, "batch_mask", "generator", "step", "total_steps", "share")
"""What a run gives to an objective whose signature names it, beside its settings."""


@dataclass(frozen=True)
class Neighbours:
    """Global neighbours of this rank's B anchors, or of all.

    Attributes:
        vectors_BmD: unit norm; zero where not usable.
        mask_Bm: which are usable.
        columns_mask: where every anchor is repelled from everyone's: from which, by anchor.
        teacher_BL: what a teacher scores the columns of each anchor, first the batch's; None if there is none.
    """

    vectors_BmD: Tensor
    mask_Bm: Tensor
    columns_mask: Tensor | None
    teacher_BL: Tensor | None = None

    def of_all(self, share: Share) -> Neighbours:
        """Return those of all ranks."""
        masks_and_teacher = (
            None if rows is None else share.gather(rows) for rows in (self.columns_mask, self.teacher_BL)
        )
        return Neighbours(share.gather(self.vectors_BmD), share.gather(self.mask_Bm), *masks_and_teacher)


class Objective:
    """Callable on a rank's views of a global batch; what it remembers is in :meth:`state_dict`.

    A function that takes a ``share`` is given the rank's own rows, any other the rows of all ranks.

    Args:
        settings: which objective, and its settings.
        columns: whose global neighbours an anchor is repelled from.
        dimension: width D of the embeddings.
        device: where the views are.

    Attributes:
        views: how many views of a sentence it takes.
        function: computes the loss.
        takes: which of :data:`GIVEN` the function takes.

    Raises:
        SettingsError: there is no such function of the user's, or it cannot be called so; or ``dimensions`` has a width
            above D.
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
        if settings.dimensions is not None and (widest := max(settings.dimensions)) > dimension:
            raise SettingsError(f"{widest} is more than the {dimension} numbers of an embedding of this model",
                                "objective.dimensions")  # fmt: skip
        self.function: Callable[..., tuple[Any, ...]]
        if isinstance(settings, OwnObjective):
            self.function = OwnFunction(settings.name, settings.settings, given=GIVEN)
            self.takes = self.function.takes
        else:
            self.function = getattr(objectives, settings.name)
            self.takes = frozenset(inspect.signature(self.function).parameters) & set(GIVEN)
        self._buffer_KD: Tensor | None = None
        if isinstance(settings, InstanceSmoothing):
            self._buffer_KD = torch.zeros(settings.buffer_size, dimension, device=device)

    def taught(self, settings: Settings) -> bool:
        """Whether it asks for a teacher that this run has: an index, which does not know negatives that were given."""
        return "teacher" in self.takes and settings.negatives.source != "none" and not settings.corpus.negative_columns

    def __call__(
        self,
        views: Sequence[Tensor],
        neighbours: Neighbours | None = None,
        *,
        batch_mask: Tensor | None = None,
        share: Share = objectives.WHOLE,
        step: int,
        total_steps: int,
        generator: torch.Generator,
    ) -> tuple[Tensor, Metrics]:
        """Compute the loss of one global batch; its gradient is this rank's part, the sum over ranks the whole.

        Args:
            views: ``views`` tensors ``[b, D]``, unit-norm rows.
            neighbours: of the anchors, from the whole corpus; what they are used for depends on the objective.
            batch_mask: bool ``[b, B]``, which rows of the batch these may repel; None = all.
            share: which rows of the batch these are.
            step: optimiser steps taken so far.
            total_steps: optimiser steps of the run; schedules of the objective end there.
            generator: decides random pairs; seeded alike on every rank.

        Returns:
            Loss (scalar) and detached metrics, the same on all ranks.
        """
        s = self.settings
        if gathers := "share" not in self.takes:
            own = range(share.start, share.start + len(views[0]))
            views = [share.gather(z) for z in views]
            neighbours = None if neighbours is None else neighbours.of_all(share)
            if batch_mask is None and share.processes > 1:  # another rank may have one, and all gather or none
                batch_mask = torch.ones(len(own), len(views[0]), dtype=torch.bool, device=views[0].device)
                batch_mask.diagonal(own.start).fill_(False)
            batch_mask = None if batch_mask is None else share.gather(batch_mask)
        given = self._given(neighbours) | {"batch_mask": batch_mask, "share": share}
        given |= {"generator": generator, "step": step, "total_steps": total_steps}
        arguments = {name: given[name] for name in self.takes}
        if isinstance(s, InstanceSmoothing):
            arguments |= self._smoothing(s, neighbours, step=step, total_steps=total_steps)
        elif isinstance(s, OwnObjective):
            if arguments.get("negatives") is not None:  # which may have travelled in fewer bits
                arguments["negatives"] = arguments["negatives"].to(views[0].dtype)
            torch.manual_seed(generator.initial_seed())  # whatever else draws from here draws alike on every rank too
        else:
            arguments |= s.model_dump(exclude={"name", "dimensions"})
        compute = self.function
        if s.dimensions is not None:
            compute = partial(objectives.matryoshka, compute, dimensions=s.dimensions)
        loss, metrics, *state = compute(*views, **arguments)
        if gathers:  # every rank has found the whole of it
            loss = share.add(loss / share.processes)
        if state:
            self._buffer_KD = state[0]
        return loss, metrics

    def _given(self, neighbours: Neighbours | None) -> dict[str, Any]:
        """What an objective may ask for of global negatives."""
        if neighbours is None:
            return dict.fromkeys(_OF_NEIGHBOURS) | {"columns": "own"}
        n = neighbours
        found = (n.vectors_BmD, n.mask_Bm, self.columns, n.columns_mask, n.teacher_BL)
        return dict(zip(_OF_NEIGHBOURS, found, strict=True))

    def _smoothing(
        self, s: InstanceSmoothing, neighbours: Neighbours | None, *, step: int, total_steps: int
    ) -> dict[str, Any]:
        weight = s.weight
        if s.weight_start is not None:
            weight = objectives.cosine_ramp(step, total_steps, start=s.weight_start, end=s.weight)
        return {
            "buffer": self._buffer_KD,
            "temperature": s.temperature,
            "group_size": s.group_size,
            "attention_temperature": s.attention_temperature,
            "weight": weight,
            "neighbours": None if neighbours is None else neighbours.vectors_BmD,
            "neighbours_mask": None if neighbours is None else neighbours.mask_Bm,
        }

    def state_dict(self) -> dict[str, Tensor]:
        """What must survive a restart."""
        return {} if self._buffer_KD is None else {"buffer": self._buffer_KD}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Load the state of :meth:`state_dict`."""
        if self._buffer_KD is not None:
            self._buffer_KD = state["buffer"].to(self._buffer_KD.device)
