"""How a run's events come from the first training worker to the driver, wherever the two are."""

from __future__ import annotations

import asyncio
import logging
import threading
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import ray
from ray.exceptions import RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from hncse_ray.reporting import Event, Reporter
from hncse_ray.reporting.records import Unfailing

logger = logging.getLogger(__name__)
_POLL_S = 5.0


class EventQueue:
    """Holds events until the driver takes them; a plain class, made an actor where it is launched."""

    def __init__(self) -> None:
        self._events: deque[Event] = deque()
        self._arrived = asyncio.Event()

    async def put(self, event: Event) -> None:
        """Append one event."""
        self._events.append(event)
        self._arrived.set()

    async def wake(self) -> None:
        """Let a waiting :meth:`take` return now."""
        self._arrived.set()

    async def take(self, timeout_s: float) -> list[Event]:
        """Return all events in order; wait up to ``timeout_s`` for the first."""
        try:
            await asyncio.wait_for(self._arrived.wait(), timeout_s)
        except TimeoutError:
            return []
        taken = list(self._events)
        self._events.clear()
        self._arrived.clear()
        return taken


@contextmanager
def event_channel(reporter: Reporter) -> Iterator[Any]:
    """Yield the handle of an event queue; what is put there reaches ``reporter`` from a thread of this process.

    On leaving, events still under way are delivered and the queue's actor ends.
    """
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    queue = ray.remote(EventQueue).options(num_cpus=0, scheduling_strategy=here).remote()
    stop, told = threading.Event(), Unfailing(reporter)

    def deliver() -> None:
        while True:
            last_round = stop.is_set()
            try:
                events = ray.get(queue.take.remote(0.1 if last_round else _POLL_S))
            except RayError as error:
                if not last_round:
                    logger.warning("the event channel is gone; training goes on, nothing of it is shown (%s)", error)
                return
            for event in events:
                told.on(event)
            if last_round and not events:
                return

    thread = threading.Thread(target=deliver, name="events", daemon=True)
    thread.start()
    try:
        yield queue
    finally:
        stop.set()
        queue.wake.remote()
        thread.join(timeout=2 * _POLL_S)
        ray.kill(queue)
