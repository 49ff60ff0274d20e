"""A run's numbers as Ray metrics, which every node exports to Prometheus."""

from __future__ import annotations

import re

from ray.util.metrics import Gauge

from hncse_ray.reporting import Event
from hncse_ray.reporting.events import StepsLogged, scalars


class RayMetrics:
    """Sets a gauge ``hncse_<name>`` for every number that is logged, with the run's name as a tag.

    Args:
        run: the run's name.
    """

    def __init__(self, run: str) -> None:
        self._run = run
        self._gauges: dict[str, Gauge] = {}

    def on(self, event: Event) -> None:
        """Take over the event's numbers."""
        numbers = scalars(event)
        if isinstance(event, StepsLogged):
            numbers["step"] = event.step
        for name, value in numbers.items():
            self._gauge(name.removeprefix("train/")).set(value)

    def close(self) -> None:
        """Nothing to close: gauges end with the process."""

    def _gauge(self, name: str) -> Gauge:
        if name not in self._gauges:
            gauge = Gauge("hncse_" + re.sub(r"\W", "_", name), description=name, tag_keys=("run",))
            gauge.set_default_tags({"run": self._run})
            self._gauges[name] = gauge
        return self._gauges[name]
