"""Training: a gather that carries gradient, one optimiser step, the loop, checkpoints; no Ray."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hncse_ray.training.checkpoint import RunStore, TrainState
    from hncse_ray.training.evaluator import EvaluationSets, load_evaluation_sets
    from hncse_ray.training.loop import TrainJob, fit
    from hncse_ray.training.senteval import senteval_folder

__all__ = [
    "EvaluationSets",
    "RunStore",
    "TrainJob",
    "TrainState",
    "fit",
    "load_evaluation_sets",
    "senteval_folder",
]

# A run is claimed, and refused if it must be, before the encoder's libraries are imported, which takes seconds.
_LAZY = {
    "EvaluationSets": "evaluator",
    "RunStore": "checkpoint",
    "TrainJob": "loop",
    "TrainState": "checkpoint",
    "fit": "loop",
    "load_evaluation_sets": "evaluator",
    "senteval_folder": "senteval",
}


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(import_module(f"{__name__}.{_LAZY[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
