"""The training command: claim the run, have an engine train it, keep the result. Ray is imported only if it is used."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

from hncse_ray.cluster.session import is_connected, ray_meanwhile
from hncse_ray.config import LOCAL_IS_ONE, Settings, leaves, load_settings
from hncse_ray.errors import SettingsError, StorageError
from hncse_ray.reporting import Event, LineReporter, Reporter, Reporters, RunFinished, RunStarted, Verdict
from hncse_ray.reporting.trackers import chosen_trackers, tracking
from hncse_ray.storage import is_job
from hncse_ray.training.run_folder import RunFolder, claim_run

if TYPE_CHECKING:
    from hncse_ray.cluster.shards import KeptShards

logger = logging.getLogger(__name__)

Engine = Callable[[Settings, RunFolder, Reporter, Sequence[str] | None], RunFinished]


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
        whitened_base: the same of the base whitened on the corpus without training; empty where it was not scored.
        verdict: what ``model`` is made of, and what dev says of it; None of runs of earlier versions.
        seconds: that its phases took, by name.
        report: the run's page on this machine; None where there is none, as of the trials of a sweep.
    """

    model: str
    steps: int
    best_step: int
    sentences_per_s: float
    before: dict[str, dict[str, float]]
    after: dict[str, dict[str, float]]
    whitened_base: dict[str, dict[str, float]] = field(default_factory=dict)
    verdict: Verdict | None = None
    seconds: dict[str, float] = field(default_factory=dict)
    report: str | None = None


def train(settings: Settings, *, sentences: Iterable[str] | None = None, reporter: Reporter | None = None) -> RunResult:
    """Train an encoder as the settings say; go on where an interrupted run of the same settings stopped.

    Everything that can be checked is checked before the training begins; a run that is refused leaves no folder.

    One worker on this machine is this process, which needs Ray for a negative pool only; ``cluster.engine`` says how to
    have it otherwise. Folder, checkpoints and records are the same, and a run may go on with another engine.

    If the process of a Ray that was started here is killed, this process ends too, with status 2: Ray's own calls wait
    for that Ray for a minute and then end the process, whatever it would do about it.

    Args:
        settings: see :func:`hncse_ray.load_settings`.
        sentences: what to train on, in place of the corpus that the settings name; each is cleaned and filtered as
            a line of a file would be.
        reporter: receives the run's events too; its log and metrics files have them in any case.

    Raises:
        HncseError: bad settings, data, model, cluster or storage; or training failed for a known cause.
    """
    if not isinstance(settings, Settings):  # a recipe's name, say
        hint = "Make them by hncse_ray.load_settings(recipe, overrides)"
        raise SettingsError(f"are no Settings, but of type {type(settings).__name__}", "settings", hint)
    if isinstance(sentences, Iterable) and not isinstance(sentences, str | Mapping | AbstractSet):  # in no order
        sentences = list(sentences)  # they are read more than once
    return train_by(choose_engine(settings), settings, sentences=sentences, reporter=reporter)


def train_by(
    engine: Engine, settings: Settings, *, sentences: Sequence[str] | None = None, reporter: Reporter | None = None
) -> RunResult:
    """Train as :func:`train` does, by an engine that the caller chooses."""
    start, settings = _Start(), _located(_with_sentences(settings, sentences))
    trackers = chosen_trackers(settings.run.trackers)
    with claim_run(settings) as folder:
        result = folder.finished()
        if result is None:
            with tracking(trackers, folder.path, leaves(settings.model_dump(mode="json"))) as tracked:
                events = Reporters([LineReporter(), start, *([reporter] if reporter else []), *tracked])
                result = engine(settings, folder, events, sentences)
            result = replace(result, seconds={"starting": start.seconds} | result.seconds)
            folder.write_result(asdict(result))
            if settings.evaluation.test and folder.lease is None:  # not for the trials of a sweep
                _write_page(folder.path)
        else:
            from hncse_ray.corpus.sources import changed_file  # its libraries take a second

            logger.info("run %s is finished already", settings.run.name)
            if folder.lease is None and (changed := changed_file(settings.corpus, folder.finished_at())):
                logger.warning("%s has changed since: choose another run.name to train on what there is now", changed)
    page = folder.path / "report.html"
    return RunResult(
        model=f"{folder.place}/model",
        steps=result.step,
        best_step=result.best_step,
        sentences_per_s=result.sentences_per_s,
        before=result.before,
        after=result.after,
        whitened_base=result.whitened_base,
        verdict=result.verdict,
        seconds=result.seconds,
        report=str(page) if page.exists() else None,
    )


class _Start:
    """A reporter that notes how long it is until a run begins, or goes on."""

    def __init__(self) -> None:
        self._begun, self.seconds = time.monotonic(), 0.0

    def on(self, event: Event) -> None:
        if isinstance(event, RunStarted):
            self.seconds = time.monotonic() - self._begun

    def close(self) -> None:
        """Nothing to close."""


def choose_engine(settings: Settings) -> Engine:
    """Return what trains a run where this process is; each engine brings its own imports when it begins.

    Raises:
        SettingsError: it cannot be used here.
    """
    if settings.cluster.engine == "local":
        if is_job():
            raise SettingsError(
                f"{LOCAL_IS_ONE}, and a job is on a cluster", "cluster.engine", "Set cluster.engine=ray"
            )
        return train_here
    on_a_cluster = is_job() or os.environ.get("RAY_ADDRESS", "local") not in ("", "local")
    if settings.fits_one_process and not (on_a_cluster or is_connected()):
        return train_beside_pool if settings.negatives.source == "pool" else train_here
    return train_on_ray


def train_here(
    settings: Settings, folder: RunFolder, reporter: Reporter, sentences: Sequence[str] | None
) -> RunFinished:
    """The engine of one process, without Ray: see :func:`hncse_ray.cluster.local.train_here`."""
    from hncse_ray.cluster import local

    return local.train_here(settings, folder, reporter, sentences)


def train_beside_pool(
    settings: Settings,
    folder: RunFolder,
    reporter: Reporter,
    sentences: Sequence[str] | None,
    *,
    kept: KeptShards | None = None,
) -> RunFinished:
    """The engine of one process, with the actors of a negative pool on a Ray that starts meanwhile, or kept ones."""
    with ray_meanwhile() as join_ray:
        from hncse_ray.cluster import local

        return local.train_here(settings, folder, reporter, sentences, join_ray=join_ray, kept=kept)


def train_on_ray(
    settings: Settings,
    folder: RunFolder,
    reporter: Reporter,
    sentences: Sequence[str] | None,
    *,
    kept: KeptShards | None = None,
) -> RunFinished:
    """The engine of Ray Train: see :func:`hncse_ray.cluster.launch.train_on_ray`."""
    with ray_meanwhile() as join_ray:
        from hncse_ray.cluster import launch  # the encoder's libraries take seconds, as Ray does

        return launch.train_on_ray(settings, folder, reporter, sentences, join_ray, kept)


def _with_sentences(settings: Settings, sentences: Sequence[str] | None) -> Settings:
    """Return the settings of a run on sentences that are handed over, or as they are if there are none.

    Raises:
        SettingsError: there are none, and the settings say that there are; or they say what sentences have not.
    """
    if sentences is None:
        if settings.corpus.source == "memory":
            raise SettingsError("names no file: the sentences are handed to hncse_ray.train(settings, sentences=[...])",
                                "corpus.source=memory", "Name files by corpus.path")  # fmt: skip
        return settings
    if not isinstance(sentences, list) or not all(isinstance(sentence, str) for sentence in sentences):
        raise SettingsError("is no list of texts", "sentences", "Give a list such as ['One sentence.', 'Another.']")
    return load_settings(settings.model_dump(mode="json"), {"corpus.source": "memory", "corpus.path": []})


def _located(settings: Settings) -> Settings:
    """Return the settings with the model's path made absolute: workers are in folders of their own."""
    model = Path(settings.encoder.model)
    if not model.is_dir():
        return settings
    return settings.model_copy(update={"encoder": settings.encoder.model_copy(update={"model": str(model.absolute())})})


def _write_page(folder: Path) -> None:
    """Write the page of a finished run; the run is not lost if that fails."""
    try:
        from hncse_ray.reporting.run_page import write_run_page  # plotly takes a second to import, and may be missing

        write_run_page(folder)
    except (StorageError, ImportError) as error:
        logger.warning("the page of the run could not be written: %s", error)
