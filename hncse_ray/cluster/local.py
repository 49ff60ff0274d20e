"""The engine that trains in this process: without Ray, or with the actors of a negative pool beside it."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager
from typing import TYPE_CHECKING

import torch
from joblib import cpu_count

from hncse_ray.cluster.resources import Resources, WorkerPlan, plan_pool, plan_workers, pool_advice
from hncse_ray.config import Settings
from hncse_ray.corpus import Corpus
from hncse_ray.negatives import NegativeSource
from hncse_ray.negatives.in_process import InProcessSource
from hncse_ray.reporting import Event, Notice, Reporter, RunFinished, StageProgress
from hncse_ray.reporting.records import Unfailing, run_log, run_records
from hncse_ray.training import TrainJob, fit
from hncse_ray.training.checks import check_run
from hncse_ray.training.run_folder import RunFolder
from hncse_ray.training.shard import in_process_source
from hncse_ray.training.store import FolderStore, fetch_run

if TYPE_CHECKING:
    from hncse_ray.cluster.shards import KeptShards

_PART_OF_MEMORY = 0.7  # that an index may take, as Ray reckons


def train_here(
    settings: Settings,
    folder: RunFolder,
    reporter: Reporter,
    sentences: Sequence[str] | None,
    *,
    join_ray: Callable[[], None] | None = None,
    kept: KeptShards | None = None,
) -> RunFinished:
    """Check a run and train it in this process, from its newest checkpoint if it has one.

    Args:
        settings: of the run.
        folder: claimed for it.
        reporter: receives the run's events.
        sentences: of a run whose ``corpus.source`` is ``memory``.
        join_ray: returns when there is Ray, for the actors of a pool; None = a pool is an index in this process.
        kept: shards of the run before, and later of this one; see :func:`~hncse_ray.cluster.pool.negative_pool`.

    Raises:
        HncseError: the run is refused, or fails for a known cause.
    """
    machine = _machine()
    plan = plan_workers(settings.cluster, machine)
    device = torch.device("cuda", torch.cuda.current_device()) if plan.gpus else torch.device("cpu")
    told = Unfailing(reporter)

    def notify(text: str) -> None:
        told.on(Notice(text))

    with run_log(folder.path) as begin_log, ExitStack() as stack:
        encoder, sets, corpus = check_run(settings, reporter, device=device, sentences=sentences)
        begin_log()
        fetch_run(folder, notify)
        source: NegativeSource | None = None
        if settings.negatives.source == "pool" and join_ray is not None:
            reporter.on(StageProgress("starting Ray", 0, None))
            join_ray()
            plan, source = stack.enter_context(_pool(settings, corpus, encoder.dimension, folder, told, kept))
        elif settings.negatives.source != "none":
            source = _index_here(settings, corpus, encoder.dimension, machine, plan, device, told)
        stack.enter_context(_threads(plan.threads))
        with FolderStore(folder, notify) as store, run_records(folder.path) as files:

            def emit(event: Event) -> None:
                files.on(event)
                told.on(event)

            finished = fit(TrainJob(settings, corpus, encoder, sets, source), store, emit)
        assert finished is not None  # only nodes that come and go have a run pause
        told.on(finished)
        return finished


@contextmanager
def _pool(
    settings: Settings, corpus: Corpus, dimension: int, folder: RunFolder, reporter: Reporter, kept: KeptShards | None
) -> Iterator[tuple[WorkerPlan, NegativeSource]]:
    """Have the actors of a pool beside this process; what is not theirs of the machine is its share."""
    from hncse_ray.cluster.placement import place, survey  # Ray, which other runs do without
    from hncse_ray.cluster.pool import PoolClient, negative_pool

    plan, pool = place(settings, survey(), rows=len(corpus), dimension=dimension)
    assert pool is not None
    reporter.on(StageProgress(pool.describe(), 0, None))
    if advice := pool_advice(plan, pool):
        reporter.on(Notice(advice))
    with negative_pool(settings, pool, corpus, folder.path.absolute() / "index", kept=kept) as handles:
        handles.wait_until_ready(lambda text: reporter.on(StageProgress(text, 0, None)))
        with closing(PoolClient(handles, timeout_s=settings.negatives.timeout_s)) as client:
            yield plan, client


def _index_here(
    settings: Settings,
    corpus: Corpus,
    dimension: int,
    machine: Resources,
    workers: WorkerPlan,
    device: torch.device,
    reporter: Reporter,
) -> InProcessSource:
    """Make the source of global negatives in this process, where the settings ask for a pool of actors too."""
    if settings.negatives.source == "pool":
        reporter.on(Notice("cluster.engine is local: the index of negatives.source=pool is made in this process, and"
                           " training waits while it is renewed"))  # fmt: skip
    one_shard = {"source": "in_process", "num_shards": 1, "cpus_per_shard": 0.0, "gpus_per_shard": 0.0}
    alone = settings.model_copy(update={"negatives": settings.negatives.model_copy(update=one_shard)})
    has_gpu = workers.gpus > 0
    plan = plan_pool(alone.negatives, [machine], rows=len(corpus), dimension=dimension, on_trainers_gpu=has_gpu)
    reporter.on(StageProgress(plan.describe(), 0, None))
    return in_process_source(alone, corpus, plan=plan.index, threads=workers.threads, device=device)


def _machine() -> Resources:
    """Return what this machine has, by Ray's names."""
    return {
        "CPU": float(cpu_count()),
        "GPU": float(torch.cuda.device_count()),
        "memory": _PART_OF_MEMORY * os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"),
    }


@contextmanager
def _threads(number: int) -> Iterator[None]:
    """Compute with so many threads meanwhile."""
    before = torch.get_num_threads()
    torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(before)
