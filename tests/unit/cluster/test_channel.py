"""The event queue as a plain class."""

from __future__ import annotations

import asyncio
import time

from waits import seconds

from hncse_ray.cluster.channel import EventQueue
from hncse_ray.reporting import Notice


def test_events_are_taken_once_and_in_order() -> None:
    async def use() -> None:
        queue, events = EventQueue(), [Notice(str(i)) for i in range(5)]
        for event in events:
            await queue.put(event)
        assert await queue.take(1) == events
        assert await queue.take(0.01) == []
        await queue.put(events[0])
        assert await queue.take(1) == events[:1]

    asyncio.run(use())


def test_taking_from_an_empty_queue_ends_after_the_timeout() -> None:
    async def use() -> None:
        started = time.monotonic()
        assert await EventQueue().take(0.05) == []
        assert 0.04 < time.monotonic() - started < seconds(5)

    asyncio.run(use())


def test_an_event_ends_the_wait_and_so_does_waking() -> None:
    async def use() -> None:
        for rouse, expected in ((lambda q: q.put(Notice("x")), [Notice("x")]), (lambda q: q.wake(), [])):
            queue, started = EventQueue(), time.monotonic()
            waiting = asyncio.create_task(queue.take(seconds(60)))
            await asyncio.sleep(0.01)
            await rouse(queue)
            assert await waiting == expected
            assert time.monotonic() - started < seconds(10)

    asyncio.run(use())


def test_waking_loses_no_event_and_is_forgotten_once_it_was_heard() -> None:
    async def use() -> None:
        queue = EventQueue()
        await queue.put(Notice("a"))
        await queue.wake()
        assert await queue.take(1) == [Notice("a")]
        started = time.monotonic()
        assert await queue.take(0.05) == []
        assert time.monotonic() - started > 0.04

    asyncio.run(use())
