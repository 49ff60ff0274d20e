"""Checkpoints are written by a thread while training goes on.

Ray Train's own way (2.60, ``ray.train.report`` with ``CheckpointUploadMode.ASYNC``) copies a folder that is written
already, so the step would still wait for the writing; a failure there counts as a worker's and is tried again; what was
reported is lost if the driver is killed before its controller has asked; and there is none without Ray.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait

from hncse_ray.errors import StorageError
from hncse_ray.reporting.events import CheckpointSaved

logger = logging.getLogger(__name__)


class Saving:
    """Has one checkpoint at a time written."""

    def __init__(self) -> None:
        self._threads = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._under_way: tuple[int, Future[float]] | None = None

    def begin(self, step: int, save: Callable[[], None]) -> None:
        """Begin to write; the one before must be settled."""
        assert self._under_way is None

        def timed() -> float:
            started = time.perf_counter()
            save()
            return time.perf_counter() - started

        self._under_way = step, self._threads.submit(timed)

    def settle(self, *, block: bool) -> CheckpointSaved | None:
        """Return the event of a checkpoint that is whole now, once; None if there is none, or it is being written.

        Args:
            block: wait for the one that is being written.

        Raises:
            StorageError: it could not be written.
        """
        if self._under_way is None or not (block or self._under_way[1].done()):
            return None
        step, future = self._under_way
        wait([future])  # where Ctrl-C may come: then it is still under way
        self._under_way = None
        return CheckpointSaved(step, future.result())

    def close(self) -> None:
        """Leave nothing half-written, whatever has ended the run."""
        try:
            self.settle(block=True)
        except StorageError as error:  # the run has failed with a cause of its own
            logger.warning("%s", error)
        self._threads.shutdown()
