"""How Ray Tune is told which trials of a sweep come next, and when one ends: by the study in the sweep's folder."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from optuna.trial import TrialState
from ray.tune.schedulers import FIFOScheduler, TrialScheduler
from ray.tune.search import Searcher

from hncse_ray.errors import HncseError
from hncse_ray.reporting.sweep import SweepReporter, TrialUpdate
from hncse_ray.tuning import STATE_NAMES, SweepStudy, TrialTask, rank_trials, write_trials_csv


class NextTrial(Searcher):
    """Asks the study which trial comes next."""

    def __init__(self, study: SweepStudy, job: Callable[[TrialTask], dict[str, Any]]) -> None:
        super().__init__(metric="score", mode="max")
        self._study, self._job = study, job
        self.error: HncseError | None = None

    def suggest(self, trial_id: str) -> dict[str, Any] | str:
        """Return the job of the next trial."""
        try:
            return {"job": self._job(self._study.next())}
        except HncseError as error:
            self.error = error
            return Searcher.FINISHED

    def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
        """The scheduler tells the study: it knows how the trial ended."""

    def save(self, checkpoint_path: str) -> None:
        """All state is in the study's file."""

    def restore(self, checkpoint_path: str) -> None:
        """All state is in the study's file."""


class Watcher(FIFOScheduler):
    """Starts runs in order and reports how they stand."""

    def __init__(self, reporter: SweepReporter) -> None:
        super().__init__()
        self._reporter = reporter
        self._rows: dict[str, TrialUpdate] = {}
        self._started: dict[str, float] = {}

    def on_trial_result(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> str:
        """Note a dev score, and say whether the run goes on."""
        job = trial.config["job"]
        row = self._row(job)
        if "outcome" in result or "score" not in result:
            return TrialScheduler.CONTINUE  # it ends by itself
        total = result["total_steps"] or row.total_steps
        self._show(replace(row, state="running", step=result["step"], total_steps=total, score=result["score"]))
        is_poor = self._is_poor(job, result["step"], result["score"])
        if is_poor and result["step"] < result["total_steps"]:  # not what is done anyway, nor for the past of a run
            self._end(job, "stopped early", {})
            return TrialScheduler.STOP
        return TrialScheduler.CONTINUE

    def on_trial_complete(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> None:
        """Note how a run ended; Ray Tune tells of one that it was told to stop, too."""
        if self._row(trial.config["job"]).state == "stopped early":
            return
        state = "finished" if result.get("outcome") == "finished" else "failed"
        self._end(trial.config["job"], state, {"reason": "it ended without a result"} | result)

    def on_trial_error(self, tune_controller: Any, trial: Any) -> None:
        """Note that the process of a run died; Ray Tune tells of one that it starts again, too."""
        if trial.status == trial.ERROR and trial.should_recover():
            return
        lines = Path(trial.error_file).read_text(encoding="utf-8").strip().splitlines() if trial.error_file else []
        self._end(trial.config["job"], "failed", {"reason": lines[-1] if lines else "its process died"})

    def choose_trial_to_run(self, tune_controller: Any, **kwargs: Any) -> Any:
        """Choose the next run, and note that it starts."""
        trial = super().choose_trial_to_run(tune_controller, **kwargs)
        if trial is not None:
            self._row(trial.config["job"])
        return trial

    def _is_poor(self, job: Mapping[str, Any], step: int, score: float) -> bool:
        return False

    def _end(self, job: Mapping[str, Any], state: Any, result: Mapping[str, Any]) -> None:
        row = self._row(job)
        score = result.get("exported_score", row.score) if state == "finished" else row.score
        self._show(replace(row, state=state, score=score, reason=result["reason"] if state == "failed" else ""))

    def _row(self, job: Mapping[str, Any]) -> TrialUpdate:
        if job["name"] not in self._rows:
            self._started[job["name"]] = time.monotonic()
            self._show(TrialUpdate(job["name"], "starting", job["values"]))
        return self._rows[job["name"]]

    def _show(self, row: TrialUpdate) -> None:
        self._rows[row.name] = row
        self._reporter.on(row)


class StudyScheduler(Watcher):
    """Tells the study what trials score and how they end, stops those that it gives up, and frees their disk space."""

    def __init__(self, study: SweepStudy, reporter: SweepReporter, folder: Path) -> None:
        super().__init__(reporter)
        self._study, self._folder = study, folder

    def _is_poor(self, job: Mapping[str, Any], step: int, score: float) -> bool:
        return self._study.report(job["number"], step, score)

    def _end(self, job: Mapping[str, Any], state: Any, result: Mapping[str, Any]) -> None:
        number, row = job["number"], self._row(job)
        seconds = round(time.monotonic() - self._started[job["name"]], 1)
        facts = {"seconds": seconds, "total_steps": row.total_steps}
        if state == "finished":
            self._study.complete(number, facts | {"best_step": result["best_step"]})
        elif state == "failed":
            self._study.fail(number, result["reason"], facts)
        else:
            self._study.stop(number, facts)
        trials = self._study.finished()
        write_trials_csv(self._folder, trials)
        ended = next(t for t in trials if t.number == number)
        best = next(iter(rank_trials(trials)), None)
        for trial in trials:
            free_space(trial_folder(self._folder, trial.number), keep_model=trial is best)
        score = ended.value if ended.state == TrialState.COMPLETE else row.score
        self._show(replace(row, state=STATE_NAMES[ended.state], score=score, is_best=best is ended,
                           reason=ended.user_attrs.get("reason", "")))  # fmt: skip


def trial_folder(folder: Path, number: int) -> Path:
    """Return the folder of a trial's run in that of the sweep."""
    return folder / "trials" / f"trial-{number:04d}"


def free_space(run: Path, *, keep_model: bool) -> None:
    """Remove the checkpoints of a run that is over, and its model unless that is to be kept."""
    for name in ("checkpoints", "index", *(() if keep_model else ("model",))):
        shutil.rmtree(run / name, ignore_errors=True)
