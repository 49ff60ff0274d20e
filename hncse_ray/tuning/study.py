"""The state of a sweep: an Optuna study in a file, asked for trials, told their scores, and asked which to stop.

All that decides how a sweep goes on is in that file, so a sweep that was killed goes on from it: which settings were
tried, what they scored and when, which were stopped and which were at work. `optuna-dashboard` opens it too.
"""

from __future__ import annotations

import math
import random
import sqlite3
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any, Literal

import optuna
from optuna.pruners import BasePruner, MedianPruner, NopPruner, SuccessiveHalvingPruner
from optuna.samplers import TPESampler
from optuna.storages import RDBStorage
from optuna.trial import FrozenTrial, TrialState

from hncse_ray.errors import StorageError, TrainingError
from hncse_ray.tuning.space import SearchSpace, Values

Stopping = Literal["asha", "median", "none"]
_MOST_MISFITS = 200  # combinations in a row that no settings allow, before the space is called impossible
_SMALL_SPACE = 500  # combinations, of which those that are left are known
_MOST_REPEATS = 10  # of combinations of a larger space that were tried already
_STARTUP_TRIALS = 8  # sampled at random before TPE has something to go by
_MISFIT = "misfit"  # attribute of what was sampled but never run; it says why
_ASKED = (TrialState.RUNNING, TrialState.COMPLETE, TrialState.PRUNED, TrialState.FAIL)


@dataclass(frozen=True)
class TrialTask:
    """A trial to be run, or to be gone on with after an interruption."""

    number: int
    values: Values


class SweepStudy:
    """A sweep's trials, kept in ``<folder>/study.db``.

    The sampler is TPE, multivariate and grouped (Bergstra et al. 2011; Falkner et al. 2018): what it suggests depends
    on the seed, the trial's number and what is known so far, and on nothing else that an interruption could lose.
    ``asha`` stops a trial that is not among the best third when it reaches ``grace``, 3 ``grace``, 9 ``grace``... steps
    (Li et al. 2020, arXiv 1810.05934); ``median`` one that is below the median of the others at the same step.

    Args:
        folder: of the sweep.
        space: what is varied.
        seed: of the sampler.
        stopping: the rule that stops poor trials.
        grace: optimiser steps that every trial is given.
        accepts: whether values fit together; raises SettingsError if not.

    Raises:
        StorageError: the file cannot be read or written.
    """

    def __init__(
        self,
        folder: Path,
        space: SearchSpace,
        *,
        seed: int,
        stopping: Stopping,
        grace: int,
        accepts: Callable[[Values], str | None],
    ) -> None:
        self._space, self._seed, self._accepts = space, seed, accepts
        self.study = open_study(folder, pruner=_pruner(stopping, grace), create=True)
        if not self.study.user_attrs.get("enqueued"):
            for point in space.first:
                self.study.enqueue_trial(point, skip_if_exists=True)
            self.study.set_user_attr("enqueued", True)
        self._interrupted = [TrialTask(t.number, t.user_attrs["values"]) for t in self._interrupted_trials()]

    def unfinished(self, total: int) -> int:
        """Return how many of ``total`` trials are still to be run or gone on with."""
        return max(0, total - len(self.finished()))

    def finished(self) -> list[FrozenTrial]:
        """Return the trials that are over: completed, stopped early or failed."""
        over = (TrialState.COMPLETE, TrialState.PRUNED, TrialState.FAIL)
        trials = self.study.get_trials(deepcopy=False, states=over)
        return [t for t in trials if _MISFIT not in t.user_attrs]

    def next(self) -> TrialTask:
        """Return an interrupted trial if there is one, else a new one.

        Raises:
            TrainingError: the space yields no settings that fit together.
        """
        if self._interrupted:
            return self._interrupted.pop(0)
        for attempt in range(_MOST_MISFITS):
            trial = self._ask()
            values = self._space.suggest(trial)
            reason = self._accepts(values)
            if reason is None and self._is_tried(values):
                others = self._untried()
                if others:
                    self.study.enqueue_trial(random.Random(trial.number).choice(others))
                if others or (others is None and attempt < _MOST_REPEATS):
                    reason = "another trial has the same values, and all have the same seed"
            if reason is None:
                trial.set_user_attr("values", values)
                return TrialTask(trial.number, values)
            trial.set_user_attr(_MISFIT, reason)
            self.study.tell(trial, state=TrialState.FAIL)
        raise TrainingError(f"{_MOST_MISFITS} sampled combinations in a row do not fit together; the last: {reason}",
                            "search space", "Narrow it, or add conditions (when)")  # fmt: skip

    def report(self, number: int, step: int, score: float) -> bool:
        """Record a dev score and return whether the trial should be stopped now.

        A step that is known already, as a resumed trial reports it again, changes nothing.
        """
        trial = self._live(number)
        if trial is None or step in self._frozen(number).intermediate_values:
            return False
        trial.report(score, step)
        return step > 0 and bool(trial.should_prune())

    def complete(self, number: int, facts: Mapping[str, Any]) -> None:
        """Record that a trial ran to its end; its score is the best of its dev scores after training began."""
        scores = [v for step, v in self._frozen(number).intermediate_values.items() if step > 0 and not math.isnan(v)]
        if not scores:
            self.fail(number, "it was never scored", facts)
            return
        self._end(number, TrialState.COMPLETE, facts, max(scores))

    def stop(self, number: int, facts: Mapping[str, Any]) -> None:
        """Record that a trial was stopped early."""
        self._end(number, TrialState.PRUNED, facts)

    def fail(self, number: int, reason: str, facts: Mapping[str, Any]) -> None:
        """Record that a trial failed, and why."""
        self._end(number, TrialState.FAIL, {**facts, "reason": reason})

    def _end(self, number: int, state: TrialState, facts: Mapping[str, Any], value: float | None = None) -> None:
        trial = self._live(number)
        if trial is None:
            return
        for key, fact in facts.items():
            trial.set_user_attr(key, fact)
        self.study.tell(number, value, state=state)

    def _interrupted_trials(self) -> Iterator[FrozenTrial]:
        """Yield the trials that were at work; end those that a kill left before their values were known."""
        for trial in self.study.get_trials(deepcopy=False, states=[TrialState.RUNNING]):
            if "values" in trial.user_attrs:
                yield trial
                continue
            if "fixed_params" in trial.system_attrs:  # it was to be one of the first points
                self.study.enqueue_trial(trial.system_attrs["fixed_params"])
            self._live(trial.number).set_user_attr(_MISFIT, "killed while it was sampled")  # type: ignore[union-attr]
            self.study.tell(trial.number, state=TrialState.FAIL)

    def _ask(self) -> optuna.Trial:
        number = len(self.study.get_trials(deepcopy=False, states=_ASKED))
        with warnings.catch_warnings():  # grouped and multivariate sampling are marked as experimental
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            self.study.sampler = TPESampler(
                n_startup_trials=_STARTUP_TRIALS,
                multivariate=True,
                group=True,
                constant_liar=True,
                seed=(self._seed * 1_000_003 + number) % 2**32,
            )
        return self.study.ask()

    def _is_tried(self, values: Values) -> bool:
        return values in self._tried()

    def _tried(self) -> list[Values]:
        trials = self.study.get_trials(deepcopy=False, states=[state for state in _ASKED if state != TrialState.FAIL])
        return [trial.user_attrs["values"] for trial in trials if "values" in trial.user_attrs]

    def _untried(self) -> list[Values] | None:
        """Return the combinations that are left of a small space; None of a large one."""
        tried = self._tried()
        return None if self._fitting is None else [values for values in self._fitting if values not in tried]

    @cached_property
    def _fitting(self) -> list[Values] | None:
        """All combinations that fit together; None if there are many."""
        combinations = self._space.combinations(_SMALL_SPACE)
        return None if combinations is None else [values for values in combinations if self._accepts(values) is None]

    def _frozen(self, number: int) -> FrozenTrial:
        return self.study.get_trials(deepcopy=False)[number]

    def _live(self, number: int) -> optuna.Trial | None:
        """Return a trial that can still be told things, None if it is over."""
        frozen = self._frozen(number)
        return None if frozen.state.is_finished() else optuna.Trial(self.study, frozen._trial_id)


def open_study(folder: Path, *, pruner: BasePruner | None = None, create: bool = False) -> optuna.Study:
    """Open the study of a sweep's folder.

    Raises:
        StorageError: there is none, or it cannot be read.
    """
    path = folder / "study.db"
    if not create and not path.exists():
        raise StorageError("is not the folder of a sweep: it has no study.db", str(folder))
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    try:
        # The path goes to sqlite itself: in a URL its `?` and `%` would mean something else.
        connect = partial(sqlite3.connect, path.absolute(), timeout=60)
        storage = RDBStorage("sqlite:///study.db", engine_kwargs={"creator": connect})
        return optuna.create_study(storage=storage, study_name="sweep", direction="maximize",
                                   pruner=pruner or NopPruner(), load_if_exists=True)  # fmt: skip
    except Exception as error:  # SQLAlchemy's, sqlite's or Optuna's own, by what is wrong with the file
        raise StorageError(f"cannot be opened ({str(error).splitlines()[0]})", str(path)) from error


def _pruner(stopping: Stopping, grace: int) -> BasePruner:
    if stopping == "asha":
        return SuccessiveHalvingPruner(min_resource=grace, reduction_factor=3)
    if stopping == "median":
        return MedianPruner(n_startup_trials=4, n_warmup_steps=grace)
    return NopPruner()
