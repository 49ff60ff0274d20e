"""What happens in a run, as plain facts: a reporter receives these and never the trainer."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal


@dataclass(frozen=True)
class StageProgress:
    """Work outside the training steps (preparing, encoding): ``done`` of ``total`` items, if that is known."""

    stage: str
    done: int
    total: int | None


@dataclass(frozen=True)
class RunStarted:
    """Training begins, or goes on, at ``step`` of ``total_steps``."""

    run: str
    step: int
    total_steps: int
    sentences: int
    batch_size: int
    num_workers: int
    device: str
    precision: str
    resumed: bool


@dataclass(frozen=True)
class StepsLogged:
    """Means over the optimiser steps since the last such event.

    Attributes:
        step: optimiser steps taken.
        metrics: ``loss``, ``grad_norm``, the objective's own metrics, ``uniformity``.
        learning_rate: of the last step.
        sentences_per_s: anchors trained on a second, over all workers; evaluation and waits for an index are left out.
    """

    step: int
    metrics: dict[str, float]
    learning_rate: float
    sentences_per_s: float


@dataclass(frozen=True)
class Evaluated:
    """The encoder was scored on one split; scores by ``suite/metric``."""

    step: int
    split: Literal["dev", "test"]
    scores: dict[str, float]
    metric: str
    is_best: bool


@dataclass(frozen=True)
class CheckpointSaved:
    """A checkpoint is complete in storage."""

    step: int
    seconds: float


@dataclass(frozen=True)
class Notice:
    """Something a user should read: a warning or a remark."""

    text: str


@dataclass(frozen=True)
class RunFinished:
    """The run is over and its model exported."""

    step: int
    best_step: int
    sentences_per_s: float
    stopped_early: bool
    before: dict[str, dict[str, float]] = field(default_factory=dict)
    after: dict[str, dict[str, float]] = field(default_factory=dict)


Event = StageProgress | RunStarted | StepsLogged | Evaluated | CheckpointSaved | Notice | RunFinished
