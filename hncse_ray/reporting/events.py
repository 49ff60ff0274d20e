"""What happens in a run, as plain facts: a reporter receives these and never the trainer."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal


@dataclass(frozen=True)
class StageProgress:
    """Work outside the training steps (preparing, encoding): ``done`` of ``total`` items, if that is known."""

    stage: str
    done: int
    total: int | None


@dataclass(frozen=True)
class RunStarted:
    """Training begins, or goes on, at ``step`` of ``total_steps``.

    Attributes:
        sentences: rows of the corpus; ``rows_are`` says what people call them.
        renews_index: whether global negatives come from an index that follows the model.
    """

    run: str
    step: int
    total_steps: int
    sentences: int
    batch_size: int
    num_workers: int
    device: str
    precision: str
    resumed: bool
    rows_are: str = "sentences"
    renews_index: bool = False


@dataclass(frozen=True)
class StepsLogged:
    """Means over the optimiser steps since the last such event.

    Attributes:
        step: optimiser steps taken.
        metrics: ``loss``, ``grad_norm``, the objective's own metrics, ``uniformity``.
        learning_rate: of the last step.
        sentences_per_s: anchors trained on a second, over all workers; evaluation and waits for an index are left out.
        model_flops_utilisation: share of the GPUs' peak that training's products have; None where that is not known.
    """

    step: int
    metrics: dict[str, float]
    learning_rate: float
    sentences_per_s: float
    model_flops_utilisation: float | None = None

    @property
    def numbers(self) -> dict[str, float]:
        """All of its numbers by name."""
        speeds = {"sentences_per_s": self.sentences_per_s}
        if self.model_flops_utilisation is not None:
            speeds["model_flops_utilisation"] = self.model_flops_utilisation
        return self.metrics | {"learning_rate": self.learning_rate} | speeds


@dataclass(frozen=True)
class Evaluated:
    """The encoder was scored on one split; scores by ``suite/metric``."""

    step: int
    split: Literal["dev", "test"]
    scores: dict[str, float]
    metric: str
    is_best: bool


@dataclass(frozen=True)
class Sampled:
    """Something to look at: cosines of pairs, sentences and their neighbours; what is in ``facts`` hangs on ``kind``.

    Attributes:
        step: optimiser steps taken.
        kind: ``similarities``, ``sentences`` or ``negatives``; see :mod:`hncse_ray.training.sample`.
        facts: plain values.
    """

    step: int
    kind: Literal["similarities", "sentences", "negatives"]
    facts: dict[str, Any]


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
class Verdict:
    """What is exported, and what dev says of it.

    Attributes:
        step: whose weights are the trained ones; 0 if none was better than the base.
        merge: their share; the base has the rest. 0 is the base itself.
        whiten: power of the whitening behind them; 0 is none.
        metric: that judged; None where nothing was judged, and no score below is known.
        base: score of the base.
        chosen: score of what is exported.
        low: lower end of the 95 % interval of their difference, by a paired bootstrap; None if it is not known.
        high: its upper end.
        tried: how many candidates were scored for it after training.
    """

    step: int
    merge: float
    whiten: float
    metric: str | None = None
    base: float | None = None
    chosen: float | None = None
    low: float | None = None
    high: float | None = None
    tried: int = 0

    @property
    def is_base(self) -> bool:
        """Whether the model that is exported is the one that the run began with."""
        return self.merge == self.whiten == 0

    @property
    def difference(self) -> float | None:
        """What the exported model scores above the base."""
        return None if self.chosen is None or self.base is None else self.chosen - self.base


@dataclass(frozen=True)
class RunFinished:
    """The run is over and its model exported.

    Attributes:
        step: optimiser steps taken.
        best_step: whose weights scored best on dev.
        sentences_per_s: anchors trained on a second, over all workers.
        stopped_early: whether dev ended it.
        before: scores by split and ``suite/metric`` of the base.
        after: the same of the exported model.
        verdict: what is exported, and what dev says of it.
        seconds: that its phases took, by name.
        whitened_base: scores of the base whitened on the corpus without training, the control of the gain.
        whitened_base_power: of that whitening; 0 where it was not scored.
    """

    step: int
    best_step: int
    sentences_per_s: float
    stopped_early: bool
    before: dict[str, dict[str, float]] = field(default_factory=dict)
    after: dict[str, dict[str, float]] = field(default_factory=dict)
    verdict: Verdict | None = None
    seconds: dict[str, float] = field(default_factory=dict)
    whitened_base: dict[str, dict[str, float]] = field(default_factory=dict)
    whitened_base_power: float = 0.0

    @classmethod
    def read(cls, tree: Mapping[str, Any]) -> RunFinished:
        """Return what ``asdict`` has made a tree.

        Raises:
            ValueError: it is another tree.
        """
        try:
            verdict = (tree := dict(tree)).get("verdict")
            return cls(**{**tree, "verdict": None if verdict is None else Verdict(**verdict)})
        except TypeError as error:
            raise ValueError("it is of another version of hncse_ray") from error


Event = (
    StageProgress | RunStarted | StepsLogged | Evaluated | Sampled | CheckpointSaved | Notice | Verdict | RunFinished
)


def scalars(event: Event) -> dict[str, float]:
    """Return the numbers of an event by name, ``train/loss`` or ``dev/stsb/spearman``; none of most events."""
    match event:
        case StepsLogged():
            return {f"train/{name}": value for name, value in event.numbers.items()}
        case Evaluated():
            return {f"{event.split}/{name}": value for name, value in event.scores.items()}
        case _:
            return {}
