"""What the first rank does or decides alone: others wait for it beyond the limit of a collective, and are told."""

from __future__ import annotations

import datetime
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from negative_runs import FolderStore, negatives_settings, prepared
from rank_parity import free_port

from hncse_ray.config import Settings, load_settings
from hncse_ray.errors import DataError, HncseError, StorageError, TrainingError
from hncse_ray.reporting import Event
from hncse_ray.reporting.events import CheckpointSaved, Evaluated, RunStarted, StepsLogged
from hncse_ray.training import EvaluationSets, TrainJob, distributed, fit, load_evaluation_sets
from hncse_ray.training.guards import Guards

Tree = dict[str, Any]
WORLD = 2
LIMIT_S, LONGER_S = 10.0, 14.0  # of a collective; what a rank does alone
Found = dict[str, Any]


def join(rank: int, port: int) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"tcp://127.0.0.1:{port}",
        rank=rank,
        world_size=WORLD,
        timeout=datetime.timedelta(seconds=LIMIT_S),
    )


def on_ranks(work: Callable[..., None], *args: object, out: Path) -> list[Found]:
    """What ``work(rank, port, out, *args)`` has saved, by rank."""
    mp.spawn(work, (free_port(), str(out), *args), nprocs=WORLD)
    return [torch.load(out / f"{rank}.pt", weights_only=False) for rank in range(WORLD)]


# ------------------------------------------------------------------------------------------------ telling


def fails(kind: type[Exception], text: str) -> Callable[[], None]:
    def work() -> None:
        raise kind(text)

    return work


def outcome(work: Callable[[], object]) -> object:
    try:
        return work()
    except Exception as error:
        return type(error).__name__, str(error), getattr(error, "on_all_ranks", None)


def talk(rank: int, port: int, out: str) -> None:
    join(rank, port)
    from_first, together = distributed.from_first, distributed.raise_together
    big = np.arange(100_000) + rank

    def slow(value: object) -> Callable[[], object]:
        return lambda: time.sleep(LONGER_S) or value

    found: Found = {"small": from_first(slow([rank, "two"])), "none": from_first(lambda: None)}
    found["large"] = from_first(lambda: big)
    found["an error as a value"] = str(from_first(lambda: [DataError("x")])[0])
    found["known"] = outcome(lambda: from_first(fails(StorageError, "is full")))
    found["unknown"] = outcome(lambda: from_first(fails(ZeroDivisionError, "by zero")))
    if rank == WORLD - 1:
        time.sleep(LONGER_S)
    found["gathered"] = distributed.gather_values(rank)
    found["together"] = outcome(lambda: together(DataError("the last") if rank == WORLD - 1 else None))
    found["nothing"] = outcome(lambda: together(None))
    for number in range(200):
        assert from_first(lambda: number * (1 - rank)) == number  # noqa: B023
    group = dist.group.WORLD
    assert group is not None
    dist.barrier()
    found["left"] = [name for name in group.get_group_store().list_keys() if "board/" in name]
    torch.save(found, f"{out}/{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def told(tmp_path_factory: pytest.TempPathFactory) -> list[Found]:
    return on_ranks(talk, out=tmp_path_factory.mktemp("told"))


def test_the_first_rank_s_word_is_taken_by_all_however_long_it_takes(told: list[Found]) -> None:
    for found in told:
        assert found["small"] == [0, "two"] and found["none"] is None
        np.testing.assert_array_equal(found["large"], np.arange(100_000))
        assert found["an error as a value"] == "x"


def test_its_error_is_raised_by_all(told: list[Found]) -> None:
    assert all(found["known"] == ("StorageError", "is full", True) for found in told)
    assert told[0]["unknown"][:2] == ("ZeroDivisionError", "by zero")
    kind, text, _ = told[1]["unknown"]
    assert kind == "RuntimeError" and "ZeroDivisionError: by zero" in text


def test_an_error_of_any_rank_is_raised_by_all_however_late(told: list[Found]) -> None:
    for found in told:
        assert found["gathered"] == list(range(WORLD))
        assert found["together"] == ("DataError", "the last", True) and found["nothing"] is None


def test_nothing_of_it_is_kept(told: list[Found]) -> None:
    """A run of a million steps says a million things."""
    assert all(found["left"] == [] for found in told)


# ------------------------------------------------------------------------------------------------ whole runs


class RanksStore(FolderStore):
    """Checkpoints in a folder that all ranks see; they are written, and the model is, by the first."""

    def save(self, step: int, write: Callable[[Path], None]) -> None:
        error: StorageError | None = None
        if distributed.rank() == 0:
            try:
                super().save(step, write)
            except StorageError as caught:
                error = caught
        distributed.raise_together(error)


class TwoMinds(EvaluationSets):
    """Dev scores as the ranks' own processors find them."""

    def __init__(self, scores: Sequence[Sequence[float]]) -> None:
        super().__init__({})
        object.__setattr__(self, "dev", iter(scores[distributed.rank()]))

    def score(self, encode: object, split: str) -> dict[str, float]:
        return {"pairs/recall@1": next(self.dev) if split == "dev" else 0.0}


def run_rank(rank: int, port: int, out: str, case: str, settings: Settings) -> None:
    join(rank, port)
    run, root = prepared(settings), Path(out)
    sets: EvaluationSets = load_evaluation_sets(settings.evaluation, settings.corpus)
    events: list[Event] = []

    def emit(event: Event) -> None:
        if case == "full disk" and isinstance(event, StepsLogged) and event.step == 2:
            raise StorageError("cannot be written", "metrics.jsonl", "Free some space")
        events.append(event)

    if case == "long waits":

        def before(method: str, number: int) -> None:
            if (method, number) in (("publish", 0), ("search", 4)):
                time.sleep(LONGER_S)

        run.source.before = before
    if case == "scores":
        sets = TwoMinds([[0.1, 0.2, 0.5, 0.4, 0.3], [0.1, 0.3, 0.2, 0.1, 0.0]])
    if case == "collapse":
        check = Guards.check
        odd = {"uniformity": -2.0} if rank == 0 else {"uniformity": 0.0}
        Guards.check = lambda self, step, metrics: check(self, step, metrics | odd)  # type: ignore[method-assign]
    source = run.source if rank == 0 and settings.negatives.source != "none" else None
    found: Found = {}
    try:
        found["finished"] = fit(
            TrainJob(settings, run.corpus, run.encoder, sets, source=source), RanksStore(root), emit
        )
    except HncseError as error:
        found["error"] = error
    found["events"] = events
    torch.save(found, f"{out}/{rank}.pt")
    dist.destroy_process_group()


def in_one_mind(case: str, settings: Settings, root: Path) -> list[Found]:
    """Each rank's outcome; nothing is told by any but the first."""
    found = on_ranks(run_rank, case, settings, out=root)
    assert found[1]["events"] == []
    return found


def test_waits_for_the_index_may_outlast_a_collective(tree: Tree, tmp_path: Path) -> None:
    """The first build takes longer, and so does the answer for a batch."""
    settings = negatives_settings(tree, "train.max_steps=6", "negatives.timeout_s=600", "cluster.num_workers=2")
    found = in_one_mind("long waits", settings, tmp_path)
    assert [rank["finished"].step for rank in found] == [6, 6] and found[0]["finished"] == found[1]["finished"]
    logs = [event for event in found[0]["events"] if isinstance(event, StepsLogged)]
    assert all(log.metrics["negatives/missing"] == 0 for log in logs)


def test_an_error_of_the_first_rank_in_reporting_ends_the_others_too(tree: Tree, tmp_path: Path) -> None:
    settings = load_settings(tree, ["cluster.num_workers=2"])
    found = in_one_mind("full disk", settings, tmp_path)
    assert [type(rank["error"]) for rank in found] == [StorageError] * 2
    assert all("metrics.jsonl" in str(rank["error"]) and rank["error"].on_all_ranks for rank in found)


def test_rules_that_leave_nothing_are_told_to_all(tree: Tree, tmp_path: Path) -> None:
    settings = negatives_settings(tree, "negatives.max_score=-0.9", "train.max_steps=80", "cluster.num_workers=2")
    found = in_one_mind("", settings, tmp_path)
    assert all(type(rank["error"]) is TrainingError and rank["error"].on_all_ranks for rank in found)


def test_the_first_rank_s_scores_choose_the_best_and_the_end(tree: Tree, tmp_path: Path) -> None:
    changes = ["train.evaluate_every_steps=2", "train.early_stopping_evaluations=2", "cluster.num_workers=2"]
    found = in_one_mind("scores", load_settings(tree, changes), tmp_path)
    first, second = (rank["finished"] for rank in found)
    assert first == second
    assert (first.step, first.best_step, first.stopped_early) == (8, 4, True)
    assert first.after["dev"] == {"pairs/recall@1": 0.5}
    events = [event for event in found[0]["events"] if isinstance(event, Evaluated) and event.split == "dev"]
    assert [event.is_best for event in events] == [True, True, True, False, False]


def test_the_first_rank_s_figures_say_whether_it_has_collapsed(tree: Tree, tmp_path: Path) -> None:
    found = in_one_mind("collapse", load_settings(tree, ["train.max_steps=5", "cluster.num_workers=2"]), tmp_path)
    assert [rank["finished"].step for rank in found] == [5, 5]
    kinds = [type(event) for event in found[0]["events"]]
    assert kinds[0] is RunStarted and kinds.count(StepsLogged) == 5 and CheckpointSaved in kinds
