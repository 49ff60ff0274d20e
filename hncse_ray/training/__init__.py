"""Training: a gather that carries gradient, one optimiser step, the loop, checkpoints; no Ray."""

from hncse_ray.training.checkpoint import RunStore, TrainState
from hncse_ray.training.evaluator import EvaluationSets, load_evaluation_sets
from hncse_ray.training.loop import Emit, TrainJob, fit
from hncse_ray.training.senteval import senteval_folder

__all__ = [
    "Emit",
    "EvaluationSets",
    "RunStore",
    "TrainJob",
    "TrainState",
    "fit",
    "load_evaluation_sets",
    "senteval_folder",
]
