"""One run of a sweep: what Ray Tune executes in an actor, and after it the next one in the same."""

from __future__ import annotations

import json
import os
import time
from functools import partial
from pathlib import Path
from typing import Any

import ray.tune

from hncse_ray.cluster.metrics import RayMetrics
from hncse_ray.cluster.run import Engine, train_beside_pool, train_by, train_here, train_on_ray
from hncse_ray.cluster.shards import KeptShards
from hncse_ray.config import Settings
from hncse_ray.errors import HncseError
from hncse_ray.reporting import Reporters
from hncse_ray.reporting.events import Evaluated, Event, RunStarted
from hncse_ray.storage import is_locked

_END_S = 60  # a run that is stopped may take so long to leave its files, or its process is not used again
_LOCK_PATIENCE_S = 60.0  # what a killed sweep's processes may take to let go of a run
_SHARDS = KeptShards()  # of this process, for its next trial


def run_trial(config: dict[str, Any], *, in_one_process: bool, place: str) -> None:
    """Train once, and report to Ray Tune, which ends a poor run by that call.

    A negative pool is of the run alone, but for the shards, which a run like it may have left.

    Reported are ``step`` and ``score`` of every evaluation on dev, with ``total_steps``, or 0 where the run had got
    beyond it before an interruption; and at the end ``outcome`` (``finished`` or ``failed``) with ``best_step`` and
    ``exported_score``, or with ``reason``.

    Args:
        config: ``job`` with the run's ``settings`` as a tree.
        in_one_process: whether it trains in this one; else Ray Train starts workers.
        place: the command's folder, which paths in the settings are relative to; Ray Tune has one for each trial.
    """
    os.environ["TUNE_FUNCTION_THREAD_TIMEOUT_S"] = str(_END_S)
    if os.path.isdir(place):  # a node of a cluster may not have it; a relative path is then said to be missing
        os.chdir(place)
    settings = Settings.model_validate(config["job"]["settings"])
    has_pool = settings.negatives.source == "pool"
    if not has_pool:
        _SHARDS.end()
    engine: Engine = partial(train_beside_pool if in_one_process else train_on_ray, kept=_SHARDS)
    if in_one_process and not has_pool:
        engine = train_here
    metrics = [RayMetrics(settings.run.name)] if in_one_process else []
    metric = settings.evaluation.metric
    try:
        _wait_until_free(Path(settings.run_dir))
        scores = _Scores(metric)
        scores.read(Path(settings.run_dir) / "metrics.jsonl")  # of a run that is gone on with
        result = train_by(engine, settings, reporter=Reporters([*metrics, scores]))
    except HncseError as error:
        ray.tune.report({"outcome": "failed", "reason": str(error)})
        return
    exported = result.after["dev"][metric]
    ray.tune.report({"outcome": "finished", "best_step": result.best_step, "exported_score": exported})


class _Scores:
    """Hands a run's dev scores to Ray Tune, each once: a reporter of the run."""

    def __init__(self, metric: str) -> None:
        self._metric, self._total = metric, 0
        self._known: set[int] = set()

    def read(self, metrics_file: Path) -> None:
        """Report what was scored before the run was interrupted."""
        if not metrics_file.exists():
            return
        for line in metrics_file.read_text(encoding="utf-8").splitlines():
            try:
                row = json.loads(line)
            except ValueError:
                return  # cut short by a kill: the last line
            if row.get("split") == "dev":
                self._tell(row["step"], row[self._metric])

    def on(self, event: Event) -> None:
        """Report a dev score."""
        if isinstance(event, RunStarted):
            self._total = event.total_steps
        elif isinstance(event, Evaluated) and event.split == "dev":
            self._tell(event.step, event.scores[self._metric])

    def close(self) -> None:
        """Nothing to close."""

    def _tell(self, step: int, score: float) -> None:
        if step not in self._known:
            self._known.add(step)
            ray.tune.report({"step": step, "score": score, "total_steps": self._total})


def _wait_until_free(folder: Path) -> None:
    """Wait for the processes of a killed sweep to let go of a run's folder."""
    end = time.monotonic() + _LOCK_PATIENCE_S
    while is_locked(folder / ".lock") and time.monotonic() < end:
        time.sleep(0.5)
