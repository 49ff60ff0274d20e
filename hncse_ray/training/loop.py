"""The training loop. No Ray here: one process, or one rank of an initialised process group."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn.parallel import DistributedDataParallel

from hncse_ray.config import Settings
from hncse_ray.corpus import Corpus
from hncse_ray.encoder import SentenceEncoder, freeze_unused
from hncse_ray.errors import StorageError
from hncse_ray.negatives import NegativeSource
from hncse_ray.reporting.events import Event, Notice, RunFinished, RunStarted, StageProgress, StepsLogged
from hncse_ray.training.batch import local_batch
from hncse_ray.training.checkpoint import Request, Resumed, RunStore, Snapshot, read_newest
from hncse_ray.training.choice import ExportChoice
from hncse_ray.training.distributed import agree_on_precision, from_first, gather_values, rank, world_size
from hncse_ray.training.evaluator import EvaluationSets
from hncse_ray.training.export import write_model
from hncse_ray.training.guards import Guards
from hncse_ray.training.host_copy import HostCopier, HostCopy
from hncse_ray.training.input import Input, InputWindow
from hncse_ray.training.lookup import BatchNegatives
from hncse_ray.training.model_flops import ModelFlops, peak_flops
from hncse_ray.training.model_selection import ModelSelection
from hncse_ray.training.negatives import GlobalNegatives, check_candidates
from hncse_ray.training.objective import Objective
from hncse_ray.training.sample import SampleRecorder
from hncse_ray.training.saving import Saving
from hncse_ray.training.schedule import build_optimizer, build_schedule, count_steps, plan_batches
from hncse_ray.training.step import LocalBatch, StepContext, lay_out, train_step
from hncse_ray.training.step_log import StepLog
from hncse_ray.training.views import BatchViews, batch_views
from hncse_ray.training.window import Window

Emit = Callable[[Event], None]


@dataclass(frozen=True)
class TrainJob:
    """What a rank trains; the same on every rank, but for what ``source`` is to it."""

    settings: Settings
    corpus: Corpus
    encoder: SentenceEncoder
    sets: EvaluationSets
    source: NegativeSource | None = None


def fit(job: TrainJob, store: RunStore, emit: Emit) -> RunFinished | None:
    """Train to the end, from the newest checkpoint if there is one, and export the best weights.

    Args:
        job: settings, corpus, encoder and evaluation sets.
        store: keeps checkpoints and the model.
        emit: receives the run's events; called on rank 0 only.

    Returns:
        The facts of the finished run, the same on every rank; None if a pause was requested and there is a
        checkpoint to go on from.

    Raises:
        TrainingError: not a number, or collapse.
        StorageError: a checkpoint or the model could not be written.
    """
    with ExitStack() as stack:
        return _Trainer(job, store, emit, stack).run()


class _Trainer:
    """The parts of one run on one rank, and its loop.

    The first rank alone logs and decides; the others are told by ``from_first``.
    """

    def __init__(self, job: TrainJob, store: RunStore, emit: Emit, stack: ExitStack) -> None:
        self.settings, self.encoder, self.corpus = job.settings, job.encoder, job.corpus.scattered()
        agree_on_precision(self.encoder)
        self.store, self.emit, self.saving = store, emit, Saving()
        stack.callback(self.saving.close)
        self.selection = ModelSelection(self.settings, self.encoder, self.corpus, job.sets, self._tell)
        train = self.settings.train
        self.plan = plan_batches(self.settings, self.corpus.view_lengths, left_out=self.selection.left_out)
        self.total_steps = count_steps(train, self.plan)
        freeze_unused(self.encoder)
        self.optimizer = build_optimizer(self.encoder, train)
        self.copier = HostCopier(self.optimizer)
        self.schedule = build_schedule(self.optimizer, train, self.total_steps)
        self.objective = Objective(
            self.settings.objective,
            dimension=self.encoder.dimension,
            device=self.encoder.device,
            columns=self.settings.negatives.columns,
        )
        self.guards = Guards(train)
        self.log = StepLog()
        self.peak_flops = peak_flops(self.encoder)
        self.model_flops = None if self.peak_flops is None else ModelFlops.count(self.encoder)
        recorded = self.settings.evaluation.test  # the trials of a sweep are not
        needed = recorded or ExportChoice.needs_base(self.settings)
        self.base = self.encoder.weights() if needed else None
        self.samples: SampleRecorder | None = None
        if recorded and self.base is not None:
            self.samples = SampleRecorder(
                self.settings,
                self.corpus,
                self.selection.sets,
                self.encoder,
                self.base,
                total_steps=self.total_steps,
                emit=emit,
            )
        resumed = read_newest(
            store.checkpoints(),
            encoder=self.encoder,
            optimizer=self.optimizer,
            schedule=self.schedule,
            objective=self.objective,
        )
        self.state = resumed.state
        self.selection.resume(resumed.state, resumed.best)
        self.views: BatchViews | None = None
        if self.settings.views.active:
            self.views = stack.enter_context(batch_views(self.settings, self.corpus, self.plan, self.encoder))
        self.negatives: GlobalNegatives | None = None
        from_first(lambda: self._begin(job, resumed))
        if job.source is not None and self.settings.negatives.source != "none":
            self.negatives = self._global_negatives(job.source, stack)
            self.negatives.resume(self.state, resumed.index)
        self.input = Input(self._make_batch, None if self.negatives is None else self.negatives.nothing)
        stack.callback(self.input.close)
        self.model: SentenceEncoder | DistributedDataParallel = self.encoder
        if world_size() > 1:
            self.model = DistributedDataParallel(self.encoder, broadcast_buffers=False, gradient_as_bucket_view=True)

    def run(self) -> RunFinished | None:
        state, train = self.state, self.settings.train
        saved_step, request = state.step, Request.NOTHING
        self.selection.begin()
        if self.negatives is not None and state.step == 0:
            self._begins("making the first index")
        while True:
            # Rare events first: what is due now, before the next step is taken.
            stopped_early = self.selection.patience_is_over
            last = stopped_early or state.step >= self.total_steps
            # Logged before every evaluation and checkpoint too: then a resumed run writes the same lines.
            due = map(self._due, (train.log_every_steps, train.evaluate_every_steps, train.checkpoint_every_steps))
            if (last or any(due)) and self.log.steps:
                self.log.gather()
                windows = gather_values(self._windows())
                from_first(lambda: self._write_log(windows))  # noqa: B023  # called at once
                self.log = StepLog()
                request = max(request, self.store.requested())
            if state.evaluated_step != state.step and (last or self._due(train.evaluate_every_steps)):
                self.selection.evaluate()
                continue  # the score may end the run here
            if saved_step != state.step and (last or request or self._due(train.checkpoint_every_steps)):
                self._checkpoint()
                saved_step = state.step
            if last or request is Request.PAUSE:
                from_first(lambda: self._settle(block=True))
            if last:
                return self._finish(stopped_early)
            if request is Request.PAUSE:
                return None
            request = Request.NOTHING
            # ---------------------------------------------------------------- one optimiser step
            started = time.perf_counter()
            context = StepContext(
                objective=self.objective,
                seed=self.settings.run.seed,
                step=state.step,
                total_steps=self.total_steps,
                chunk_size=train.grad_cache_chunk_size,
                columns_dtype=self.encoder.autocast or torch.float32,
            )
            batches = self._next_batches()
            metrics, seen = train_step(self.model, self.optimizer, batches, context, max_grad_norm=train.max_grad_norm)
            self.log.add(metrics, seen.z1_bD, [b.sizes for b in batches], float(self.schedule.get_last_lr()[0]))
            if self.model_flops is not None:
                self.log.flops += self.model_flops.of(batches)
            self.schedule.step()
            state.step += 1
            self.log.seconds += time.perf_counter() - started
            if self.samples is not None:
                self.samples.step(state.step, seen)
            # ----------------------------------------------------------------

    def _due(self, every: int) -> bool:
        return self.state.step > 0 and self.state.step % every == 0

    def _next_batches(self) -> list[LocalBatch]:
        a_step = self.settings.train.accumulation_steps
        numbers = range(self.state.step * a_step, (self.state.step + 1) * a_step)
        found: Sequence[BatchNegatives | None] = [None] * len(numbers)
        if self.negatives is not None:
            found, waited_s = self.negatives.take(numbers, self.state, self._copy_weights)
            self.log.seconds -= waited_s  # it is no training
            self.state.add_seconds("waiting for the index", waited_s)
        batches = [self.input.take(number, own) for number, own in zip(numbers, found, strict=True)]
        if self.views is not None:
            self.views.take(numbers, [None if own is None else own.dropped_b for own in found])
        if self.state.step + 1 < self.total_steps:
            for number in range(numbers[-1] + 1, numbers[-1] + 1 + a_step):
                self.input.begin(number, None if self.negatives is None else self.negatives.begun(number))
        return batches

    def _copy_weights(self) -> HostCopy:
        """Begin to copy what an index is made from."""
        return self.copier.copy(self.encoder.trained(), rounded=self.encoder.seen_rounded())

    def _make_batch(self, number: int, found: BatchNegatives | None) -> LocalBatch:
        """Read and lay out this rank's part of a batch; in the thread that looks ahead, or in this one."""
        views = None
        if self.views is not None:
            views = self.views.of(number)
            if found is not None and found.dropped_b is not None:
                views = views.without(found.dropped_b)
        ids_B = self.plan.batch(number)
        batch = local_batch(number, ids_B, self.corpus, found, settings=self.settings, views=views)
        chunk_size = self.settings.train.grad_cache_chunk_size
        return lay_out(batch, self.encoder, views=self.objective.views, chunk_size=chunk_size)

    def _windows(self) -> tuple[InputWindow, Window | None, tuple[Counter[str], int] | None, float]:
        """What this rank has counted since the last log."""
        return (
            self.input.window(),
            None if self.negatives is None else self.negatives.window(),
            None if self.views is None else self.views.window(),
            self.log.flops,
        )

    def _write_log(self, windows: Sequence[tuple[InputWindow, Any, Any, float]]) -> None:
        self._settle(block=False)
        started = time.perf_counter()
        means = self.log.means()  # waits for the device
        self.log.seconds += time.perf_counter() - started
        self.state.positive_similarity = means["positive_similarity"]
        waited, batches = (sum(getattr(of_rank, name) for of_rank, *_ in windows) for name in ("waited", "batches"))
        means["data/waited"] = waited / max(1, batches)
        if self.negatives is not None:
            means |= self.negatives.metrics(self.state.step, [of_rank for _, of_rank, *_ in windows])
        if self.views is not None:
            means |= self.views.metrics([of_rank for _, _, of_rank, _ in windows])
        speed, utilisation = self.log.sentences / self.log.seconds, None
        if self.peak_flops is not None:
            flops = sum(of_rank for *_, of_rank in windows)
            utilisation = flops / self.log.seconds / self.peak_flops / world_size()
        self.state.train_seconds += self.log.seconds
        self.state.sentences += self.log.sentences
        self.emit(StepsLogged(self.state.step, means, self.log.learning_rate, speed, utilisation))
        self.guards.check(self.state.step, means)

    def _begins(self, stage: str) -> None:
        self._tell(StageProgress(stage, 0, None))

    def _tell(self, event: Event) -> None:
        from_first(lambda: self.emit(event))

    def _checkpoint(self) -> None:
        """Begin to write a checkpoint, once the one before is whole."""
        step, started = self.state.step, time.perf_counter()
        from_first(lambda: self._settle(block=True))
        if rank() != 0:
            self.store.save(step, None)
            return
        snapshot = Snapshot.take(
            settings=self.settings,
            state=self.state,
            encoder=self.encoder,
            optimizer=self.optimizer,
            schedule=self.schedule,
            objective=self.objective,
            copier=self.copier,
            best=None if self.state.best_step == step else self.selection.best,
            index=None if self.negatives is None else self.negatives.index_weights,
        )
        self.saving.begin(step, lambda: self.store.save(step, snapshot.write))
        self.state.add_seconds("checkpoints", time.perf_counter() - started)

    def _settle(self, *, block: bool) -> None:
        """Tell of the checkpoint that has been written meanwhile, or raise why it was not; on the first rank."""
        saved = self.saving.settle(block=block)
        if saved is not None:
            self.emit(saved)

    def _begin(self, job: TrainJob, resumed: Resumed) -> None:
        for line in resumed.passed_over:
            self.emit(Notice(f"passed over: {line}"))
        if self.state.step and self.state.corpus_digest != self.corpus.digest:
            raise StorageError(
                "its checkpoints come from another corpus: the source has changed since",
                self.settings.run_dir,
                "Restore the old source, or choose another run.name",
            )
        self.state.corpus_digest = self.corpus.digest
        self.emit(
            RunStarted(
                run=self.settings.run.name,
                step=self.state.step,
                total_steps=self.total_steps,
                sentences=len(self.corpus),
                batch_size=self.settings.train.batch_size,
                num_workers=world_size(),
                device=str(self.encoder.device),
                precision=f"{self.encoder.precision}, rows {'packed' if self.encoder.packs else 'padded'}",
                resumed=self.state.step > 0,
                rows_are=self.corpus.rows_are,
                renews_index=self.settings.negatives.refresh_every_steps is not None,
            )
        )
        check_candidates(self.settings, self.corpus)

    def _global_negatives(self, source: NegativeSource, stack: ExitStack) -> GlobalNegatives:
        negatives = GlobalNegatives(
            self.settings,
            corpus=self.corpus,
            plan=self.plan,
            dimension=self.encoder.dimension,
            source=source,
            notify=lambda text: self.emit(Notice(text)),
            views=self.views,
            taught=self.objective.taught(self.settings),
        )
        stack.callback(negatives.close)
        return negatives

    def _finish(self, stopped_early: bool) -> RunFinished:
        state = self.state
        if self.samples is not None:
            with state.counted_as("export"):
                self.samples.at_base()  # the choice brings weights of its own
        verdict, after = self.selection.choose(self.base)
        self._begins("writing the model")
        with state.counted_as("export"):
            if self.samples is not None:
                self.samples.last(state.step, self.negatives, self.views)
            from_first(
                lambda: self.store.export(
                    lambda folder: write_model(
                        folder,
                        self.encoder,
                        settings=self.settings,
                        corpus=self.corpus,
                        state=state,
                        after=after,
                        verdict=verdict,
                    )
                )
            )
        return from_first(
            lambda: RunFinished(
                step=state.step,
                best_step=state.best_step,
                sentences_per_s=state.sentences / max(state.train_seconds, 1e-9),
                stopped_early=stopped_early,
                before=state.before,
                after=after,
                whitened_base=state.whitened_base,
                whitened_base_power=state.whitened_base_power,
                verdict=verdict,
                seconds={"training": state.train_seconds} | state.seconds,
            )
        )
