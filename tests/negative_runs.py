"""Small runs with global negatives: how they are put together, interrupted, disturbed and looked at."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from hncse_ray.config import Settings, load_settings
from hncse_ray.corpus import BatchPlan, Corpus, prepare_corpus
from hncse_ray.encoder import SentenceEncoder, load_encoder
from hncse_ray.negatives import Hits, IndexVersion, SourceStatus, plan_index
from hncse_ray.negatives.in_process import InProcessSource
from hncse_ray.reporting import Event, Notice, RunFinished
from hncse_ray.reporting.events import CheckpointSaved, StepsLogged
from hncse_ray.storage import write_folder
from hncse_ray.training import EvaluationSets, TrainJob, fit, load_evaluation_sets
from hncse_ray.training.checkpoint import Request
from hncse_ray.training.lookup import BatchNegatives
from hncse_ray.training.negatives import GlobalNegatives
from hncse_ray.training.schedule import plan_batches
from hncse_ray.training.shard import build_shard

BASE = (
    "evaluation.suites=[]",
    "train.batch_size=8",
    "train.checkpoint_every_steps=4",
    "objective.name=info_nce",
    "negatives.source=in_process",
    "negatives.refresh=sync",
    "negatives.refresh_every_steps=6",
    "negatives.per_anchor=3",
    "negatives.candidates=12",
    "negatives.max_score=null",  # the tiny model finds everything alike
)


TIMED = ("search_ms", "build_", "waited")  # words of metrics that tell of speed


class Stopped(Exception):
    """The process dies here, as far as the loop is concerned."""


class FolderStore:
    """The RunStore of one process: every checkpoint is kept."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def checkpoint(self, step: int) -> Path:
        return self.root / f"checkpoints/step_{step:09d}"

    def checkpoints(self) -> list[Path]:
        return sorted((self.root / "checkpoints").glob("step_*"), reverse=True)

    def save(self, step: int, write: Callable[[Path], None] | None) -> None:
        assert write is not None
        write_folder(self.checkpoint(step), write)

    def requested(self) -> Request:
        return Request.NOTHING

    def export(self, write: Callable[[Path], None]) -> None:
        write_folder(self.root / "model", write)


class RanksStore(FolderStore):
    """Checkpoints in a folder that all ranks see; they are written, and the model is, by the first."""

    def save(self, step: int, write: Callable[[Path], None] | None) -> None:
        if write is not None:
            super().save(step, write)


class WatchedSource:
    """The real source in the process; ``before(method, what)`` runs first and may fail it or hold it up.

    ``what`` is the number of the batch for ``search`` and ``vectors``, else the number of the call.
    """

    def __init__(self, inner: InProcessSource, plan: BatchPlan, batches: int = 200) -> None:
        self.inner = inner
        self.before: Callable[[str, int], None] = lambda method, what: None
        self.published: dict[int, dict[str, np.ndarray]] = {}
        self.calls = {"publish": 0, "wait": 0, "status": 0}
        self._numbers = {tuple(plan.batch(n).tolist()): n for n in range(batches)}
        self._looking_up = threading.local()
        self.builds_elsewhere = False  # True has the loop publish in a thread, as it does with a pool

    def publish(self, weights: Any, *, step: int, key: str) -> bool:
        self._count("publish")
        self.published[step] = {name: array.copy() for name, array in weights.items()}
        return self.inner.publish(weights, step=step, key=key)

    def wait(self, timeout_s: float) -> None:
        self._count("wait")

    def search(self, row_ids: np.ndarray, *, k: int, version: IndexVersion | None = None, **how: Any) -> Hits:
        number = self._numbers.get(tuple(row_ids.tolist()))
        if number is None:  # a part of a batch
            number = next(n for rows, n in self._numbers.items() if set(row_ids.tolist()) <= set(rows))
        self._looking_up.number = number
        self.before("search", self._looking_up.number)
        return self.inner.search(row_ids, k=k, version=version, **how)

    def scores(self, hits: Hits, ids: np.ndarray, *, words: Any = None) -> np.ndarray:
        self.before("scores", self._looking_up.number)
        return self.inner.scores(hits, ids, words=words)

    def vectors(self, ids: np.ndarray, *, version: IndexVersion) -> np.ndarray:
        self.before("vectors", self._looking_up.number)
        return self.inner.vectors(ids, version=version)

    def status(self) -> SourceStatus:
        self._count("status")
        return self.inner.status()

    def close(self) -> None:
        self.calls["close"] = self.calls.get("close", 0) + 1

    def _count(self, method: str) -> None:
        self.calls[method] += 1
        self.before(method, self.calls[method] - 1)


@dataclass
class Run:
    """What one run left."""

    source: WatchedSource
    corpus: Corpus
    encoder: SentenceEncoder
    plan: BatchPlan
    events: list[Event] = field(default_factory=list)
    finished: RunFinished | None = None

    @property
    def logs(self) -> list[StepsLogged]:
        return [event for event in self.events if isinstance(event, StepsLogged)]

    @property
    def notices(self) -> list[str]:
        return [event.text for event in self.events if isinstance(event, Notice)]

    def series(self, name: str) -> list[float]:
        return [log.metrics[f"negatives/{name}"] for log in self.logs]


def negatives_settings(tree: dict[str, Any], *overrides: str) -> Settings:
    return load_settings(tree, [*BASE, *overrides])


def fresh_encoder(settings: Settings) -> SentenceEncoder:
    return load_encoder(settings.encoder.model, settings.encoder, seed=settings.run.seed)


def prepared(settings: Settings) -> Run:
    """Put together all that a run needs."""
    encoder = fresh_encoder(settings)
    corpus = prepare_corpus(
        settings.corpus,
        tokenize=encoder.token_rows,
        tokenizer_digest=encoder.tokenizer_digest(),
        max_length=settings.encoder.max_length,
    )
    plan = plan_index("flat", rows=len(corpus), dimension=encoder.dimension, memory_bytes=None)
    shard = build_shard(settings.negatives, settings.encoder, corpus, plan=plan)
    batches = plan_batches(settings, corpus.view_lengths)
    source = WatchedSource(InProcessSource(shard, corpus_digest=corpus.digest, rows=len(corpus)), batches)
    return Run(source, corpus, encoder, batches)


def carry_out(
    settings: Settings,
    root: Path,
    *,
    run: Run | None = None,
    source: Any = None,
    sets: EvaluationSets | None = None,
    store: FolderStore | None = None,
    also: Callable[[Event], None] = lambda event: None,
) -> Run:
    """Fit to the end, or until ``also`` raises :class:`Stopped`."""
    run = run or prepared(settings)

    def emit(event: Event) -> None:
        run.events.append(event)
        also(event)

    sets = sets or load_evaluation_sets(settings.evaluation, settings.corpus)
    job = TrainJob(settings, run.corpus, run.encoder, sets, source=source or run.source)
    try:
        run.finished = fit(job, store or FolderStore(root), emit)
    except Stopped:
        pass
    return run


def stop_at(kind: type[Event], step: int) -> Callable[[Event], None]:
    """Return what kills a run when the event of this kind and step has been told."""

    def stop(event: Event) -> None:
        if isinstance(event, kind) and event.step == step:  # type: ignore[attr-defined]
            raise Stopped

    return stop


def logged(run: Run) -> dict[int, dict[str, float]]:
    """Return what was logged, by step, without what hangs on speed: what must not hang on interruptions."""
    return {
        log.step: {name: value for name, value in log.metrics.items() if not any(word in name for word in TIMED)}
        for log in run.logs
    }


def assert_goes_on_bit_for_bit(settings: Settings, root: Path) -> None:
    """Kill a run at its checkpoint of step 4, resume it, and compare it with one that was left alone."""
    whole = carry_out(settings, root / "whole")
    first = carry_out(settings, root / "parts", also=stop_at(CheckpointSaved, 4))
    second = carry_out(settings, root / "parts")
    assert first.finished is None and second.finished is not None
    assert logged(first) | logged(second) == logged(whole)
    assert set(logged(second)) == set(range(5, 13))
    ends = [FolderStore(root / name).checkpoint(12) / "encoder.safetensors" for name in ("whole", "parts")]
    assert ends[0].read_bytes() == ends[1].read_bytes()


@contextmanager
def taken(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[int, Sequence[BatchNegatives]]]:
    """Keep what every step was given, by step."""
    found: dict[int, Sequence[BatchNegatives]] = {}
    really = GlobalNegatives.take

    def take(self: GlobalNegatives, numbers: Any, state: Any, weights: Any) -> tuple[list[BatchNegatives], float]:
        found[state.step], waited_s = really(self, numbers, state, weights)
        return list(found[state.step]), waited_s

    with monkeypatch.context() as patch:
        patch.setattr(GlobalNegatives, "take", take)
        yield found


def unit(vectors: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.normalize(vectors, dim=-1)
