"""Checkpoints are written beside training: as things stood when they were due, one at a time, whole or not at all."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from negative_runs import FolderStore, Stopped, carry_out, logged, negatives_settings, stop_at
from safetensors.torch import load_file
from waits import soon

from hncse_ray.reporting import Event
from hncse_ray.reporting.events import StepsLogged
from hncse_ray.training.run_folder import RunFolder
from hncse_ray.training.store import FolderStore as StoreOfRank

Tree = dict[str, Any]


class HeldStore(FolderStore):
    """Runs ``before(step)`` in the writing thread, and ``after(step)`` when all is written, but not in place."""

    before: Callable[[int], object] = staticmethod(lambda step: None)
    after: Callable[[int], object] = staticmethod(lambda step: None)

    def save(self, step: int, write: Callable[[Path], None] | None) -> None:
        assert write is not None

        def held(folder: Path) -> None:
            write(folder)
            self.after(step)

        self.before(step)
        super().save(step, held)


def test_training_goes_on_and_what_is_written_is_as_it_was(tree: Tree, tmp_path: Path) -> None:
    """The writing of step 4 begins after step 7, and step 8 waits for it; a run resumed from it is bit-equal."""
    settings = negatives_settings(
        tree, "negatives.source=none", "objective={name: instance_smoothing, buffer_size: 16, group_size: 4}"
    )
    whole = carry_out(settings, tmp_path / "whole")
    store, three_later, seen = HeldStore(tmp_path / "held"), threading.Event(), list[Any]()

    def before(step: int) -> None:
        seen.append((step, three_later.wait(60)))

    def also(event: Event) -> None:
        if isinstance(event, StepsLogged) and event.step == 7:
            three_later.set()
        if isinstance(event, StepsLogged) and event.step == 8:
            raise Stopped

    store.before = before
    stopped = carry_out(settings, store.root, store=store, also=also)
    assert seen == [(4, True)] and [path.name for path in store.checkpoints()] == ["step_000000004"]
    after = carry_out(settings, store.root)
    assert logged(stopped) | logged(after) == logged(whole) and min(logged(after)) == 5
    ends = [load_file(root / "model/model.safetensors") for root in (tmp_path / "whole", store.root)]
    assert all(torch.equal(ends[0][name], ends[1][name]) for name in ends[0])


def test_a_run_that_ends_in_an_error_finishes_what_it_writes(tree: Tree, tmp_path: Path) -> None:
    store, written = HeldStore(tmp_path), list[int]()

    def after(step: int) -> None:
        time.sleep(0.5)
        written.append(step)

    store.after = after
    carry_out(negatives_settings(tree, "negatives.source=none"), tmp_path, store=store, also=stop_at(StepsLogged, 5))
    assert written == [4] and [path.name for path in tmp_path.glob("checkpoints/*")] == ["step_000000004"]


def test_a_process_killed_while_it_writes_leaves_the_one_before_whole(tmp_path: Path) -> None:
    def write(text: str) -> Callable[[Path], None]:
        return lambda folder: (folder / "encoder.safetensors").write_text(text)  # type: ignore[return-value]

    def write_half(folder: Path) -> None:
        (folder / "encoder.safetensors").write_text("ha")
        time.sleep(600)

    child = os.fork()
    if not child:
        with StoreOfRank(RunFolder(tmp_path), print) as store:
            store.save(4, write("four"))
            store.save(8, write_half)
        os._exit(1)
    soon(lambda: list(tmp_path.glob("checkpoints/.step_000000008.*/*")), within_s=30, what="half of a checkpoint")
    os.kill(child, signal.SIGKILL)
    assert os.waitpid(child, 0)[1] == signal.SIGKILL
    with StoreOfRank(RunFolder(tmp_path), print) as store:
        (kept,) = store.checkpoints()
        assert kept.name == "step_000000004" and (kept / "encoder.safetensors").read_text() == "four"
        store.save(7, write("seven"))  # out of turn: nothing of that name was begun before
    names = sorted(path.name for path in tmp_path.glob("checkpoints/*"))
    assert names == ["step_000000004", "step_000000007"]
