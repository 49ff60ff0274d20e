"""All Ray code: the session, the event channel, the Train launcher."""

from hncse_ray.cluster.session import ray_session
from hncse_ray.cluster.train import RunResult, prepare, train

__all__ = ["RunResult", "prepare", "ray_session", "train"]
