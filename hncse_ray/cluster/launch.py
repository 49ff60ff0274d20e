"""The engine that trains with Ray: launch Ray Train, with the negative pool beside it, and follow it to the end."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import ray
import ray.train
from ray.exceptions import RayActorError
from ray.train import FailureConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchTrainer
from ray.train.v2._internal.constants import ENV_VARS_TO_PROPAGATE

from hncse_ray.cluster.channel import event_channel
from hncse_ray.cluster.elastic import START_TIMEOUT_S, Starts, WorkersUnavailable, fit_elastic
from hncse_ray.cluster.network import NodeTorchConfig
from hncse_ray.cluster.node_corpus import NodeCorpus
from hncse_ray.cluster.placement import place, survey, without_orphaned_groups
from hncse_ray.cluster.pool import negative_pool
from hncse_ray.cluster.resources import PoolPlan, WorkerPlan, pool_advice
from hncse_ray.cluster.shards import KeptShards
from hncse_ray.cluster.worker import mark_folder, train_worker
from hncse_ray.config import Settings
from hncse_ray.corpus import Corpus
from hncse_ray.errors import ClusterError, HncseError, TrainingError
from hncse_ray.reporting import Notice, Reporter, RunFinished, StageProgress
from hncse_ray.reporting.records import run_log
from hncse_ray.training import EvaluationSets
from hncse_ray.training.checks import check_run
from hncse_ray.training.run_folder import RunFolder

_CONTROLLER_RETRIES = 3


def train_on_ray(
    settings: Settings,
    folder: RunFolder,
    reporter: Reporter,
    sentences: Sequence[str] | None,
    join_ray: Callable[[], None],
    kept: KeptShards | None = None,
) -> RunFinished:
    """Check a run while Ray starts, and train it there.

    Args:
        settings: of the run.
        folder: claimed for it.
        reporter: receives the run's events.
        sentences: of a run whose ``corpus.source`` is ``memory``.
        join_ray: returns when there is Ray.
        kept: see :func:`negative_pool`.

    Raises:
        HncseError: the run is refused, or fails for a known cause.
    """
    with run_log(folder.path) as begin_log:
        encoder, sets, corpus = check_run(settings, reporter, sentences=sentences)
        reporter.on(StageProgress("starting Ray and the workers", 0, None))
        join_ray()
        plan, pool = place(settings, survey(), rows=len(corpus), dimension=encoder.dimension)
        if pool is not None:
            reporter.on(StageProgress(pool.describe(), 0, None))
        if settings.negatives.source == "pool" and pool is not None and (advice := pool_advice(plan, pool)):
            reporter.on(Notice(advice))
        begin_log()
        finished = _run(settings, plan, pool, corpus, sets, folder, reporter, kept)
        reporter.on(finished)
        return finished


def _run(
    settings: Settings,
    plan: WorkerPlan,
    pool: PoolPlan | None,
    corpus: Corpus,
    sets: EvaluationSets,
    folder: RunFolder,
    reporter: Reporter,
    kept: KeptShards | None,
) -> RunFinished:
    starts, handles, path = Starts(), None, folder.path.absolute()
    with event_channel(reporter) as events, ExitStack() as stack:
        stack.callback(starts.forget)
        if pool is not None and settings.negatives.source == "pool":
            handles = stack.enter_context(negative_pool(settings, pool, corpus, path / "index", kept=kept))
        config = {
            "settings": settings.model_dump(mode="json"),
            "corpus": NodeCorpus.of(corpus, settings),
            "sets": ray.put(sets),
            "threads": plan.threads,
            "folder": str(path),
            "lease": folder.lease,
            "mark": mark_folder(path),
            "events": events,
            "starts": starts,
            "index": None if pool is None else pool.index,
            "pool": handles,
        }
        stack.enter_context(_address_for_helpers())
        if settings.cluster.min_workers is not None:
            stack.enter_context(without_orphaned_groups())
        return fit_elastic(
            lambda workers, missing: _fit(
                _trainer(settings, replace(plan, num_workers=workers), path, config | {"missing": missing})
            ),
            plan,
            settings.cluster,
            starts=starts,
            notify=lambda text: reporter.on(Notice(text)),
        )


def _trainer(settings: Settings, plan: WorkerPlan, folder: Path, config: dict[str, Any]) -> TorchTrainer:
    cluster = settings.cluster
    # Ray Train gives up waiting for nodes after a time, and tries again so often; an elastic run goes on with fewer.
    retries = _CONTROLLER_RETRIES if cluster.min_workers is None else 0
    patience_s = cluster.start_timeout_s / (1 + retries) if cluster.min_workers is None else START_TIMEOUT_S
    os.environ["RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S"] = str(patience_s)
    return TorchTrainer(
        partial(train_worker, config),  # not `train_loop_config`: the controller would unpickle that too, with imports
        scaling_config=ScalingConfig(
            num_workers=plan.num_workers,
            use_gpu=plan.gpus > 0,
            resources_per_worker=plan.each(),
            label_selector=cluster.worker_labels or None,
        ),
        torch_config=NodeTorchConfig(),
        run_config=RunConfig(
            name=RunFolder(folder).checkpoints.name,  # for its own state: the ranks keep the checkpoints
            storage_path=str(folder),
            failure_config=FailureConfig(max_failures=cluster.max_failures, controller_failure_limit=retries),
        ),
    )


def _fit(trainer: TorchTrainer) -> RunFinished | None:
    """Train until the run has finished, or pauses (None)."""
    on_interrupt = signal.getsignal(signal.SIGINT)
    try:
        outcome = trainer.fit().return_value
    except ray.train.WorkerGroupError as error:
        causes = [cause for _, cause in sorted(error.worker_failures.items())]
        known = next((c for c in causes if isinstance(c, HncseError)), None)
        if known is not None:
            raise known from error
        cause = f"{type(causes[0]).__name__}: {causes[0]}" if causes else str(error)
        raise TrainingError(f"the workers failed again and again; the last cause was {cause}",
                            hint="log.txt in the run's folder has the details; start the same command again to go on",
                            ) from error  # fmt: skip
    except ray.train.ControllerError as error:
        raise WorkersUnavailable(f"Ray Train could not run the workers ({error.controller_failure})") from error
    except RayActorError as error:
        advice = "Start the same command again: it goes on from the last checkpoint"
        raise ClusterError("the process that looks after the workers was lost", hint=advice) from error
    except SystemExit:  # Ray Train's own handler of Ctrl-C: it has stopped the workers and wants to exit with 0
        raise KeyboardInterrupt from None
    finally:
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGINT, on_interrupt)
    if isinstance(outcome, HncseError):
        raise outcome
    assert outcome is None or isinstance(outcome, RunFinished)
    return outcome


@contextmanager
def _address_for_helpers() -> Iterator[None]:
    """Have the helper processes of Ray Train know which Ray they belong to.

    Its cleaner of placement groups asks for the state of a run without an address (Ray 2.60). On a machine with several
    Rays it then asks another one or none: a trial that was stopped early keeps its CPUs for ever, and the next waits.
    """
    ENV_VARS_TO_PROPAGATE.add("RAY_ADDRESS")
    before = os.environ.get("RAY_ADDRESS")
    os.environ["RAY_ADDRESS"] = ray.get_runtime_context().gcs_address
    try:
        yield
    finally:
        if before is None:
            del os.environ["RAY_ADDRESS"]
        else:
            os.environ["RAY_ADDRESS"] = before
