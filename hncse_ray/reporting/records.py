"""The records in a run's folder: ``metrics.jsonl``, ``samples.jsonl``, TensorBoard's files and ``log.txt``."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from hncse_ray.reporting.events import Event
from hncse_ray.reporting.reporters import MetricsFile, Reporter, Reporters, SamplesFile, TensorBoard

logger = logging.getLogger(__name__)

METRICS, SAMPLES = "metrics.jsonl", "samples.jsonl"


@contextmanager
def run_records(folder: Path, *others: Reporter) -> Iterator[Reporter]:
    """Open a run's metrics on disk. Rank 0 writes them, as it writes the checkpoints, not the driver.

    So what a checkpoint has seen is in them, even if the driver was killed and the workers got a little further.

    Args:
        folder: of the run.
        others: reporters that receive the same events.
    """
    kept: list[Reporter] = [
        MetricsFile(folder / METRICS),
        SamplesFile(folder / SAMPLES),
        TensorBoard(folder / "tensorboard"),
    ]
    files = Reporters([*kept, *others])
    try:
        yield files
    finally:
        files.close()


@contextmanager
def run_log(folder: Path) -> Iterator[None]:
    """Write what the package logs to ``log.txt`` in a run's folder too."""
    log = logging.FileHandler(folder / "log.txt", encoding="utf-8")
    log.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    package = logging.getLogger("hncse_ray")
    package.addHandler(log)
    if package.level == logging.NOTSET:  # the command sets it; a program that uses the package may not
        package.setLevel(logging.INFO)
    try:
        yield
    finally:
        package.removeHandler(log)
        log.close()


class Unfailing:
    """Hands events to a reporter whose failures are only logged.

    A full disk or a closed terminal must not end the news, nor the training.
    """

    def __init__(self, reporter: Reporter) -> None:
        self._reporter = reporter

    def on(self, event: Event) -> None:
        """Hand the event on."""
        try:
            self._reporter.on(event)
        except Exception:
            logger.exception("an event could not be reported")

    def close(self) -> None:
        """Close the reporter."""
        self._reporter.close()
