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
from negative_runs import RanksStore, negatives_settings, prepared
from rank_parity import free_port
from waits import seconds

from hncse_ray.errors import DataError, HncseError, StorageError, TrainingError
from hncse_ray.reporting import Event
from hncse_ray.reporting.events import CheckpointSaved, Evaluated, RunStarted, StepsLogged
from hncse_ray.training import EvaluationSets, TrainJob, distributed, fit, load_evaluation_sets
from hncse_ray.training.evaluator import Measured
from hncse_ray.training.guards import Guards

Found = dict[str, Any]
WORLD = 2
LIMIT_S = seconds(5)  # of a collective
LONGER_S = LIMIT_S + 1.5  # what a rank does alone


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


def talk(rank: int) -> Found:
    from_first, together = distributed.from_first, distributed.raise_together
    big = np.arange(100_000) + rank
    found: Found = {
        "small": from_first(lambda: time.sleep(LONGER_S) or [rank, "two"]),
        "none": from_first(lambda: None),
    }
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
    dist.barrier()
    group = dist.group.WORLD
    assert group is not None
    found["left"] = [name for name in group.get_group_store().list_keys() if "board/" in name]
    return found


@pytest.fixture
def told(ranks: list[Found]) -> list[Found]:
    return [found["told"] for found in ranks]


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


class TwoMinds(EvaluationSets):
    """Dev scores as the ranks' own processors find them."""

    def __init__(self, scores: Sequence[Sequence[float]]) -> None:
        super().__init__({})
        object.__setattr__(self, "dev", iter(scores[distributed.rank()]))

    def measure(self, encode: object, split: str, metric: str = "") -> Measured:
        return Measured({"pairs/recall@1": next(self.dev) if split == "dev" else 0.0}, {})


# by case: what is changed of a small run
CASES = {
    "long build": ["negatives.source=in_process", "negatives.timeout_s=600", "train.max_steps=6"],
    "full disk": [],
    "nothing is left": ["negatives.source=in_process", "negatives.max_score=-0.9", "train.max_steps=80"],
    "scores": ["train.evaluate_every_steps=2", "train.early_stopping_evaluations=2"],
    "collapse": ["train.max_steps=5"],
    "precision": ["negatives.source=in_process", "negatives.columns=all", "train.max_steps=3"],
    "export": [
        "evaluation={suites: [pairs], metric: pairs/recall@1, pairs_dev: unused}",
        "train.evaluate_every_steps=6",
        "export={merge: auto, whiten: auto}",
    ],
}
DEV = {
    "scores": ([0.1, 0.2, 0.5, 0.4, 0.3], [0.1, 0.3, 0.2, 0.1, 0.0]),
    # before, at steps 6 and 12, of three merges, of two whitenings
    "export": ([0.1, 0.2, 0.4, 0.3, 0.5, 0.2, 0.3, 0.6], [0.1, 0.2, 0.4, 0.9, 0.0, 0.0, 0.9, 0.0]),
}


def run(case: str, rank: int, tree: Found, root: Path) -> Found:
    settings = negatives_settings(tree, "negatives.source=none", *CASES[case])
    prepared_run = prepared(settings)
    source = prepared_run.source
    sets = TwoMinds(DEV[case]) if case in DEV else load_evaluation_sets(settings.evaluation, settings.corpus)
    events: list[Event] = []

    def emit(event: Event) -> None:
        if case == "full disk" and isinstance(event, StepsLogged) and event.step == 2:
            raise StorageError("cannot be written", "metrics.jsonl", "Free some space")
        events.append(event)

    if case == "long build":
        source.before = lambda method, number: time.sleep(LONGER_S) if method == "publish" and not number else None
    found: Found = {"events": events}
    if case == "precision":  # what encoder.precision=auto finds on unlike processors
        prepared_run.encoder.autocast = None if rank else torch.bfloat16
    with pytest.MonkeyPatch.context() as patch:
        if case == "collapse":
            check, odd = Guards.check, {"uniformity": -2.0 if rank == 0 else 0.0}
            patch.setattr(Guards, "check", lambda self, step, metrics: check(self, step, metrics | odd))
        job = TrainJob(settings, prepared_run.corpus, prepared_run.encoder, sets, source=source)
        try:
            found["finished"] = fit(job, RanksStore(root / case), emit)
        except HncseError as error:
            found["error"] = error
    return found


def work(rank: int, port: int, out: str, tree: Found) -> None:
    torch.set_num_threads(1)
    address, limit = f"tcp://127.0.0.1:{port}", datetime.timedelta(seconds=LIMIT_S)
    dist.init_process_group("gloo", init_method=address, rank=rank, world_size=WORLD, timeout=limit)
    found = {"told": talk(rank)} | {case: run(case, rank, tree, Path(out)) for case in CASES}
    torch.save(found, f"{out}/{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def ranks(tiny_model: Path, corpus_file: Path, cache_dir: str, tmp_path_factory: pytest.TempPathFactory) -> list[Found]:
    """What every rank has found."""
    out = tmp_path_factory.mktemp("ranks")
    tree = {
        "run": {"name": "small", "storage_path": str(out), "seed": 3},
        "corpus": {"source": "text", "path": str(corpus_file), "cache_dir": cache_dir},
        "encoder": {"model": str(tiny_model), "pooling": "mean", "max_length": 24, "precision": "fp32"},
        "train": {"learning_rate": 1e-3, "max_steps": 12, "log_every_steps": 1},
        "evaluation": {"metric": "pairs/recall@1"},
        "cluster": {"num_workers": WORLD},
    }
    mp.spawn(work, (free_port(), str(out), tree), nprocs=WORLD)
    return [torch.load(out / f"{rank}.pt", weights_only=False) for rank in range(WORLD)]


def of(ranks: list[Found], case: str) -> list[Found]:
    """Each rank's outcome of a run, of which only the first has told anything."""
    found = [rank[case] for rank in ranks]
    assert found[0]["events"] and found[1]["events"] == []
    return found


def test_a_build_of_the_index_may_outlast_a_collective(ranks: list[Found]) -> None:
    found = of(ranks, "long build")
    assert [rank["finished"].step for rank in found] == [6, 6] and found[0]["finished"] == found[1]["finished"]
    logs = [event for event in found[0]["events"] if isinstance(event, StepsLogged)]
    assert len(logs) == 6 and all(log.metrics["negatives/missing"] == 0 for log in logs)


def test_an_error_of_the_first_rank_in_reporting_ends_the_others_too(ranks: list[Found]) -> None:
    found = of(ranks, "full disk")
    assert [type(rank["error"]) for rank in found] == [StorageError] * 2
    assert all("metrics.jsonl" in str(rank["error"]) and rank["error"].on_all_ranks for rank in found)


def test_rules_that_leave_nothing_are_told_to_all(ranks: list[Found]) -> None:
    found = of(ranks, "nothing is left")
    assert all(type(rank["error"]) is TrainingError and rank["error"].on_all_ranks for rank in found)


def test_the_first_rank_s_scores_choose_the_best_and_the_end(ranks: list[Found]) -> None:
    found = of(ranks, "scores")
    first, second = (rank["finished"] for rank in found)
    assert first == second
    assert (first.step, first.best_step, first.stopped_early) == (8, 4, True)
    assert first.after["dev"] == {"pairs/recall@1": 0.5}
    events = [event for event in found[0]["events"] if isinstance(event, Evaluated) and event.split == "dev"]
    assert [event.is_best for event in events] == [True, True, True, False, False]


def test_the_first_rank_s_figures_say_whether_it_has_collapsed(ranks: list[Found]) -> None:
    found = of(ranks, "collapse")
    assert [rank["finished"].step for rank in found] == [5, 5]
    kinds = [type(event) for event in found[0]["events"]]
    assert kinds[0] is RunStarted and kinds.count(StepsLogged) == 5 and CheckpointSaved in kinds


def test_ranks_on_unlike_hardware_train_in_one_precision(ranks: list[Found]) -> None:
    found = of(ranks, "precision")
    assert [rank["finished"].step for rank in found] == [3, 3]
    assert found[0]["events"][0].precision.startswith("fp32 (the hardware of some workers has no bf16)")


def test_the_first_rank_s_scores_choose_what_is_exported(ranks: list[Found]) -> None:
    found = of(ranks, "export")
    first, second = (rank["finished"] for rank in found)
    assert first == second
    assert (first.best_step, first.verdict.merge, first.verdict.whiten) == (12, 0.5, 0.25)
    assert (first.verdict.base, first.verdict.chosen, first.verdict.tried) == (0.1, 0.6, 5)
    assert first.after["dev"] == {"pairs/recall@1": 0.6}
