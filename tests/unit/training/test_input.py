"""Batches that are made while the one before trains: by whom, how many, and what becomes of them."""

from __future__ import annotations

import threading
from concurrent.futures import Future
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from negative_runs import Stopped, carry_out, negatives_settings
from waits import seconds

from hncse_ray.negatives import SourceUnavailable
from hncse_ray.reporting import Event
from hncse_ray.reporting.events import StepsLogged
from hncse_ray.training import loop
from hncse_ray.training.input import Input

Tree = dict[str, Any]


class Maker:
    """Makes strings, and keeps in which thread; ``gate`` holds it back."""

    def __init__(self) -> None:
        self.made: list[tuple[int, str]] = []
        self.gate = threading.Event()
        self.gate.set()

    def __call__(self, number: int, found: Any) -> Any:
        assert self.gate.wait(seconds(30))
        self.made.append((number, threading.current_thread().name.split("_")[0]))
        return f"{number} with {found and found.name}"


def known(name: str, version: str | None = "v") -> Any:
    return SimpleNamespace(name=name, version=version)


def answered(found: Any) -> Future[Any]:
    future: Future[Any] = Future()
    future.set_result(SimpleNamespace(negatives=found))
    return future


def settled(made: Input) -> None:
    made._thread.submit(lambda: None).result(seconds(30))


def test_a_batch_is_made_ahead_and_taken_without_waiting() -> None:
    make = Maker()
    made = Input(make)
    assert made.take(0, None) == "0 with None"  # nobody could have begun it
    made.begin(1, None)
    settled(made)
    assert made.take(1, None) == "1 with None"
    assert make.made == [(0, "MainThread"), (1, "input")]
    window = made.window()
    assert (window.batches, window.waited) == (2, 1) and made.window().batches == 0
    make.gate.clear()
    made.begin(2, None)
    threading.Timer(0.05, make.gate.set).start()
    assert made.take(2, None) == "2 with None" and made.window().waited == 1
    made.close()


def test_what_is_found_is_waited_for_by_nobody() -> None:
    make, nothing, found = Maker(), known("nothing", None), known("hits")
    made, late, lost = Input(make, lambda number: nothing), Future(), Future()  # type: ignore[var-annotated]
    made.begin(1, answered(found))
    made.begin(2, late)
    made.begin(3, lost)
    made.begin(4, None)
    settled(made)  # the thread is free, though two look-ups have not ended
    assert made.take(1, found) == "1 with hits"
    lost.set_exception(SourceUnavailable("away"))
    assert made.take(3, nothing) == "3 with nothing"
    assert made.take(4, known("nothing too", None)) == "4 with nothing"
    assert make.made == [(1, "input"), (4, "input"), (3, "MainThread")]
    late.set_result(SimpleNamespace(negatives=known("late")))
    settled(made)
    assert made.take(2, nothing) == "2 with nothing"  # the ranks have agreed to do without
    assert made.window().batches == 4
    made.close()


def test_closing_neither_waits_nor_leaves_a_thread() -> None:
    make, late = Maker(), Future()  # type: ignore[var-annotated]
    made = Input(make)
    make.gate.clear()
    for number in range(4):
        made.begin(number, None)
    made.begin(4, late)
    made.close()
    late.set_result(SimpleNamespace(negatives=known("late")))
    make.gate.set()
    for thread in made._thread._threads:
        thread.join(seconds(10))
        assert not thread.is_alive()
    assert len(make.made) <= 1


@pytest.mark.parametrize("changes", [("negatives.source=none",), ("negatives.use=fresh",)])
def test_a_run_makes_the_batches_of_the_next_step_alone(
    tree: Tree, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changes: tuple[str, ...]
) -> None:
    begun: list[tuple[int, bool]] = []
    step, really = [0], loop.local_batch

    def local_batch(number: int, *args: Any, **how: Any) -> Any:
        begun.append((number, threading.current_thread().name.startswith("input")))
        assert number < (step[0] + 2) * 2
        return really(number, *args, **how)

    def on(event: Event) -> None:
        if isinstance(event, StepsLogged):
            step[0] = event.step
            if event.step == 5:
                raise Stopped

    monkeypatch.setattr(loop, "local_batch", local_batch)
    settings = negatives_settings(tree, "train.accumulation_steps=2", "train.max_steps=6", *changes,
                                  "negatives.prefetch_batches=4", "negatives.refresh_every_steps=null")  # fmt: skip
    run = carry_out(settings, tmp_path, also=on)
    assert [number for number, _ in begun[:2]] == [0, 1] and not begun[0][1]
    assert {number for number, _ in begun} >= set(range(10)) and sum(ahead for _, ahead in begun) >= 6
    assert all(0 <= log.metrics["data/waited"] <= 1 for log in run.logs) and run.logs[0].metrics["data/waited"] == 1
    assert not any(thread.name.startswith("input") and thread.is_alive() for thread in ended())


def ended() -> list[threading.Thread]:
    """All threads, once those that are ending have had their time."""
    for thread in threading.enumerate():
        if thread.name.startswith("input"):
            thread.join(seconds(10))
    return threading.enumerate()
