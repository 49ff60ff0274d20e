"""hncse_ray: contrastive sentence embeddings with hard negatives, distributed on Ray.

The command ``hncse`` and these functions do the same things::

    settings = hncse_ray.load_settings("quickstart", ["train.max_steps=50"])
    result = hncse_ray.train(settings)
    vectors = hncse_ray.load_encoder(result.model).encode(["A sentence."])
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from hncse_ray.config import Settings, load_settings
from hncse_ray.errors import HncseError

if TYPE_CHECKING:
    from hncse_ray.cluster import RunResult, train
    from hncse_ray.encoder import SentenceEncoder, load_encoder

__version__ = "0.1.0"
__all__ = ["HncseError", "RunResult", "SentenceEncoder", "Settings", "load_encoder", "load_settings", "train"]

# torch, transformers and Ray take seconds to import: only what is asked for is loaded.
_LAZY = {
    "RunResult": "hncse_ray.cluster",
    "train": "hncse_ray.cluster",
    "SentenceEncoder": "hncse_ray.encoder",
    "load_encoder": "hncse_ray.encoder",
}


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(import_module(_LAZY[name]), name)
    raise AttributeError(f"module 'hncse_ray' has no attribute {name!r}")
