"""All Ray code: the session, the event channel, the Train launcher."""

from hncse_ray.cluster.launch import RunResult, prepare, train
from hncse_ray.cluster.session import ray_session

__all__ = ["RunResult", "prepare", "ray_session", "train"]
