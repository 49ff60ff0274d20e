"""Where a run's events go: lines in a log, a metrics file, TensorBoard. The terminal's bar is in terminal.py."""

from __future__ import annotations

import json
import logging
import math
import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any, Protocol

from hncse_ray.errors import StorageError, counted
from hncse_ray.reporting.events import (
    CheckpointSaved,
    Evaluated,
    Event,
    Notice,
    RunFinished,
    RunStarted,
    Sampled,
    StageProgress,
    StepsLogged,
    Verdict,
    scalars,
)
from hncse_ray.reporting.verdict import describe_verdict
from hncse_ray.storage import write_atomically

logger = logging.getLogger(__name__)

_CLOSE_S = 10.0  # that TensorBoard's writer is waited for


class Reporter(Protocol):
    """Receives a run's events in order."""

    def on(self, event: Event) -> None:
        """Take note of one event."""
        ...

    def close(self) -> None:
        """The run is over, well or badly."""
        ...


class Reporters:
    """Several reporters as one."""

    def __init__(self, reporters: Iterable[Reporter]) -> None:
        self._reporters = list(reporters)

    def on(self, event: Event) -> None:
        """Hand the event to each."""
        for reporter in self._reporters:
            reporter.on(event)

    def close(self) -> None:
        """Close each."""
        for reporter in self._reporters:
            reporter.close()


class LineReporter:
    """One line an event, through the logger: for log files and for terminals that are not interactive."""

    def __init__(self) -> None:
        self._run: RunStarted | None = None
        self._pace = Pace()
        self._stage = ""

    def on(self, event: Event) -> None:
        """Log the event; of a stage only that it begins, or begins again after some steps."""
        if isinstance(event, Sampled):
            return
        if isinstance(event, StageProgress):
            if event.stage != self._stage:
                logger.info("%s", event.stage)
            self._stage = event.stage
            return
        if isinstance(event, RunStarted):
            self._run = event
            self._pace.begin(event)
        left = ""
        if isinstance(event, StepsLogged):
            left, self._stage = self._pace.left(event.step), ""
        level = logging.WARNING if isinstance(event, Notice) else logging.INFO
        logger.log(level, "%s%s", describe(event, self._run), f"  {left} left" if left else "")

    def close(self) -> None:
        """Nothing to close."""


class _Lines:
    """A file of one JSON object a line, each of a step.

    When a run is resumed at an earlier step than it had reached, the lines beyond that step are dropped: the run
    writes them again.
    """

    def __init__(self, path: Path) -> None:
        self._path = path

    def close(self) -> None:
        """Nothing to close: every line is written at once."""

    def _append(self, row: dict[str, object]) -> None:
        try:
            with self._path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")
        except OSError as error:
            raise StorageError(f"cannot be written ({error.strerror})", str(self._path), "Is the disk full?") from error

    def _begin(self, event: RunStarted) -> None:
        if not self._path.exists():
            return
        kept = []
        for line in self._path.read_text(encoding="utf-8").splitlines():
            try:
                row = json.loads(line)
            except ValueError:
                break  # cut short by a kill: the last line
            # A run that starts over at step 0 scores it again; one that goes on from later does not. Verdict, test
            # scores and the last samples are the end of a run: written again when it gets there.
            is_end = row.get("split") == "test" or not row.keys().isdisjoint(("verdict", "sentences", "negatives"))
            if not is_end and (row["step"] < event.step or (row["step"] == event.step and event.step > 0)):
                kept.append(line + "\n")
        write_atomically(self._path, "".join(kept))


class MetricsFile(_Lines):
    """``metrics.jsonl``: one JSON object a logged step or evaluation; what a resumed run writes again is dropped."""

    def on(self, event: Event) -> None:
        """Append the event."""
        if isinstance(event, RunStarted):
            self._begin(event)
        elif isinstance(event, StepsLogged):
            self._append({"step": event.step, **event.numbers})
        elif isinstance(event, Evaluated):
            self._append({"step": event.step, "split": event.split, **event.scores, "is_best": event.is_best})
        elif isinstance(event, Verdict):
            told = asdict(event)
            self._append({"step": told.pop("step"), "verdict": told | {"difference": event.difference}})


class SamplesFile(_Lines):
    """``samples.jsonl``: what people look at, by its kind; the page of the run draws it."""

    def on(self, event: Event) -> None:
        """Append the event."""
        if isinstance(event, RunStarted):
            self._begin(event)
        elif isinstance(event, Sampled):
            self._append({"step": event.step, event.kind: event.facts})


class TensorBoard:
    """Scalars for TensorBoard, in ``<run>/tensorboard``."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._writer: Any = None

    def on(self, event: Event) -> None:
        """Write the event's scalars."""
        if isinstance(event, RunStarted):
            from tensorboardX import SummaryWriter  # imports torch, which most processes of a run do without

            self.close()
            self._writer = SummaryWriter(str(self._folder), purge_step=event.step + 1 if event.resumed else 0)
        if self._writer is None:
            return
        for name, value in scalars(event).items():
            self._writer.add_scalar(name, value, event.step)  # type: ignore[union-attr]  # what has numbers has a step

    def close(self) -> None:
        """Flush what is written, in some seconds or not at all.

        The library waits for a thread of its own, and for ever if an interrupt has met that thread's queue.
        """
        if self._writer is None:
            return
        closing = threading.Thread(target=self._writer.close, daemon=True, name="tensorboard")
        closing.start()
        closing.join(_CLOSE_S)
        if closing.is_alive():
            logger.warning("TensorBoard's file does not close; its last lines may be missing")
        self._writer = None


def duration_text(seconds: float | None) -> str:
    """Return a time in the two units that matter."""
    if seconds is None or not math.isfinite(seconds):
        return "–"
    if seconds < 10:
        return f"{seconds:.{2 if seconds < 1 else 1}f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes:02} min"
    return f"{minutes} min {rest:02} s" if minutes else f"{rest} s"


def describe(event: Event, run: RunStarted | None = None) -> str:
    """Return an event as one line of text.

    Args:
        event: what happened.
        run: what it happened in; training steps are of one.
    """
    match event:
        case StageProgress():
            return f"{event.stage} {event.done:,}" + (f" of {event.total:,}" if event.total else "")
        case RunStarted():
            verb = f"resumes at step {event.step}" if event.resumed else "starts"
            rows = counted(event.sentences, event.rows_are.removesuffix("s"))
            return (
                f"run {event.run} {verb}: {counted(event.total_steps, 'step')} of {event.batch_size} from {rows},"
                f" {counted(event.num_workers, 'worker')} on {event.device}, {event.precision}"
            )
        case StepsLogged():
            assert run is not None
            index = _describe_index(event.metrics, renewed=run.renews_index)
            share = event.model_flops_utilisation
            peak = "" if share is None else f"  {100 * share:.1f}% of peak FLOP/s"
            return (
                f"step {event.step}/{run.total_steps}  loss {event.metrics['loss']:.4f}"
                f"  {event.sentences_per_s:,.1f} {run.rows_are}/s{peak}{index}"
            )
        case Evaluated():
            scores = "  ".join(f"{name} {value:.4f}" for name, value in event.scores.items())
            return f"step {event.step}  {event.split}  {scores}{'  (best)' if event.is_best else ''}"
        case Sampled():
            return f"step {event.step}  {event.kind} kept for the page of the run"
        case CheckpointSaved():
            return f"step {event.step}  checkpoint saved in {event.seconds:.2f} s"
        case Notice():
            return event.text
        case Verdict():
            return describe_verdict(event)
        case RunFinished():
            early = ", stopped early" if event.stopped_early else ""
            return f"finished after {counted(event.step, 'step')}{early}; best on dev at step {event.best_step}"


def _describe_index(metrics: dict[str, float], *, renewed: bool) -> str:
    """Say which index served global negatives, if there are several, and how often it did not."""
    if "negatives/missing" not in metrics:
        return ""
    step, missing = metrics.get("negatives/index_step"), metrics["negatives/missing"]
    text = "  no index yet" if step is None else f"  index of step {step:.0f}" if renewed else ""
    return text + (f"  ({missing:.0%} of batches without neighbours)" if missing else "")


class Pace:
    """Estimates the time to the last step, by the time from the first line of the log to the present one.

    What comes before the first line does not come again: the first scores, the first index, warming up. What comes
    now and then afterwards, such as scores, is in the estimate.

    Args:
        clock: returns seconds.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock, self._total = clock, 0
        self._first: tuple[float, int] | None = None

    def begin(self, event: RunStarted) -> None:
        """A run begins, or is resumed."""
        self._total, self._first = event.total_steps, None

    def left(self, step: int) -> str:
        """Return the time left after a step that is logged; empty for the first of them."""
        now = self._clock()
        if self._first is None or step <= self._first[1]:
            self._first = self._first or (now, step)
            return ""
        seconds = (now - self._first[0]) / (step - self._first[1]) * (self._total - step)
        minutes, rest = divmod(round(seconds), 60)
        hours, minutes = divmod(minutes, 60)
        return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
