"""hncse_ray: contrastive sentence embeddings with hard negatives, distributed on Ray.

The command ``hncse`` and these functions do the same things::

    settings = hncse_ray.load_settings("quickstart", ["train.max_steps=50"])
    result = hncse_ray.train(settings)
    vectors = hncse_ray.load_encoder(result.model).encode(["A sentence."])
    board = hncse_ray.evaluate([settings.encoder.model, result.model])

    result = hncse_ray.train(settings, sentences=["A sentence.", "Another one.", ...])  # no file is needed

    sweep = hncse_ray.load_sweep("quickstart", "hncse_full", trials=8)
    found = hncse_ray.tune(sweep, "runs/quickstart-hncse_full")
"""

from __future__ import annotations

import os
from importlib import import_module
from typing import TYPE_CHECKING, Any

from hncse_ray.errors import HncseError

if TYPE_CHECKING:
    from hncse_ray.cluster import RunResult, SweepResult, train, tune
    from hncse_ray.config import Settings, load_settings
    from hncse_ray.encoder import SentenceEncoder, load_encoder
    from hncse_ray.training.scoring import Scoreboard, evaluate
    from hncse_ray.tuning import Sweep, load_sweep

# Read by torch when it is loaded, and by its allocator: set here, and for the processes of a Ray that is joined.
PROCESS_VARIABLES = {
    # OpenMP's threads (GNU's, in PyTorch's wheels) spin for long before they sleep: two trainers, or a trainer and a
    # shard, on the same cores wait for each other's spinning, at a ninth of their speed.
    "GOMP_SPINCOUNT": "1000",
    # Batches have ever new numbers of tokens: blocks of PyTorch's allocator on a GPU grow then, and do not pile up.
    "PYTORCH_ALLOC_CONF": os.environ.get("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True"),
    # On a CPU in bf16 oneDNN, and PyTorch's layer above it, keep what they made for the last 1,024 shapes, a megabyte
    # or so each: more gigabytes than the model. The layers of a step share a few dozen, the next step has others.
    "ONEDNN_PRIMITIVE_CACHE_CAPACITY": "32",
    "LRU_CACHE_CAPACITY": "32",
}
PROCESS_VARIABLES |= {name: os.environ.setdefault(name, value) for name, value in PROCESS_VARIABLES.items()}

__version__ = "0.1.0"
__all__ = [
    "HncseError",
    "RunResult",
    "Scoreboard",
    "SentenceEncoder",
    "Settings",
    "Sweep",
    "SweepResult",
    "evaluate",
    "load_encoder",
    "load_settings",
    "load_sweep",
    "train",
    "tune",
]

# torch, transformers and Ray take seconds to import: only what is asked for is loaded.
_LAZY = {
    "RunResult": "hncse_ray.cluster",
    "SweepResult": "hncse_ray.cluster",
    "train": "hncse_ray.cluster",
    "tune": "hncse_ray.cluster",
    "Settings": "hncse_ray.config",
    "load_settings": "hncse_ray.config",
    "SentenceEncoder": "hncse_ray.encoder",
    "load_encoder": "hncse_ray.encoder",
    "Scoreboard": "hncse_ray.training.scoring",
    "evaluate": "hncse_ray.training.scoring",
    "Sweep": "hncse_ray.tuning",
    "load_sweep": "hncse_ray.tuning",
}


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(import_module(_LAZY[name]), name)
    raise AttributeError(f"module 'hncse_ray' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
