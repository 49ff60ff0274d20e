"""A run's numbers in MLflow and Weights & Biases, where the user has said so; their failures never touch the run."""

from __future__ import annotations

import importlib.util
import json
import logging
import os
import queue
import re
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Protocol

from hncse_ray.errors import SettingsError
from hncse_ray.reporting.events import Event, RunFinished, RunStarted, scalars
from hncse_ray.storage import write_atomically

logger = logging.getLogger(__name__)

_PROJECT = "hncse_ray"
_LAST_S = 60.0  # that the end of a run waits for the last numbers to be sent
_IDS = "trackers.json"


class Tracker(Protocol):
    """One place that keeps numbers of runs. Any of its calls may fail, or take long."""

    def begin(self, run: str, known: str | None, settings: Mapping[str, object]) -> str:
        """Begin a run, or go on with the ``known`` one; return what it is known by."""
        ...

    def log(self, numbers: Mapping[str, float], step: int) -> None:
        """Keep the numbers of a step."""
        ...

    def end(self, well: bool) -> None:
        """Send what is left."""
        ...


class Mlflow:
    """MLflow, at ``MLFLOW_TRACKING_URI``, in the experiment ``MLFLOW_EXPERIMENT_NAME``."""

    def begin(self, run: str, known: str | None, settings: Mapping[str, object]) -> str:
        from mlflow import MlflowClient
        from mlflow.entities import Param

        self._client = MlflowClient()
        if known is not None:
            self._client.update_run(known, status="RUNNING")
            self._run = known
            return known
        name = os.environ.get("MLFLOW_EXPERIMENT_NAME") or _PROJECT
        experiment = self._client.get_experiment_by_name(name)
        number = experiment.experiment_id if experiment else self._client.create_experiment(name)
        self._run = str(self._client.create_run(number, run_name=run).info.run_id)
        self._client.log_batch(self._run, params=[Param(key, str(value)) for key, value in settings.items()])
        return self._run

    def log(self, numbers: Mapping[str, float], step: int) -> None:
        from mlflow.entities import Metric

        now = int(time.time() * 1000)
        # Of other characters MLflow takes no name: recall@10 is recall_at_10 there.
        names = {name: re.sub(r"[^\w\-./: ]", "_", name.replace("@", "_at_")) for name in numbers}
        self._client.log_batch(self._run, metrics=[Metric(names[n], value, now, step) for n, value in numbers.items()])

    def end(self, well: bool) -> None:
        self._client.set_terminated(self._run, "FINISHED" if well else "FAILED")


class Wandb:
    """Weights & Biases, as its own variables say: ``WANDB_API_KEY``, ``WANDB_PROJECT``, ``WANDB_MODE=offline``."""

    def begin(self, run: str, known: str | None, settings: Mapping[str, object]) -> str:
        import wandb

        quiet = wandb.Settings(silent=True, console="off", disable_code=True, login_timeout=10)
        self._run = wandb.init(
            project=os.environ.get("WANDB_PROJECT") or _PROJECT,
            name=run,
            id=known,
            resume="allow" if known else None,
            config=dict(settings),
            settings=quiet,
            reinit="create_new",
        )
        return str(self._run.id)

    def log(self, numbers: Mapping[str, float], step: int) -> None:
        self._run.log(dict(numbers), step=step)

    def end(self, well: bool) -> None:
        self._run.finish(exit_code=0 if well else 1)


TRACKERS: dict[str, Callable[[], Tracker]] = {"mlflow": Mlflow, "wandb": Wandb}


class Tracking:
    """A reporter that hands numbers to a tracker from a thread of its own, until the tracker fails.

    Args:
        name: of the tracker.
        tracker: made in the thread, since its package may take seconds to import.
        folder: of the run; what the run is known by there is kept in it, for a run that is resumed again.
        settings: of the run, by path.
    """

    def __init__(self, name: str, tracker: Callable[[], Tracker], folder: Path, settings: Mapping[str, object]) -> None:
        self._name, self._make, self._folder, self._settings = name, tracker, folder, settings
        self._events: queue.SimpleQueue[Event | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._work, name=f"tracker {name}", daemon=True)
        self._thread.start()

    def on(self, event: Event) -> None:
        """Pass the event on."""
        self._events.put(event)

    def close(self) -> None:
        """Wait a little until all is sent."""
        self._events.put(None)
        self._thread.join(_LAST_S)
        if self._thread.is_alive():
            self._give_up(f"the last numbers are not sent after {_LAST_S:g} s")

    def _work(self) -> None:
        try:
            self._follow()
        except Exception as error:  # of any kind: it is another program's, over a network
            self._give_up(str(error).strip().partition("\n")[0] or type(error).__name__)

    def _follow(self) -> None:
        tracker: Tracker | None = None
        well = False
        while (event := self._events.get()) is not None:
            if isinstance(event, RunStarted) and tracker is None:
                tracker = self._make()
                self._keep(tracker.begin(event.run, self._known() if event.resumed else None, self._settings))
            elif tracker is not None and (numbers := scalars(event)):
                tracker.log(numbers, event.step)  # type: ignore[union-attr]  # what has numbers has a step
            well |= isinstance(event, RunFinished)
        if tracker is not None:
            tracker.end(well)

    def _known(self) -> str | None:
        path = self._folder / _IDS
        known = json.loads(path.read_text(encoding="utf-8")).get(self._name) if path.exists() else None
        return None if known is None else str(known)

    def _keep(self, known: str) -> None:
        with _writing_ids:
            path = self._folder / _IDS
            others = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
            write_atomically(path, json.dumps(others | {self._name: known}) + "\n")

    def _give_up(self, why: str) -> None:
        logger.warning("%s: %s; the run goes on without it", self._name, why)


_writing_ids = threading.Lock()  # each tracker has a thread


def chosen_trackers(named: Sequence[str] | None) -> tuple[str, ...]:
    """Return the trackers of a run: those of ``run.trackers``, else those that ``HNCSE_TRACKERS`` names.

    Raises:
        SettingsError: there is none of that name, or its package is not installed.
    """
    text = os.environ.get("HNCSE_TRACKERS", "")
    found = tuple(named) if named is not None else tuple(filter(None, re.split(r"[,\s]+", text)))
    for name in found:
        where = "run.trackers" if named is not None else f"HNCSE_TRACKERS={text}"
        if name not in TRACKERS:
            raise SettingsError(f"{name!r} is no tracker", where, f"Choose from {', '.join(TRACKERS)}")
        if importlib.util.find_spec(name) is None:
            raise SettingsError(f"{name} is not installed", where, f"Try: pip install 'hncse-ray[{name}]'")
    return tuple(dict.fromkeys(found))


@contextmanager
def tracking(named: Sequence[str], folder: Path, settings: Mapping[str, object]) -> Iterator[list[Tracking]]:
    """Have trackers follow a run for as long as the context lasts.

    Args:
        named: those of :func:`chosen_trackers`.
        folder: of the run.
        settings: of the run, by path.
    """
    found = [Tracking(name, TRACKERS[name], folder, settings) for name in named]
    try:
        yield found
    finally:
        for each in found:
            each.close()
