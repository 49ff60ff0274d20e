"""Where a run is trained: with Ray (session, event channel, launcher, pool, mining, sweeps), or in this process."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hncse_ray.cluster.mining import mine
    from hncse_ray.cluster.run import RunResult, train
    from hncse_ray.cluster.session import ray_session
    from hncse_ray.cluster.sweep import SweepResult, tune

__all__ = ["RunResult", "SweepResult", "mine", "ray_session", "train", "tune"]

# Every actor is a process that imports its own module: loading all of them for each would take longer than a short run.
_LAZY = {
    "RunResult": "run",
    "SweepResult": "sweep",
    "mine": "mining",
    "ray_session": "session",
    "train": "run",
    "tune": "sweep",
}


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(import_module(f"hncse_ray.cluster.{_LAZY[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
