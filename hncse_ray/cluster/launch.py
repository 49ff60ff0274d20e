"""The training command: check everything first, then launch Ray Train and follow it to the end."""

from __future__ import annotations

import logging
import os
import signal
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import ray
import ray.train
from ray.exceptions import RayActorError
from ray.train import CheckpointConfig, FailureConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchTrainer
from ray.train.v2._internal.constants import ENV_VARS_TO_PROPAGATE
from ray.train.v2._internal.exceptions import WorkerGroupStartupTimeoutError

from hncse_ray.cluster.channel import event_channel
from hncse_ray.cluster.elastic import START_TIMEOUT_S, NoRoom, Starts, fit_elastic
from hncse_ray.cluster.network import NodeTorchConfig
from hncse_ray.cluster.node_corpus import NodeCorpus
from hncse_ray.cluster.placement import place_pool, place_workers, survey, without_orphaned_groups
from hncse_ray.cluster.pool import negative_pool
from hncse_ray.cluster.resources import PoolPlan, WorkerPlan, pool_advice
from hncse_ray.cluster.session import named_cluster, ray_session
from hncse_ray.cluster.visible import check_visible
from hncse_ray.cluster.worker import train_worker
from hncse_ray.config import Settings
from hncse_ray.corpus import Corpus, prepare_corpus
from hncse_ray.encoder import SentenceEncoder, has_dropout, load_encoder
from hncse_ray.errors import ClusterError, DataError, HncseError, ModelError, StorageError, TrainingError
from hncse_ray.reporting import LineReporter, Notice, Reporter, Reporters, RunFinished, StageProgress
from hncse_ray.training import EvaluationSets, load_evaluation_sets
from hncse_ray.training.negatives import check_candidates
from hncse_ray.training.objective_check import check_objective
from hncse_ray.training.remote_run import MirrorPlan, RemoteRunFolder, claim_run
from hncse_ray.training.run_folder import RunFolder
from hncse_ray.training.schedule import count_steps, plan_batches

logger = logging.getLogger(__name__)

_CONTROLLER_RETRIES = 3
_KEPT_CHECKPOINTS = 2  # the newest, and the one before it in case the newest was damaged


@dataclass(frozen=True)
class RunResult:
    """What a finished run leaves.

    Attributes:
        model: folder of the exported encoder, in sentence-transformers layout.
        steps: optimiser steps taken.
        best_step: the step whose weights are in ``model``.
        sentences_per_s: sentences trained on a second, evaluation and checkpoints left out.
        before: scores by split and ``suite/metric`` before training.
        after: the same of ``model``.
    """

    model: str
    steps: int
    best_step: int
    sentences_per_s: float
    before: dict[str, dict[str, float]]
    after: dict[str, dict[str, float]]


def prepare(settings: Settings, encoder: SentenceEncoder, reporter: Reporter) -> Corpus:
    """Prepare a run's corpus for its encoder, or find it prepared; progress goes to ``reporter``.

    Raises:
        DataError: the source cannot be read, or nothing of it is left.
    """
    return prepare_corpus(
        settings.corpus,
        tokenize=encoder.token_rows,
        tokenizer_digest=encoder.tokenizer_digest(),
        max_length=settings.encoder.max_length,
        seed=settings.run.seed,
        progress=lambda stage, done, total: reporter.on(StageProgress(stage, done, total)),
    )


def train(settings: Settings, *, reporter: Reporter | None = None) -> RunResult:
    """Train an encoder as the settings say; go on where an interrupted run of the same settings stopped.

    Everything that can be checked is checked before Ray is started; a run that is refused leaves no folder.

    Args:
        settings: see :func:`hncse_ray.load_settings`.
        reporter: receives the run's events too; its log and metrics files have them in any case.

    Raises:
        HncseError: bad settings, data, model, cluster or storage; or training failed for a known cause.
    """
    model = Path(settings.encoder.model)
    if model.is_dir():  # workers are in folders of their own
        located = settings.encoder.model_copy(update={"model": str(model.absolute())})
        settings = settings.model_copy(update={"encoder": located})
    with claim_run(settings) as folder:
        result = folder.finished()
        if result is None:
            result = _train(settings, folder, Reporters([LineReporter(), *([reporter] if reporter else [])]))
            folder.write_result(asdict(result))
            if settings.evaluation.test and not isinstance(folder, RemoteRunFolder):  # not for the trials of a sweep
                _write_page(folder.path)
        else:
            logger.info("run %s is finished already", settings.run.name)
    return RunResult(
        model=f"{folder.place}/model",
        steps=result.step,
        best_step=result.best_step,
        sentences_per_s=result.sentences_per_s,
        before=result.before,
        after=result.after,
    )


def _write_page(folder: Path) -> None:
    """Write the page of a finished run; the run is not lost if that fails."""
    from hncse_ray.reporting.run_page import write_run_page  # plotly takes a second to import

    try:
        write_run_page(folder)
    except StorageError as error:
        logger.warning("the page of the run could not be written: %s", error)


def check_run(settings: Settings, reporter: Reporter) -> tuple[SentenceEncoder, EvaluationSets, Corpus]:
    """Load what a run needs and check all that can be checked before Ray is started.

    Raises:
        HncseError: bad data or model, or settings that do not fit them.
    """
    model = settings.encoder.model
    encoder = load_encoder(model, settings.encoder, seed=settings.run.seed)
    if settings.corpus.positive_column is None:
        _check_dropout(encoder)
    elif encoder.unpooled_prompt("query") != encoder.unpooled_prompt("document"):
        raise ModelError(
            "it leaves prompts out of its pooling, which cannot be done where those of queries and documents differ"
            " in length",
            model,
            "Set encoder.prompts, such as encoder.prompts={query: '', document: ''}",
        )
    if settings.encoder.max_length > (limit := encoder.length_limit):
        raise ModelError(f"it takes {limit} tokens at most", model, "Lower encoder.max_length")
    batch_size = settings.train.batch_size
    check_objective(settings, dimension=encoder.dimension, batch_size=batch_size)
    sets = load_evaluation_sets(settings.evaluation, settings.corpus)
    corpus = prepare(settings, encoder, reporter)
    if corpus.report.without_positive:
        _check_dropout(encoder, f"{corpus.report.without_positive:,} rows have no positive, and ")
    if len(corpus) < batch_size:
        raise DataError(
            f"has {len(corpus)} sentences, fewer than train.batch_size = {batch_size}",
            f"corpus {settings.corpus.place}",
            "Lower train.batch_size or give a larger corpus",
        )
    count_steps(settings.train, plan_batches(settings, corpus.view_lengths))  # refuses a warm-up that does not end
    check_candidates(settings, corpus)
    if (last_batch := len(corpus) % batch_size) >= settings.smallest_batch:
        check_objective(settings, dimension=encoder.dimension, batch_size=last_batch)
    return encoder, sets, corpus


def _check_dropout(encoder: SentenceEncoder, why: str = "") -> None:
    """See that two views of a sentence would differ."""
    if not has_dropout(encoder):
        raise ModelError(f"{why}it has no dropout, so both views of a sentence would be the same", encoder.name,
                         "Set encoder.dropout=0.1")  # fmt: skip


def _train(settings: Settings, folder: RunFolder, reporter: Reporter) -> RunFinished:
    """Check everything that can be checked, then start Ray and train."""
    named_cluster()
    encoder, sets, corpus = check_run(settings, reporter)
    reporter.on(StageProgress("starting Ray and the workers", 0, None))
    with ray_session():
        if not isinstance(folder, RemoteRunFolder):
            check_visible(folder.path, settings.cluster.trainer_labels)
        nodes, pool = survey(), None
        if settings.negatives.source != "none":
            pool = place_pool(settings, nodes, rows=len(corpus), dimension=encoder.dimension)
            reporter.on(StageProgress(pool.describe(), 0, None))
        plan = place_workers(settings, nodes, pool)
        if settings.negatives.source == "pool" and pool is not None and (advice := pool_advice(plan, pool)):
            reporter.on(Notice(advice))
        return _run(settings, plan, pool, corpus, sets, folder, reporter)


def _run(
    settings: Settings,
    plan: WorkerPlan,
    pool: PoolPlan | None,
    corpus: Corpus,
    sets: EvaluationSets,
    folder: RunFolder,
    reporter: Reporter,
) -> RunFinished:
    log = logging.FileHandler(folder.path / "log.txt", encoding="utf-8")
    log.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    package = logging.getLogger("hncse_ray")
    package.addHandler(log)
    if package.level == logging.NOTSET:  # the command sets it; a program that uses the package may not
        package.setLevel(logging.INFO)
    try:
        starts = Starts()
        with event_channel(reporter) as events, ExitStack() as stack:
            stack.callback(starts.forget)
            mirror, handles = None, None
            if isinstance(folder, RemoteRunFolder):
                mirror = MirrorPlan(folder.remote, folder.token, keep=_KEPT_CHECKPOINTS)
            if pool is not None and settings.negatives.source == "pool":
                handles = stack.enter_context(negative_pool(settings, pool, corpus, folder.path / "index"))
            config = {
                "settings": settings.model_dump(mode="json"),
                "corpus": NodeCorpus.of(corpus, settings),
                "sets": ray.put(sets),
                "threads": plan.threads,
                "folder": str(folder.path.absolute()),
                "mirror": mirror,
                "events": events,
                "starts": starts,
                "index": None if pool is None else pool.index,
                "pool": handles,
            }
            stack.enter_context(_address_for_helpers())
            if settings.cluster.min_workers is not None:
                stack.enter_context(without_orphaned_groups())
            outcome = fit_elastic(
                lambda workers, missing: _fit(
                    _trainer(settings, replace(plan, num_workers=workers), folder, config | {"missing": missing})
                ),
                plan,
                settings.cluster,
                starts=starts,
                notify=lambda text: reporter.on(Notice(text)),
            )
        reporter.on(outcome)
        return outcome
    finally:
        package.removeHandler(log)
        log.close()


def _trainer(settings: Settings, plan: WorkerPlan, folder: RunFolder, config: dict[str, Any]) -> TorchTrainer:
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
            label_selector=cluster.trainer_labels or None,
        ),
        torch_config=NodeTorchConfig(),
        run_config=RunConfig(
            name=folder.checkpoints.name,
            storage_path=str(folder.path.absolute()),
            failure_config=FailureConfig(max_failures=cluster.max_failures, controller_failure_limit=retries),
            checkpoint_config=CheckpointConfig(num_to_keep=_KEPT_CHECKPOINTS),
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
        kind = NoRoom if isinstance(error.controller_failure, WorkerGroupStartupTimeoutError) else ClusterError
        raise kind(f"Ray Train could not run the workers ({error.controller_failure})") from error
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
