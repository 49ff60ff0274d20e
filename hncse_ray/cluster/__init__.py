"""All Ray code: the session, the event channel, the Train launcher, the negative pool, mining, sweeps."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hncse_ray.cluster.launch import RunResult, prepare, train
    from hncse_ray.cluster.mining import MineReport, mine
    from hncse_ray.cluster.session import ray_session
    from hncse_ray.cluster.sweep import SweepResult, tune

__all__ = ["MineReport", "RunResult", "SweepResult", "mine", "prepare", "ray_session", "train", "tune"]

# Every actor is a process that imports its own module: loading all of them for each would take longer than a short run.
_LAZY = {
    "MineReport": "mining",
    "RunResult": "launch",
    "SweepResult": "sweep",
    "mine": "mining",
    "prepare": "launch",
    "ray_session": "session",
    "train": "launch",
    "tune": "sweep",
}


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(import_module(f"hncse_ray.cluster.{_LAZY[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
