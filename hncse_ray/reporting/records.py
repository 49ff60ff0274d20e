"""The records in a run's folder: ``metrics.jsonl``, ``samples.jsonl``, TensorBoard's files and ``log.txt``."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from logging.handlers import MemoryHandler
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
def run_log(folder: Path) -> Iterator[Callable[[], None]]:
    """Write what the package logs to ``log.txt`` in a run's folder too.

    Yields:
        Begins the file, with what has been logged until then: a run that is refused before leaves no folder.
    """
    log = logging.FileHandler(folder / "log.txt", encoding="utf-8", delay=True)
    log.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    kept = MemoryHandler(sys.maxsize, flushLevel=sys.maxsize, flushOnClose=False)
    package = logging.getLogger("hncse_ray")
    package.addHandler(kept)
    if package.level == logging.NOTSET:  # the command sets it; a program that uses the package may not
        package.setLevel(logging.INFO)

    def begin() -> None:
        package.addHandler(log)
        package.removeHandler(kept)
        kept.setTarget(log)
        kept.flush()

    try:
        yield begin
    finally:
        package.removeHandler(kept)
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
