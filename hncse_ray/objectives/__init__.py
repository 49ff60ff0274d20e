"""The losses: pure functions of unit-norm embeddings, each returning a scalar and its metrics.

Nothing here knows of models, ranks or settings files. Every function takes tensors and plain numbers,
computes in at least fp32 whatever the dtype it is handed, and returns metrics as detached fp32 scalars on
the same device, so that nothing waits for the accelerator.
"""

from hncse_ray.objectives.contrastive import info_nce, three_view
from hncse_ray.objectives.distillation import distillation
from hncse_ray.objectives.matryoshka import matryoshka
from hncse_ray.objectives.mixing import hard_negative_mixing, hybrid, positive_mixing
from hncse_ray.objectives.share import WHOLE, Share
from hncse_ray.objectives.similarity import Columns, Metrics
from hncse_ray.objectives.smoothing import cosine_ramp, instance_smoothing

__all__ = [
    "WHOLE",
    "Columns",
    "Metrics",
    "Share",
    "cosine_ramp",
    "distillation",
    "hard_negative_mixing",
    "hybrid",
    "info_nce",
    "instance_smoothing",
    "matryoshka",
    "positive_mixing",
    "three_view",
]
