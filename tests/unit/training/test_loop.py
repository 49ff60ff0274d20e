"""The loop in one process, on a tiny real model: steps, events, resumption, damage, guards, what is exported."""

from __future__ import annotations

import errno
import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import negative_runs
import numpy as np
import pytest
import torch
from mapped import mapped
from negative_runs import Stopped
from safetensors.torch import load_file
from tiny import make_collection

from hncse_ray.config import OBJECTIVES, Settings, load_settings
from hncse_ray.corpus import Corpus, prepare_corpus
from hncse_ray.encoder import load_encoder
from hncse_ray.errors import StorageError, TrainingError
from hncse_ray.evaluation import evaluate_retrieval, read_collection, uniformity
from hncse_ray.reporting import Event, MetricsFile, Notice, RunFinished, RunStarted
from hncse_ray.reporting.events import CheckpointSaved, Evaluated, Sampled, StageProgress, StepsLogged
from hncse_ray.training import EvaluationSets, TrainJob, fit, load_evaluation_sets, loop, step_log
from hncse_ray.training.checkpoint import Request
from hncse_ray.training.evaluator import Measured
from hncse_ray.training.guards import Guards, batch_uniformity
from hncse_ray.training.model_flops import ModelFlops

Tree = dict[str, Any]


class FolderStore(negative_runs.FolderStore):
    """One that may stop the run, fill the disk up, ask for something or fail."""

    def __init__(self, root: Path, *, stop_at_save: int | None = None, full_at: int | None = None) -> None:
        super().__init__(root)
        self.stop_at_save, self.full_at = stop_at_save, full_at
        self.export_error: Exception | None = None
        self.asked, self.requests = 0, dict[int, Request]()  # what is requested, by the times of asking

    @property
    def model(self) -> Path:
        return self.root / "model"

    def save(self, step: int, write: Callable[[Path], None] | None) -> None:
        assert write is not None
        if step == self.stop_at_save:
            raise Stopped

        def write_until_full(folder: Path) -> None:
            write(folder)
            if step == self.full_at:
                raise OSError(errno.ENOSPC, "No space left on device")

        super().save(step, write_until_full)

    def requested(self) -> Request:
        self.asked += 1
        return self.requests.get(self.asked, Request.NOTHING)

    def export(self, write: Callable[[Path], None]) -> None:
        if self.export_error is not None:
            raise self.export_error
        super().export(write)


class ScriptedSets(EvaluationSets):
    """Gives dev scores from a list, one an evaluation; the loop's choices can then be foretold."""

    def __init__(self, dev: Sequence[float]) -> None:
        super().__init__({})
        object.__setattr__(self, "dev", iter(dev))

    def measure(self, encode: object, split: str, metric: str = "") -> Measured:
        return Measured({"pairs/recall@1": next(self.dev) if split == "dev" else 0.0}, {})


def build_job(settings: Settings, sets: EvaluationSets | None = None) -> TrainJob:
    encoder = load_encoder(settings.encoder.model, settings.encoder, seed=settings.run.seed)
    corpus = prepare_corpus(
        settings.corpus,
        tokenize=encoder.token_rows,
        tokenizer_digest=encoder.tokenizer_digest(),
        max_length=settings.encoder.max_length,
    )
    sets = sets or load_evaluation_sets(settings.evaluation, settings.corpus)
    return TrainJob(settings, corpus, encoder, sets)


def run(
    settings: Settings,
    store: FolderStore,
    *,
    stop: tuple[type[Event], int] | None = None,
    sets: EvaluationSets | None = None,
    also: Callable[[Event], None] | None = None,
) -> tuple[list[Event], RunFinished | None]:
    """Fit; ``stop`` ends it when the event of that kind and step has been told (test scores count as kind "test")."""
    events: list[Event] = []

    def emit(event: Event) -> None:
        events.append(event)
        if also is not None:
            also(event)
        if stop is not None and isinstance(event, stop[0]) and event.step == stop[1]:
            raise Stopped

    try:
        return events, fit(build_job(settings, sets), store, emit)
    except Stopped:
        return events, None


def untimed(event: StepsLogged) -> dict[str, float]:
    return {name: value for name, value in event.metrics.items() if name != "data/waited"}


def facts(events: Sequence[Event]) -> dict[tuple[object, ...], object]:
    """What must not hang on interruptions: all that was logged and scored, without the speed."""
    found: dict[tuple[object, ...], object] = {}
    for event in events:
        if isinstance(event, StepsLogged):
            found["log", event.step] = (untimed(event), event.learning_rate)
        elif isinstance(event, Evaluated):
            found["scores", event.split, event.step] = (event.scores, event.is_best)
    return found


def weights(store: FolderStore) -> dict[str, torch.Tensor]:
    return load_file(store.model / "model.safetensors")


def assert_same_weights(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> None:
    assert left.keys() == right.keys()
    for name, value in left.items():
        assert torch.equal(value, right[name]), name


def of(events: Sequence[Event], kind: type[Event]) -> list[Any]:
    return [event for event in events if isinstance(event, kind)]


# ------------------------------------------------------------------------------------------------ how long it runs


@pytest.mark.parametrize(
    ("changes", "steps"),
    [
        (("train.max_steps=5", "train.epochs=3"), 5),
        (("train.epochs=1",), 3),
        (("train.epochs=2",), 6),
        (("train.epochs=0.5",), 2),
        (("train.epochs=0.01",), 1),
        (("train.accumulation_steps=2",), 2),
        (("train.accumulation_steps=3", "train.epochs=2"), 2),
        (("train.batch_size=12", "train.epochs=0.28"), 7),  # 25 * 0.28 is a little more than 7 in floating point
        (("train.batch_size=75", "train.epochs=0.75"), 3),
    ],
)
def test_a_run_takes_the_steps_it_was_asked_for(
    tree: Tree, tmp_path: Path, changes: tuple[str, ...], steps: int
) -> None:
    settings = load_settings(tree, ["train.batch_size=100", "train.max_steps=null", *changes])  # 300 sentences
    events, finished = run(settings, FolderStore(tmp_path))
    assert finished is not None
    assert of(events, RunStarted)[0].total_steps == finished.step == steps
    assert [event.step for event in of(events, StepsLogged)] == list(range(1, steps + 1))


def test_a_trainer_has_nothing_read_around_its_rows(tree: Tree, tmp_path: Path) -> None:
    settings = load_settings(tree, [*BASE, "train.max_steps=1", "train.log_every_steps=1"])
    folder, seen = build_job(settings).corpus.path, set[tuple[str, bool]]()
    run(settings, FolderStore(tmp_path), also=lambda event: seen.update(mapped(folder)))
    assert {(name, True) for name in ("rows-00000.arrow", "hash.i8", "length.i4")} <= seen


def test_every_sentence_of_an_accumulated_step_is_counted(tree: Tree, tmp_path: Path) -> None:
    store = FolderStore(tmp_path)
    run(load_settings(tree, ["train.accumulation_steps=3", "train.max_steps=4"]), store)
    assert json.loads((store.checkpoint(4) / "state.json").read_text())["state"]["sentences"] == 3 * 4 * 16


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_a_short_last_batch_is_trained_on(tree: Tree, tmp_path: Path, objective: str) -> None:
    changes = [f"objective.name={objective}", "train.batch_size=74", "train.max_steps=6"]  # 300 = 4 x 74 + 4
    events, finished = run(load_settings(tree, changes), FolderStore(tmp_path))
    assert finished is not None and finished.step == 6
    assert all(np.isfinite(event.metrics["loss"]) for event in of(events, StepsLogged))


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_rows_of_equal_tokens_are_no_negatives_of_each_other(
    tree: Tree, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, objective: str
) -> None:
    job = build_job(load_settings(tree, [f"objective.name={objective}", "train.max_steps=2", "train.batch_size=16"]))
    contents = Corpus.contents
    monkeypatch.setattr(Corpus, "contents", lambda corpus, ids: np.zeros_like(contents(corpus, ids)))
    events: list[Event] = []
    fit(job, FolderStore(tmp_path), events.append)
    assert [event.metrics["loss"] for event in of(events, StepsLogged)] == [0, 0]  # an anchor has no other column


def test_batches_need_not_be_bucketed_by_length(tree: Tree, tmp_path: Path) -> None:
    losses = {}
    for choice in ("true", "false"):
        settings = load_settings(tree, [f"train.bucket_by_length={choice}", "train.max_steps=4"])
        events, _ = run(settings, FolderStore(tmp_path / choice))
        losses[choice] = [event.metrics["loss"] for event in of(events, StepsLogged)]
    assert len(losses["false"]) == 4 and losses["true"] != losses["false"]


def test_two_runs_of_the_same_settings_are_the_same_and_another_seed_is_not(tree: Tree, tmp_path: Path) -> None:
    first, second, other = (
        facts(run(load_settings(tree, [f"run.seed={seed}", "train.max_steps=4"]), FolderStore(tmp_path / name))[0])
        for name, seed in (("a", 3), ("b", 3), ("c", 4))
    )
    assert first == second
    assert first["log", 1] != other["log", 1]


# ------------------------------------------------------------------------------------------------ events


def test_events_come_in_order(tree: Tree, tmp_path: Path) -> None:
    settings = load_settings(tree, ["train.log_every_steps=3", "train.max_steps=9"])
    events, finished = run(settings, FolderStore(tmp_path))
    events = [event for event in events if not isinstance(event, Sampled | StageProgress)]
    order = [(type(event).__name__, getattr(event, "split", ""), event.step) for event in events]
    # A checkpoint is told of when it is whole: at a line of the log, at the latest before the next, or the end.
    told = [i for i, event in enumerate(events) if isinstance(event, CheckpointSaved)]
    assert [order[i][2] for i in told] == [4, 8, 9]
    at = order.index
    assert at(("Evaluated", "dev", 4)) < told[0] < at(("StepsLogged", "", 9)) and at(("Evaluated", "dev", 8)) < told[1]
    assert at(("Evaluated", "dev", 9)) < told[2] < next(i for i, found in enumerate(order) if found[0] == "Verdict")
    assert [found for found in order if found[0] != "CheckpointSaved"] == [
        ("RunStarted", "", 0),
        ("Evaluated", "dev", 0),
        ("StepsLogged", "", 3),
        ("StepsLogged", "", 4),  # before an evaluation and a checkpoint, whatever log_every_steps says
        ("Evaluated", "dev", 4),
        ("StepsLogged", "", 6),
        ("StepsLogged", "", 8),
        ("Evaluated", "dev", 8),
        ("StepsLogged", "", 9),
        ("Evaluated", "dev", 9),
        ("Verdict", "", finished.best_step if finished else -1),
        ("Evaluated", "test", finished.best_step if finished else -1),
    ]
    started = of(events, RunStarted)[0]
    assert (started.run, started.sentences, started.batch_size, started.num_workers) == ("small", 300, 16, 1)
    assert not started.resumed and started.precision == "fp32 (as set), rows packed" and started.device == "cpu"


@pytest.mark.parametrize(("every", "steps"), [(4, [0, 4, 8, 12]), (5, [0, 5, 10, 12]), (100, [0, 12])])
def test_dev_is_scored_when_due_and_once_at_the_last_step(
    tree: Tree, tmp_path: Path, every: int, steps: list[int]
) -> None:
    events, _ = run(load_settings(tree, [f"train.evaluate_every_steps={every}"]), FolderStore(tmp_path))
    assert [event.step for event in of(events, Evaluated) if event.split == "dev"] == steps


def test_each_step_is_taken_at_its_own_learning_rate(tree: Tree, tmp_path: Path) -> None:
    settings = load_settings(tree, ["train.warmup_steps=2", "train.max_steps=6"])
    events, _ = run(settings, FolderStore(tmp_path))
    rates = [event.learning_rate for event in of(events, StepsLogged)]
    assert rates == pytest.approx([1e-3 * f for f in (1 / 3, 2 / 3, 1, 3 / 4, 2 / 4, 1 / 4)])


def test_the_loss_goes_down(tree: Tree, tmp_path: Path) -> None:
    events, _ = run(load_settings(tree, ["train.max_steps=20", "objective.name=info_nce"]), FolderStore(tmp_path))
    losses = [event.metrics["loss"] for event in of(events, StepsLogged)]
    assert np.mean(losses[-5:]) < np.mean(losses[:5])


# ------------------------------------------------------------------------------------------------ resumption

BASE = ("train.evaluate_every_steps=3",)
STOPS: dict[str, dict[str, Any]] = {
    "before the first checkpoint": {"stop": (StepsLogged, 2)},
    "after an evaluation, before its checkpoint": {"stop": (Evaluated, 3)},
    "right after a checkpoint": {"stop": (CheckpointSaved, 4)},
    "between two checkpoints": {"stop": (StepsLogged, 7)},
    "while a checkpoint is due": {"stop_at_save": 8},
    "after the last step": {"stop": (StepsLogged, 12)},
    "before the export": {"export": Stopped()},
}
VARIANTS: dict[str, tuple[str, ...]] = {
    "instance_smoothing": (
        "objective.name=instance_smoothing",
        "objective.buffer_size=32",
        "objective.group_size=4",
        "objective.weight=2",
        "objective.weight_start=0.5",
    ),
    "three_view": ("objective.name=three_view",),
    "an objective of one's own, at several widths": (
        "objective={name: own_losses:noisy, settings: {noise: 0.3}, dimensions: [16, 8]}",
        "train.grad_cache_chunk_size=5",
    ),
    "accumulation": ("train.accumulation_steps=2", "train.schedule=cosine", "train.warmup_steps=3"),
    "gradient caching": ("train.grad_cache_chunk_size=5",),
    "a head in training only": ("encoder.head=tanh", "encoder.pooling=cls"),
    "logs of several steps": ("train.log_every_steps=5", "train.weight_decay=0.1"),
    "several epochs": ("train.batch_size=74", "train.bucket_by_length=false"),
}


def stopped(settings: Settings, root: Path, how: dict[str, Any]) -> tuple[list[Event], FolderStore]:
    store = FolderStore(root, stop_at_save=how.get("stop_at_save"))
    store.export_error = how.get("export")
    events, finished = run(settings, store, stop=how.get("stop"))
    assert finished is None
    return events, FolderStore(root)


def assert_taken_up(settings: Settings, tmp_path: Path, how: dict[str, Any], whole: Any = None) -> list[Event]:
    expected_events, expected, expected_store = whole or never_stopped(settings, tmp_path / "whole")
    before, store = stopped(settings, tmp_path / "stopped", how)
    after, finished = run(settings, store)
    expected_facts = facts(expected_events)
    assert facts(before).items() <= expected_facts.items()
    assert facts(before) | facts(after) == expected_facts
    assert facts(after).items() <= expected_facts.items()
    assert finished is not None
    assert [finished.step, finished.best_step, finished.before, finished.after] == [
        expected.step, expected.best_step, expected.before, expected.after,
    ]  # fmt: skip
    assert_same_weights(weights(store), weights(expected_store))
    return after


def never_stopped(settings: Settings, root: Path) -> tuple[list[Event], RunFinished, FolderStore]:
    store = FolderStore(root)
    events, finished = run(settings, store)
    assert finished is not None
    return events, finished, store


@pytest.fixture(scope="module")
def kept() -> dict[str, Any]:
    """The uninterrupted run of the base settings, made once."""
    return {}


@pytest.mark.parametrize("stop", STOPS)
def test_a_stopped_run_goes_on_bit_for_bit(
    tree: Tree, tmp_path: Path, stop: str, kept: dict[str, Any], tmp_path_factory: pytest.TempPathFactory
) -> None:
    settings = load_settings(tree, BASE)
    if "whole" not in kept:
        kept["whole"] = never_stopped(settings, tmp_path_factory.mktemp("whole"))
    after = assert_taken_up(settings, tmp_path, STOPS[stop], kept["whole"])
    step = {"before": 0, "after an": 0, "right": 4, "between": 4, "while": 4}
    expected = next((value for key, value in step.items() if stop.startswith(key) and "export" not in stop), None)
    expected = {"after the last step": 8, "before the export": 12}.get(stop, expected)
    assert of(after, RunStarted)[0].step == expected
    assert of(after, RunStarted)[0].resumed == (expected != 0)


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_kind_of_run_goes_on_bit_for_bit(tree: Tree, tmp_path: Path, variant: str) -> None:
    settings = load_settings(tree, [*BASE, *VARIANTS[variant]])
    step = 10 if variant == "logs of several steps" else 7
    assert_taken_up(settings, tmp_path, {"stop": (StepsLogged, step)})


def test_the_smoothing_buffer_is_at_work_when_its_run_is_taken_up(tree: Tree, tmp_path: Path) -> None:
    settings = load_settings(tree, VARIANTS["instance_smoothing"])
    _, store = stopped(settings, tmp_path, {"stop": (StepsLogged, 7)})
    after, _ = run(settings, store)
    assert of(after, StepsLogged)[0].step == 5
    assert of(after, StepsLogged)[0].metrics["smoothing_active"] == 1


def test_a_run_stopped_again_and_again_goes_on_bit_for_bit(tree: Tree, tmp_path: Path) -> None:
    settings = load_settings(tree, BASE)
    expected_events, _, expected_store = never_stopped(settings, tmp_path / "whole")
    store, found = FolderStore(tmp_path / "stopped"), {}
    for stop in ((StepsLogged, 1), (StepsLogged, 5), (StepsLogged, 7), (Evaluated, 9), None):
        events, _ = run(settings, store, stop=stop)
        found |= facts(events)
    assert found == facts(expected_events)
    assert_same_weights(weights(store), weights(expected_store))


@pytest.mark.parametrize("stop", ["between two checkpoints", "before the export"])
def test_the_metrics_file_of_a_stopped_run_is_that_of_one_never_stopped(tree: Tree, tmp_path: Path, stop: str) -> None:
    def rows(path: Path) -> list[dict[str, object]]:
        found = [json.loads(line) for line in path.read_text().splitlines()]
        return [
            {key: value for key, value in row.items() if key not in ("sentences_per_s", "data/waited")} for row in found
        ]

    settings = load_settings(tree, BASE)
    run(settings, FolderStore(tmp_path / "whole"), also=MetricsFile(tmp_path / "whole.jsonl").on)
    store = FolderStore(tmp_path / "stopped")
    store.export_error = STOPS[stop].get("export")
    run(settings, store, stop=STOPS[stop].get("stop"), also=MetricsFile(tmp_path / "stopped.jsonl").on)
    run(settings, FolderStore(tmp_path / "stopped"), also=MetricsFile(tmp_path / "stopped.jsonl").on)
    assert rows(tmp_path / "stopped.jsonl") == rows(tmp_path / "whole.jsonl")


def test_a_finished_run_taken_up_again_exports_the_same_model(tree: Tree, tmp_path: Path) -> None:
    settings = load_settings(tree, BASE)
    _, first, store = never_stopped(settings, tmp_path)
    before = weights(store)
    events, again = run(settings, store)
    assert again is not None and again.after == first.after
    assert not of(events, StepsLogged)
    assert_same_weights(weights(store), before)


# ------------------------------------------------------------------------------------------------ damage


def truncate(folder: Path) -> None:
    path = folder / "encoder.safetensors"
    path.write_bytes(path.read_bytes()[:1000])


def flip(name: str) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        content = bytearray((folder / name).read_bytes())
        content[len(content) // 2] ^= 1
        (folder / name).write_bytes(content)

    return change


def change_state(old: str, new: str) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        text = (folder / "state.json").read_text()
        assert old in text
        (folder / "state.json").write_text(text.replace(old, new, 1))

    return change


DAMAGES: dict[str, Callable[[Path], None]] = {
    "truncated weights": truncate,
    "a flipped bit in the weights": flip("encoder.safetensors"),
    "a flipped bit in the moments": flip("training.safetensors"),
    "a flipped bit in the best weights": flip("best.safetensors"),
    "no weights": lambda folder: (folder / "encoder.safetensors").unlink(),
    "no state": lambda folder: (folder / "state.json").unlink(),
    "an empty state": lambda folder: (folder / "state.json").write_text(""),
    "a state that is no object": lambda folder: (folder / "state.json").write_text("[1]"),
    "a state that lists no files": lambda folder: (folder / "state.json").write_text('{"state": {}, "files": []}'),
    "a flipped bit in the state": change_state('"step": 8', '"step": 9'),
}


@pytest.fixture(scope="module")
def stopped_at_ten(tmp_path_factory: pytest.TempPathFactory, kept: dict[str, Any]) -> Callable[[Settings], Path]:
    def make(settings: Settings) -> Path:
        if "ten" not in kept:
            kept["ten"] = tmp_path_factory.mktemp("ten")
            stopped(settings, kept["ten"], {"stop": (StepsLogged, 10)})
            kept["ten whole"] = never_stopped(settings, tmp_path_factory.mktemp("ten_whole"))
        return kept["ten"]

    return make


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_checkpoint_is_passed_over_for_the_one_before(
    tree: Tree, tmp_path: Path, damage: str, stopped_at_ten: Callable[[Settings], Path], kept: dict[str, Any]
) -> None:
    import shutil

    # Rising losses of the dev score are of no interest here: with step 3 as the best, 8 holds best weights apart.
    settings = load_settings(
        tree, ["train.evaluate_every_steps=3", "train.learning_rate=0.1", "train.max_uniformity=0"]
    )
    shutil.copytree(stopped_at_ten(settings), tmp_path / "run")
    store = FolderStore(tmp_path / "run")
    assert [path.name for path in store.checkpoints()] == ["step_000000008", "step_000000004"]
    DAMAGES[damage](store.checkpoint(8))
    events, finished = run(settings, store)
    assert finished is not None
    notices = of(events, Notice)
    assert len(notices) == 1 and "step_000000008" in notices[0].text
    assert of(events, RunStarted)[0].step == 4
    expected_events, _, expected_store = kept["ten whole"]
    assert facts(events).items() <= facts(expected_events).items()
    assert_same_weights(weights(store), weights(expected_store))


def test_a_checkpoint_out_of_turn_is_written_once_and_changes_nothing_else(tree: Tree, tmp_path: Path) -> None:
    settings = load_settings(
        tree, ["train.log_every_steps=2", "train.evaluate_every_steps=4", "train.checkpoint_every_steps=100"]
    )
    in_turn, asked = FolderStore(tmp_path / "in turn"), FolderStore(tmp_path / "asked")
    asked.requests = {2: Request.CHECKPOINT, 3: Request.CHECKPOINT}  # at steps 4, which is scored first, and 6
    courses = [of(run(settings, store)[0], StepsLogged) for store in (in_turn, asked)]
    assert [path.name[-2:] for path in in_turn.checkpoints()] == ["12"]
    assert [path.name[-2:] for path in asked.checkpoints()] == ["12", "06", "04"]
    assert asked.asked == in_turn.asked == 6  # once a line of the log: it is a barrier
    assert [untimed(event) for event in courses[0]] == [untimed(event) for event in courses[1]]


def test_a_run_that_pauses_goes_on_from_there_as_if_it_had_not(tree: Tree, tmp_path: Path) -> None:
    settings = load_settings(
        tree, ["train.log_every_steps=2", "train.evaluate_every_steps=4", "train.checkpoint_every_steps=100"]
    )
    expected_events, _, expected_store = never_stopped(settings, tmp_path / "whole")
    store = FolderStore(tmp_path / "paused")
    store.requests = {
        2: Request.PAUSE,
        6: Request.PAUSE,
    }  # at step 4, which is scored first, and at the last one, too late
    before, paused = run(settings, store)
    assert paused is None and not store.model.exists()
    assert [path.name[-2:] for path in store.checkpoints()] == ["04"]
    after, finished = run(settings, store)
    assert finished is not None and of(after, RunStarted)[0].step == 4
    assert facts(before) | facts(after) == facts(expected_events)
    assert_same_weights(weights(store), weights(expected_store))


def test_a_run_without_a_whole_checkpoint_starts_over(tree: Tree, tmp_path: Path) -> None:
    settings = load_settings(tree, BASE)
    expected_events, _, expected_store = never_stopped(settings, tmp_path / "whole")
    _, store = stopped(settings, tmp_path / "stopped", {"stop": (StepsLogged, 10)})
    for folder in store.checkpoints():
        truncate(folder)
    events, _ = run(settings, store)
    assert len(of(events, Notice)) == 2
    assert of(events, RunStarted)[0].step == 0 and not of(events, RunStarted)[0].resumed
    assert facts(events) == facts(expected_events)
    assert_same_weights(weights(store), weights(expected_store))


@pytest.mark.parametrize(("full_at", "before"), [(8, 4), (12, 8)])  # the last one is found full after the last step
def test_a_full_disk_is_a_storage_error_and_leaves_the_checkpoint_before(
    tree: Tree, tmp_path: Path, full_at: int, before: int
) -> None:
    settings = load_settings(tree, BASE)
    _, _, expected_store = never_stopped(settings, tmp_path / "whole")
    with pytest.raises(StorageError, match="No space left"):
        run(settings, FolderStore(tmp_path / "run", full_at=full_at))
    store = FolderStore(tmp_path / "run")
    kept = {path.name for path in store.root.glob("checkpoints/*")}
    assert max(kept) == f"step_{before:09d}" and len(kept) == before // 4
    events, _ = run(settings, store)
    assert of(events, RunStarted)[0].step == before and not of(events, Notice)
    assert_same_weights(weights(store), weights(expected_store))


def test_a_model_that_cannot_be_written_is_an_error(tree: Tree, tmp_path: Path) -> None:
    store = FolderStore(tmp_path)
    store.export_error = StorageError("No space left")
    with pytest.raises(StorageError, match="No space left"):
        run(load_settings(tree, ["train.max_steps=2"]), store)


# ------------------------------------------------------------------------------------------------ which weights


def best_of(
    tree: Tree, root: Path, dev: Sequence[float], *changes: str
) -> tuple[RunFinished, FolderStore, list[Event]]:
    settings = load_settings(tree, ["train.evaluate_every_steps=2", "train.checkpoint_every_steps=2", *changes])
    store = FolderStore(root)
    events, finished = run(settings, store, sets=ScriptedSets(dev))
    assert finished is not None
    return finished, store, events


def backbone(path: Path) -> dict[str, torch.Tensor]:
    named = load_file(path)
    return {name.removeprefix("model.0.model."): value for name, value in named.items()}


def test_the_best_weights_are_exported_even_if_later_ones_are_worse(tree: Tree, tmp_path: Path) -> None:
    finished, store, events = best_of(tree, tmp_path, [0.1, 0.2, 0.5, 0.5, 0.3, 0.2, 0.1])
    assert finished.best_step == 4  # of equal scores the earlier
    assert finished.after["dev"] == {"pairs/recall@1": 0.5}
    assert [event.is_best for event in of(events, Evaluated) if event.split == "dev"] == [1, 1, 1, 0, 0, 0, 0]
    assert_same_weights(weights(store), backbone(store.checkpoint(4) / "encoder.safetensors"))


def test_the_weights_of_step_zero_can_be_the_best(tree: Tree, tmp_path: Path) -> None:
    settings = load_settings(
        tree, ["train.learning_rate=1", "train.max_uniformity=0", "train.schedule=constant", "objective.name=info_nce"]
    )
    store = FolderStore(tmp_path)
    _, finished = run(settings, store)  # real scores: a learning rate of 1 ruins the model
    assert finished is not None and finished.best_step == 0
    assert finished.after == finished.before
    assert_same_weights(weights(store), load_file(Path(settings.encoder.model) / "model.safetensors"))


def test_the_exported_model_gives_the_scores_that_were_told(tree: Tree, tmp_path: Path) -> None:
    settings = load_settings(tree, BASE)
    _, finished, store = never_stopped(settings, tmp_path)
    sets = load_evaluation_sets(settings.evaluation, settings.corpus)
    model = load_encoder(store.model)
    for split in ("dev", "test"):
        assert sets.score(model.encode, split) == pytest.approx(finished.after[split], abs=1e-6)
    assert load_settings(store.model / "settings.yaml") == settings


def test_without_suites_the_last_weights_are_exported(tree: Tree, tmp_path: Path) -> None:
    settings = load_settings(tree, ["evaluation.suites=[]", "evaluation.metric=none"])
    store = FolderStore(tmp_path)
    _, finished = run(settings, store)
    assert finished is not None and finished.best_step == 12
    assert finished.after == {"dev": {}, "test": {}}
    assert_same_weights(weights(store), backbone(store.checkpoint(12) / "encoder.safetensors"))


def test_without_suites_a_stopped_run_goes_on_bit_for_bit(tree: Tree, tmp_path: Path) -> None:
    settings = load_settings(tree, ["evaluation.suites=[]", "train.evaluate_every_steps=3"])
    assert_taken_up(settings, tmp_path, {"stop": (StepsLogged, 7)})


def test_early_stopping_waits_for_so_many_evaluations_and_no_more(tree: Tree, tmp_path: Path) -> None:
    scores = [0.1, 0.5, 0.4, 0.6, 0.2, 0.6, 0.9]
    finished, store, events = best_of(tree, tmp_path, scores, "train.early_stopping_evaluations=2")
    assert finished.stopped_early
    assert (finished.step, finished.best_step) == (10, 6)
    assert [event.step for event in of(events, Evaluated) if event.split == "dev"] == [0, 2, 4, 6, 8, 10]
    assert_same_weights(weights(store), backbone(store.checkpoint(6) / "encoder.safetensors"))
    assert store.checkpoints()[0].name == "step_000000010"


def test_a_run_that_ends_as_planned_was_not_stopped_early(tree: Tree, tmp_path: Path) -> None:
    finished, _, _ = best_of(tree, tmp_path, [0.1 * i for i in range(7)], "train.early_stopping_evaluations=2")
    assert not finished.stopped_early and finished.step == 12


# ------------------------------------------------------------------------------------------------ what chooses


def test_judged_queries_choose_the_checkpoint_and_others_are_reported(tree: Tree, tmp_path: Path) -> None:
    metric, folder = "retrieval/ndcg@10", make_collection(tmp_path / "tiny")
    settings = load_settings(
        tree, ["evaluation.suites=[retrieval]", f"evaluation.metric={metric}", f"evaluation.collection={folder}"]
    )
    store = FolderStore(tmp_path / "run")
    events, finished = run(settings, store)
    assert finished is not None
    scores = {event.step: event.scores[metric] for event in of(events, Evaluated) if event.split == "dev"}
    assert list(scores) == [0, 4, 8, 12] and finished.best_step == max(scores, key=lambda step: scores[step])
    exported = load_encoder(store.model)
    for split, data in read_collection(folder, ("dev", "test")).items():
        again = evaluate_retrieval(exported.encode, data)
        told = {name.removeprefix("retrieval/"): score for name, score in finished.after[split].items()}
        assert told == pytest.approx(again, abs=0.02)


# ------------------------------------------------------------------------------------------------ guards


@pytest.mark.parametrize("log_every", [1, 4])
def test_a_loss_that_is_no_number_ends_the_run_with_its_step_and_advice(
    tree: Tree, tmp_path: Path, log_every: int
) -> None:
    settings = load_settings(tree, ["objective.temperature=1e-42", f"train.log_every_steps={log_every}"])
    store = FolderStore(tmp_path)
    with pytest.raises(TrainingError, match=rf"at step {log_every}\b.*train\.learning_rate"):
        run(settings, store)
    assert not store.checkpoints() and not store.model.exists()


def test_collapse_ends_the_run(tree: Tree, tmp_path: Path) -> None:
    settings = load_settings(tree, ["train.max_uniformity=-3.99"])  # no batch is as uniform as that
    with pytest.raises(TrainingError, match="collapsed.*step 3.*max_uniformity"):
        run(settings, FolderStore(tmp_path))


def test_the_uniformity_of_a_large_batch_is_that_of_a_sample_of_it() -> None:
    generator = torch.Generator().manual_seed(0)
    z_BD = torch.nn.functional.normalize(torch.randn(4096, 16, generator=generator) + 0.5, dim=-1)
    for rows in (2, 64, 1024):  # of so few, all
        exact = uniformity(z_BD[:rows].numpy())
        assert float(batch_uniformity(z_BD[:rows])) == pytest.approx(exact, abs=1e-5)
    found = batch_uniformity(z_BD)
    assert float(found) == pytest.approx(uniformity(z_BD.numpy()), abs=0.02) and found.device == z_BD.device
    same = z_BD[:1].expand(4096, -1).clone()
    assert float(batch_uniformity(same)) == pytest.approx(0, abs=1e-6)
    same[[0, -1]] = z_BD[[0, 1]]  # the sample goes from the first row to the last
    assert float(batch_uniformity(same)) < -1e-4


def test_the_uniformity_of_a_log_counts_as_training(
    tree: Tree, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    late, clock = [0.0], time.perf_counter

    def slowly(z_BD: torch.Tensor) -> torch.Tensor:
        late[0] += 1e6
        return batch_uniformity(z_BD)

    monkeypatch.setattr(time, "perf_counter", lambda: clock() + late[0])
    monkeypatch.setattr(step_log, "batch_uniformity", slowly)
    events, finished = run(load_settings(tree, ["train.max_steps=3"]), FolderStore(tmp_path))
    speeds = [event.sentences_per_s for event in events if isinstance(event, StepsLogged)]
    assert late[0] == 3e6 and finished is not None
    assert all(16 / speed > 1e6 for speed in [*speeds, finished.sentences_per_s])


def test_the_log_tells_how_much_of_the_peak_training_has(
    tree: Tree, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    events, _ = run(load_settings(tree, ["train.max_steps=4"]), FolderStore(tmp_path / "unknown"))
    assert {event.model_flops_utilisation for event in events if isinstance(event, StepsLogged)} == {None}
    monkeypatch.setattr(loop, "peak_flops", lambda encoder: 1e9)
    also = MetricsFile(tmp_path / "known.jsonl").on
    settings = load_settings(tree, ["train.max_steps=4", "encoder.max_length=8"])
    events, _ = run(settings, FolderStore(tmp_path / "known"), also=also)
    logged = [event for event in events if isinstance(event, StepsLogged)]
    flops = ModelFlops.count(load_encoder(settings.encoder.model))
    most = flops.token * 8 + flops.pair * 64
    for event in logged:
        a_row = (event.model_flops_utilisation or 0.0) * 1e9 / event.sentences_per_s / 2  # two views
        assert most / 4 < a_row <= most * (1 + 1e-9)
    rows = [json.loads(line) for line in (tmp_path / "known.jsonl").read_text().splitlines()]
    found = [row["model_flops_utilisation"] for row in rows if "loss" in row]
    assert found == [event.model_flops_utilisation for event in logged] and found


class TestGuards:
    FINE = {"loss": 1.0, "grad_norm": 1.0, "uniformity": -2.0}

    def guards(self, bound: float = -0.05) -> Guards:
        return Guards(load_settings({"corpus": {"path": "x"}}, [f"train.max_uniformity={bound}"]).train)

    @pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
    @pytest.mark.parametrize("name", ["loss", "grad_norm"])
    def test_what_is_not_finite_is_named(self, name: str, value: float) -> None:
        guards = self.guards()
        guards.check(1, self.FINE)
        with pytest.raises(TrainingError, match=f"{name} is .*at step 2"):
            guards.check(2, self.FINE | {name: value})

    def test_collapse_is_three_logs_in_a_row(self) -> None:
        guards, bad = self.guards(), self.FINE | {"uniformity": -0.01}
        for step, metrics in enumerate((bad, bad, self.FINE, bad, bad)):
            guards.check(step, metrics)
        with pytest.raises(TrainingError, match="uniformity -0.0100 at step 9, above -0.05"):
            guards.check(9, bad)
