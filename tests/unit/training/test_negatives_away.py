"""Runs whose source of global negatives fails, is late or gets old; and runs that are stopped and resumed."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from negative_runs import FolderStore, Run, carry_out, logged, negatives_settings, prepared, stop_at, taken
from safetensors.torch import load_file
from waits import seconds

from hncse_ray.negatives import SourceUnavailable
from hncse_ray.reporting import Event
from hncse_ray.reporting.events import CheckpointSaved, StepsLogged
from hncse_ray.training import negatives as negatives_module
from hncse_ray.training.prefetch import Prefetch

Tree = dict[str, Any]
AWAY, BACK, OLD = "no global negatives for now", "the negative pool answers again", "the index cannot be renewed"


# ------------------------------------------------------------------------------------------------ a source that fails


class StepClock:
    """Counts steps instead of seconds: pauses last 1, 2, 4, ... steps, however busy the machine is."""

    def __init__(self) -> None:
        self.steps = 0

    def __call__(self) -> float:
        return float(self.steps)

    def on(self, event: Event) -> None:
        if isinstance(event, StepsLogged):
            self.steps = event.step


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> StepClock:
    made = StepClock()
    monkeypatch.setattr("hncse_ray.training.prefetch._FIRST_PAUSE_S", 1.0)
    monkeypatch.setattr(negatives_module, "Prefetch", lambda timeout_s: Prefetch(timeout_s, clock=made))
    return made


def disturbed(
    settings: Any, root: Path, clock: StepClock, before: Callable[[str, int], None], also: Any = lambda event: None
) -> Run:
    def on(event: Event) -> None:
        clock.on(event)
        also(event)

    run = prepared(settings)
    run.source.before = before
    carry_out(settings, root, run=run, also=on)
    assert run.finished is not None and run.finished.step == settings.train.max_steps
    assert all(np.isfinite(log.metrics["loss"]) for log in run.logs)
    return run


def failing(method: str, numbers: range) -> Callable[[str, int], None]:
    def before(called: str, number: int) -> None:
        if called == method and number in numbers:
            raise SourceUnavailable(f"{method} of {number}")

    return before


def said(run: Run, what: str) -> list[str]:
    return [text for text in run.notices if what in text]


@pytest.mark.parametrize(
    ("method", "use", "chunk"),
    [("search", "stored", "null"), ("search", "fresh", "null"), ("search", "fresh", "3"), ("vectors", "stored", "3")],
)
def test_training_goes_on_without_a_source_that_is_away_and_uses_it_again(
    tree: Tree, tmp_path: Path, clock: StepClock, method: str, use: str, chunk: str
) -> None:
    changes = ["train.max_steps=15", f"negatives.use={use}", f"train.grad_cache_chunk_size={chunk}"]
    settings = negatives_settings(tree, *changes)
    run = disturbed(settings, tmp_path, clock, failing(method, range(4, 8)))
    # Batch 4 fails: a pause of 1 step. Batch 5 fails: 2 steps, over 6. Batch 7 fails: 4 steps, over 10.
    assert run.series("missing") == [float(4 <= batch <= 10) for batch in range(15)]
    assert len(said(run, AWAY)) == 1 and f"{method} of 4" in said(run, AWAY)[0]
    assert len(said(run, BACK)) == 1 and len(run.notices) == 2
    assert all(usable > 0.5 for usable in [log.metrics.get("negatives/usable", 1) for log in run.logs])


@pytest.mark.parametrize("objective", ["instance_smoothing", "hybrid"])
@pytest.mark.parametrize("columns", ["own", "all"])
def test_objectives_take_batches_without_neighbours(
    tree: Tree, tmp_path: Path, clock: StepClock, objective: str, columns: str
) -> None:
    changes = [f"objective.name={objective}", f"negatives.columns={columns}", "train.max_steps=3"]
    changes.append("objective.group_size=4" if objective == "instance_smoothing" else "objective.k=5")
    run = disturbed(negatives_settings(tree, *changes), tmp_path, clock, failing("search", range(1, 2)))
    assert run.series("missing") == [0, 1, 0]
    if objective == "instance_smoothing":
        assert [log.metrics["smoothing_active"] for log in run.logs] == [1, 0, 1]


def test_a_source_that_never_answers_is_missed_from_the_first_batch_on(
    tree: Tree, tmp_path: Path, clock: StepClock
) -> None:
    run = disturbed(negatives_settings(tree), tmp_path, clock, failing("search", range(1000)))
    assert run.series("missing") == [1] * 12
    assert len(run.notices) == 1 and AWAY in run.notices[0]
    reference = carry_out(negatives_settings(tree), tmp_path / "reference")
    assert run.logs[0].metrics["loss"] < reference.logs[0].metrics["loss"]  # fewer columns


@pytest.mark.parametrize("calls", [1, 2, 3])
def test_a_build_that_cannot_be_asked_for_leaves_the_version_before(
    tree: Tree, tmp_path: Path, clock: StepClock, calls: int
) -> None:
    settings = negatives_settings(tree, "negatives.refresh_every_steps=3", "train.max_steps=13")
    run = disturbed(settings, tmp_path, clock, failing("publish", range(1, 1 + calls)))
    served = [0, 0, 0, *[0 if calls >= n else 3 * n for n in (1, 2, 3) for _ in range(3)], 12]
    for i in range(3, 13):  # a build that has failed is made up for at the next refresh
        assert run.series("index_step")[i] == served[i]
    assert run.series("missing") == [0] * 13
    assert len(said(run, OLD)) == 1


@pytest.mark.parametrize("refresh", ["sync", "async"])
def test_while_nothing_can_be_published_the_run_says_so_once(
    tree: Tree, tmp_path: Path, clock: StepClock, refresh: str
) -> None:
    settings = negatives_settings(tree, f"negatives.refresh={refresh}")
    run = disturbed(settings, tmp_path, clock, failing("publish", range(5)))
    assert run.series("missing")[:5] == [1] * 5 and run.series("missing")[6:] == [0] * 6
    assert not any("negatives/shards_alive" in log.metrics for log in run.logs[:5])  # there is no index to be served
    assert run.logs[-1].metrics["negatives/shards_alive"] == 1
    assert len(said(run, OLD)) == 1
    assert run.notices == said(run, OLD)


@pytest.mark.parametrize(("refresh", "first"), [("sync", 3), ("async", 3)])
def test_while_the_source_cannot_say_how_it_stands_its_neighbours_are_used(
    tree: Tree, tmp_path: Path, clock: StepClock, refresh: str, first: int
) -> None:
    away = range(6, 12)
    run = disturbed(negatives_settings(tree, f"negatives.refresh={refresh}"), tmp_path, clock, failing("status", away))
    assert run.series("missing")[1:] == [0] * 11
    assert len(said(run, OLD)) == 1 and run.notices == said(run, OLD)
    assert {0.0, 1.0} == set(run.series("shards_alive")[1:])
    assert run.source.calls["status"] > 2 * len(away)


def test_a_wait_that_breaks_off_does_not_end_the_run(tree: Tree, tmp_path: Path, clock: StepClock) -> None:
    run = disturbed(negatives_settings(tree), tmp_path, clock, failing("wait", range(2)))
    assert run.series("missing") == [0] * 12
    assert run.series("index_step") == [0] * 6 + [6] * 6
    assert run.notices == said(run, OLD) and 1 <= len(run.notices) <= 2


def test_an_answer_that_does_not_come_in_time_is_done_without(tree: Tree, tmp_path: Path, clock: StepClock) -> None:
    go_on = threading.Event()

    def hold(method: str, number: int) -> None:
        if method == "search" and number in (4, 5):  # both threads
            assert go_on.wait(seconds(60))

    def let_go(event: Event) -> None:
        if isinstance(event, StepsLogged) and event.step == 7:
            go_on.set()

    # One look-up ahead of the batch: nothing else is under way when the two begin to wait.
    limit_s = round(seconds(1), 1)
    settings = negatives_settings(tree, f"negatives.timeout_s={limit_s}", "negatives.prefetch_batches=1")
    run = disturbed(settings, tmp_path, clock, hold, let_go)
    assert run.series("missing")[:4] == [0] * 4 and run.series("missing")[4] == 1
    assert run.series("missing")[8:] == [0] * 4
    assert len(said(run, AWAY)) >= 1 and f"no answer within {limit_s:g} s" in said(run, AWAY)[0]
    assert len(said(run, BACK)) == len(said(run, AWAY))


def test_a_mistake_in_a_look_up_is_not_taken_for_a_source_that_is_away(
    tree: Tree, tmp_path: Path, clock: StepClock
) -> None:
    def broken(method: str, number: int) -> None:
        if method == "search" and number == 3:
            raise ZeroDivisionError("a bug")

    with pytest.raises(ZeroDivisionError, match="a bug"):
        disturbed(negatives_settings(tree), tmp_path, clock, broken)


# ------------------------------------------------------------------------------------------------ old versions


class NeverRenewed:
    """Serves the first version it was given, whatever is published later."""

    def __init__(self, run: Run) -> None:
        self._source = run.source
        self.steps: list[int] = []

    def publish(self, weights: Any, *, step: int, key: str) -> bool:
        self.steps.append(step)
        return len(self.steps) > 1 or self._source.publish(weights, step=step, key=key)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._source, name)


@pytest.mark.parametrize("refresh", ["sync", "async"])
@pytest.mark.parametrize("accumulation", [1, 2])
def test_no_batch_uses_a_version_older_than_the_limit(
    tree: Tree, tmp_path: Path, refresh: str, accumulation: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    changes = ["negatives.max_staleness_steps=4", f"negatives.refresh={refresh}", "negatives.refresh_every_steps=null"]
    settings = negatives_settings(tree, *changes, f"train.accumulation_steps={accumulation}", "train.max_steps=9")
    run = prepared(settings)
    source = NeverRenewed(run)
    with taken(monkeypatch) as batches:
        carry_out(settings, tmp_path, run=run, source=source)
    assert run.finished is not None and run.finished.step == 9
    used = [step for step, found in batches.items() for batch in found if batch.version is not None]
    first = 1 if refresh == "async" else 0  # async does not wait for the first version
    assert used == [step for step in range(first, 5) for _ in range(accumulation)]
    assert not any(batch.mask_bm.any() for step in range(5, 9) for batch in batches[step])
    assert source.steps[:2] == [0, 5]  # a new one was asked for as soon as the first was too old
    assert any("5 steps old (limit 4)" in text for text in run.notices)


def test_without_a_limit_an_old_version_is_used_and_its_age_is_logged(tree: Tree, tmp_path: Path) -> None:
    settings = negatives_settings(tree, "negatives.refresh=async", "negatives.refresh_every_steps=2")
    run = prepared(settings)
    carry_out(settings, tmp_path, run=run, source=NeverRenewed(run))
    assert run.series("missing")[1:] == [0] * 11
    assert run.series("index_age_steps")[1:] == list(range(2, 13))
    assert run.series("index_step")[1:] == [0] * 11


def test_a_limit_shorter_than_the_refresh_renews_the_index_in_time(
    tree: Tree, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with taken(monkeypatch) as batches:
        run = carry_out(negatives_settings(tree, "negatives.max_staleness_steps=4"), tmp_path)
    assert list(run.source.published) == [0, 5, 6, 11]
    assert [found[0].version.step for found in batches.values() if found[0].version] == [0] * 5 + [5] + [6] * 5 + [11]


# ------------------------------------------------------------------------------------------------ resumption

VARIANTS: dict[str, tuple[str, ...]] = {
    "stored": (),
    "fresh": ("negatives.use=fresh",),
    "relative margin": ("negatives.relative_margin=0.03", "train.log_every_steps=3"),
    "accumulation": ("train.accumulation_steps=2", "negatives.prefetch_batches=7"),
    "uniform sampling": ("negatives.sampling=uniform", "negatives.use=fresh", "train.grad_cache_chunk_size=3"),
    "everyone's columns": ("negatives.columns=all", "negatives.sampling=softmax"),
    "smoothing": ("objective.name=instance_smoothing", "objective.group_size=4", "objective.weight=2"),
    "a limit of age": ("negatives.max_staleness_steps=4",),
    "one index": ("negatives.refresh_every_steps=null",),
    "all at once": (
        "negatives.relative_margin=0.03", "train.accumulation_steps=2", "negatives.sampling=uniform",
        "negatives.prefetch_batches=5", "objective.name=hybrid", "objective.k=5", "train.log_every_steps=5",
    ),
}  # fmt: skip


def exported(root: Path) -> dict[str, torch.Tensor]:
    return load_file(root / "model" / "model.safetensors")


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_stopped_run_goes_on_bit_for_bit(tree: Tree, tmp_path: Path, variant: str) -> None:
    """Stopped at 8, when the index is of step 6."""
    settings = negatives_settings(tree, "train.max_steps=14", *VARIANTS[variant])
    whole = carry_out(settings, tmp_path / "whole")
    before = carry_out(settings, tmp_path / "stopped", also=stop_at(CheckpointSaved, 8))
    assert before.finished is None and whole.finished is not None
    assert FolderStore(tmp_path / "stopped").checkpoints()[0].name == "step_000000008"
    after = carry_out(settings, tmp_path / "stopped")
    assert min(logged(after)) > 8 and after.finished is not None
    assert logged(before) | logged(after) == logged(whole)
    assert set(after.notices) <= set(whole.notices)
    removed = whole.series("removed_relative_margin")
    assert (max(removed) > 0) == ("margin" in variant or variant == "all at once")
    expected, found = exported(tmp_path / "whole"), exported(tmp_path / "stopped")
    assert expected.keys() == found.keys()
    assert all(torch.equal(expected[name], found[name]) for name in expected)
    index = 0 if variant == "one index" else 6
    assert list(after.source.published)[0] == index
    original = whole.source.published[index]
    assert all(np.array_equal(after.source.published[index][name], original[name]) for name in original)


class FailsToBuild:
    """Takes the weights of a step, as a pool does, and never serves a version of them."""

    def __init__(self, run: Run, step: int) -> None:
        self._source, self._step = run.source, step

    def publish(self, weights: Any, *, step: int, key: str) -> bool:
        return step == self._step or self._source.publish(weights, step=step, key=key)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._source, name)


def test_a_run_stopped_after_a_build_that_failed_goes_on_with_the_version_before(tree: Tree, tmp_path: Path) -> None:
    def carried_out(root: Path, also: Callable[[Event], None] = lambda event: None) -> Run:
        run = prepared(settings)
        return carry_out(settings, root, run=run, source=FailsToBuild(run, 6), also=also)

    settings = negatives_settings(tree, "train.max_steps=14")
    whole, before = carried_out(tmp_path / "whole"), carried_out(tmp_path / "stopped", stop_at(CheckpointSaved, 8))
    after = carried_out(tmp_path / "stopped")
    assert whole.series("index_step") == [0] * 12 + [12] * 2
    assert logged(before) | logged(after) == logged(whole)


def test_in_async_a_stopped_run_goes_on_from_a_new_index(tree: Tree, tmp_path: Path) -> None:
    settings = negatives_settings(tree, "negatives.refresh=async")
    carry_out(settings, tmp_path, also=stop_at(CheckpointSaved, 8))
    after = carry_out(settings, tmp_path)
    assert after.finished is not None and list(after.source.published) == [8]
    assert after.series("missing") == [1, 0, 0, 0]
