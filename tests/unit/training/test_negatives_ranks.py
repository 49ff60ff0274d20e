"""Global negatives on two ranks: each looks its own anchors up, and what one does not find none uses."""

from __future__ import annotations

import datetime
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from negative_runs import RanksStore, Run, negatives_settings, prepared
from passages import documents_section, make_documents
from rank_parity import free_port
from waits import seconds

from hncse_ray.negatives import SourceUnavailable
from hncse_ray.training import TrainJob, fit, load_evaluation_sets, prefetch
from hncse_ray.training.distributed import rank, world_size

Tree = dict[str, Any]
WORLD, LIMIT_S = 2, 30.0
COMMON = ("train.max_steps=4", "train.batch_size=9", "encoder.dropout=0", "negatives.refresh_every_steps=3",
          "negatives.relative_margin=0.02", "train.learning_rate=1e-4")  # fmt: skip

# What is found and learnt, which one process finds and learns as well.
ALIKE: dict[str, tuple[str, ...]] = {
    "drawn": ("negatives.sampling=softmax", "negatives.use=fresh"),
    "everyone's": ("negatives.columns=all", "negatives.sampling=uniform", "objective.name=hybrid", "objective.k=4"),
    "taught": ("objective.name=distillation", "negatives.score=hybrid", "negatives.sampling=bands",
               "negatives.bands=[2,6]", "negatives.use=fresh", "negatives.columns=all"),
    "own, taught": ("objective.name=distillation", "negatives.relative_margin=null"),
    "masked": ("negatives.mask_batch=true", "negatives.mask_reciprocal=3", "objective.name=own_losses:noisy",
               "objective.settings.noise=0.2"),
    "views": ("views.mix={title: 1, cloze: 2, neighbour: 1}", "views.agreement=4", "negatives.mask_reciprocal=2"),
}  # fmt: skip
# What befalls the second rank alone.
BEFALLS: dict[str, tuple[str, ...]] = {
    "lost": ("train.max_steps=6",),
    "slow": ("train.max_steps=5", f"negatives.timeout_s={seconds(1):.1f}", "negatives.prefetch_batches=1"),
    "taught and lost": (*ALIKE["taught"], "train.max_steps=6", "negatives.timeout_s=20"),
    "given way": ("negatives.refresh=async", "negatives.refresh_every_steps=2", "train.max_steps=6"),
}
TIMED = ("search_ms", "build_", "waited", "age")


def befall(case: str, run: Run) -> None:
    really, go_on = run.source.search, threading.Event()

    def search(row_ids: Any, *, k: int, version: Any = None, **how: Any) -> Any:
        hits = really(row_ids, k=k, version=version, **how)
        number = run.source._looking_up.number
        if case == "given way" and number == 3 and version.step == 0:
            raise SourceUnavailable("the version has given way")
        if case == "slow" and number == 2:
            go_on.wait(seconds(3))
        if case in ("lost", "taught and lost") and number == 2:
            raise SourceUnavailable("a shard is lost")
        return hits

    run.source.search = search  # type: ignore[method-assign]


def carried_out(case: str, changes: tuple[str, ...], tree: Tree, root: Path) -> Run:
    if "views" in case:
        tree = tree | {"corpus": documents_section(root / f"docs{rank()}", make_documents(80), tree["cache"])}
    settings = negatives_settings({k: v for k, v in tree.items() if k != "cache"}, *COMMON, *changes)
    run = prepared(settings)
    if case in BEFALLS and rank() == 1:
        befall(case, run)
    sets = load_evaluation_sets(settings.evaluation, settings.corpus)
    job = TrainJob(settings, run.corpus, run.encoder, sets, source=run.source)
    run.finished = fit(job, RanksStore(root / f"{case} of {world_size()}"), run.events.append)
    return run


def facts(run: Run) -> tuple[list[dict[str, float]], list[str]]:
    logs = [{k: v for k, v in log.metrics.items() if not any(word in k for word in TIMED)} for log in run.logs]
    return logs, run.notices


def work(number: int, port: int, out: str, tree: Tree) -> None:
    torch.set_num_threads(1)
    address, limit = f"tcp://127.0.0.1:{port}", datetime.timedelta(seconds=seconds(LIMIT_S))
    dist.init_process_group("gloo", init_method=address, rank=number, world_size=WORLD, timeout=limit)
    prefetch._FIRST_PAUSE_S = 0.0
    found = {}
    for case, changes in (ALIKE | BEFALLS).items():
        run = carried_out(case, changes, tree, Path(out))
        assert run.finished is not None
        found[case] = facts(run)
    store = dist.group.WORLD.get_group_store()  # type: ignore[union-attr]
    dist.barrier()
    found["left"] = [name for name in store.list_keys() if "board/" in name or "swap/" in name]
    torch.save(found, f"{out}/{number}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def tree(tiny_model: Path, corpus_file: Path, cache_dir: str, tmp_path_factory: pytest.TempPathFactory) -> Tree:
    out = tmp_path_factory.mktemp("negatives")
    for number in range(WORLD):
        (out / f"docs{number}").mkdir()
    return {
        "run": {"name": "small", "storage_path": str(out), "seed": 3},
        "corpus": {"source": "text", "path": str(corpus_file), "cache_dir": cache_dir},
        "encoder": {"model": str(tiny_model), "pooling": "mean", "max_length": 24, "precision": "fp32"},
        "train": {"log_every_steps": 1},
        "cache": cache_dir,
    }


@pytest.fixture(scope="module")
def told(tree: Tree) -> dict[str, Any]:
    """What the first of two ranks has logged and said."""
    out = tree["run"]["storage_path"]
    mp.spawn(work, (free_port(), out, tree), nprocs=WORLD)
    found, second = (torch.load(Path(out) / f"{number}.pt", weights_only=False) for number in range(WORLD))
    assert all(second[case] == ([], []) for case in ALIKE | BEFALLS)
    return found


@pytest.mark.parametrize("case", ALIKE)
def test_two_ranks_find_and_learn_what_one_process_does(case: str, told: dict[str, Any], tree: Tree) -> None:
    alone, _ = facts(carried_out(case, ALIKE[case], tree, Path(tree["run"]["storage_path"])))
    logs, notices = told[case]
    assert notices == [] and len(logs) == 4
    assert logs[0]["loss"] == pytest.approx(alone[0]["loss"], rel=1e-5)
    for found, expected in zip(logs, alone, strict=True):
        assert found == pytest.approx(expected, rel=1e-3, abs=1e-5)
    if case == "masked":
        assert sum(log["negatives/masked_in_batch"] for log in logs) > 0
    if case == "views":
        assert sum(log["views/cloze_dropped"] + log["views/title_dropped"] for log in logs) > 0


@pytest.mark.parametrize(
    ("case", "why"),
    [("lost", "a shard is lost"), ("taught and lost", "another rank has no answer"), ("slow", "no answer within")],
)
def test_a_batch_that_one_rank_has_no_answer_for_has_neighbours_on_none(
    case: str, why: str, told: dict[str, Any]
) -> None:
    logs, notices = told[case]
    missing = [log["negatives/missing"] for log in logs]
    assert missing[:3] == [0, 0, 1] and (case == "slow" or missing[3:] == [0, 0, 0])
    assert "no global negatives for now" in notices[0] and why in notices[0]
    assert "negatives/usable" not in logs[2]


def test_a_version_that_has_given_way_on_one_rank_is_replaced_on_all(told: dict[str, Any]) -> None:
    logs, notices = told["given way"]
    assert [log["negatives/missing"] for log in logs][1:] == [0] * 5 and notices == []
    assert logs[3]["negatives/index_step"] == 2


def test_nothing_of_it_is_kept(told: dict[str, Any]) -> None:
    assert told["left"] == []
