"""The folder of a sweep: which sweep it is, who is at work in it, and what it leaves.

::

    sweep.yaml    the recipe, the space and the options; study.db  all trials (Optuna)
    trials/       a run's folder for each trial;  seeds/  the same for the best settings with further seeds
    best.yaml     the best settings as a recipe;  model/  the best model
    trials.csv    a line a trial;  report.html, plots/  the same to look at
"""

from __future__ import annotations

import csv
import io
import json
import shlex
import statistics
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, get_args

import yaml
from optuna.trial import FrozenTrial, TrialState
from pydantic import TypeAdapter, ValidationError

from hncse_ray.config import Settings, changes, load_settings
from hncse_ray.errors import SettingsError, StorageError, counted
from hncse_ray.recipe import find_space, read_yaml, write_yaml
from hncse_ray.storage import leave_nothing, locked, write_atomically
from hncse_ray.tuning.space import SearchSpace, apply_values, parse_space
from hncse_ray.tuning.study import Stopping

# The share of the cluster and where things lie may differ when a sweep is resumed: they change no score.
_FREE_SETTINGS = ("run.storage_path", "cluster.", "corpus.cache_dir", "corpus.num_processes")
# Of the options of a sweep: the least and the most.
_LIMITS = {
    "trials": (1, 1_000_000), "grace_steps": (1, 2**31 - 1), "max_concurrent": (1, 4096), "seeds": (0, 10_000),
    "top": (1, 10_000),
}  # fmt: skip
STATE_NAMES = {
    TrialState.COMPLETE: "finished",
    TrialState.PRUNED: "stopped early",
    TrialState.FAIL: "failed",
    TrialState.RUNNING: "running",
    TrialState.WAITING: "waiting",
}


@dataclass(frozen=True)
class SweepOptions:
    """How a sweep goes about it.

    Attributes:
        trials: how many are run.
        stopping: the rule that stops poor trials; see :class:`~hncse_ray.tuning.study.SweepStudy`.
        grace_steps: optimiser steps that every trial is given; None = until its first evaluation.
        max_concurrent: trials side by side; None = what the cluster holds.
        seeds: further seeds that the best settings are trained with; 0 = none.
        top: how many of the best settings are.
    """

    trials: int = 20
    stopping: Stopping = "asha"
    grace_steps: int | None = None
    max_concurrent: int | None = None
    seeds: int = 0
    top: int = 3

    def __post_init__(self) -> None:
        if self.stopping not in get_args(Stopping):
            raise SettingsError(f"unknown rule {self.stopping!r}; choose from {', '.join(get_args(Stopping))}",
                                "--stopping")  # fmt: skip
        for name, (least, most) in _LIMITS.items():
            value = getattr(self, name)
            if value is None and name in ("grace_steps", "max_concurrent"):
                continue
            if type(value) is not int:
                raise SettingsError(f"{value!r} is no whole number", f"--{name.replace('_', '-')}")
            if not least <= value <= most:
                wrong = f"{value} is too few; give {least} or more" if value < least else f"{value} is more than {most}"
                raise SettingsError(wrong, f"--{name.replace('_', '-')}")


@dataclass(frozen=True)
class Sweep:
    """A sweep as asked for: settings, what is varied, and how.

    Attributes:
        settings: of the recipe; trials differ from it by the values of the space.
        space: what is varied.
        options: how many trials, and so on.
    """

    settings: Settings
    space: SearchSpace
    options: SweepOptions = field(default_factory=SweepOptions)

    @property
    def metric(self) -> str:
        """The dev metric that is maximised, as ``suite/metric``."""
        return self.settings.evaluation.metric

    @property
    def grace_steps(self) -> int:
        """Optimiser steps that every trial is given."""
        return self.options.grace_steps or self.settings.train.evaluate_every_steps

    def to_yaml(self) -> str:
        """Return it as the text of ``sweep.yaml``."""
        tree = {
            "options": asdict(self.options),
            "space": self.space.to_tree(),
            "settings": self.settings.model_dump(mode="json"),
        }
        return write_yaml(tree)


def load_sweep(
    recipe: str | Path | Mapping[str, Any],
    space: str | Path,
    overrides: Iterable[str] = (),
    **options: Any,
) -> Sweep:
    """Put together a recipe, a search space and options.

    Example::

        sweep = hncse_ray.load_sweep("quickstart", "hncse_full", ["train.max_steps=20"], trials=8, seeds=3)
        found = hncse_ray.tune(sweep, "runs/mine")

    Args:
        recipe: as for :func:`hncse_ray.load_settings`.
        space: a YAML file, or the bare name of a search space that comes with the package.
        overrides: ``section.key=value`` strings that change the recipe.
        options: ``trials`` (20), ``stopping`` (asha, median or none), ``grace_steps``, ``max_concurrent``, ``seeds``
            (0), ``top`` (3): what ``hncse tune --help`` says of them.

    Raises:
        SettingsError: one of them cannot be read or does not fit the settings, or there is no such option.
    """
    known = [option.name for option in fields(SweepOptions)]
    if unknown := [name for name in options if name not in known]:
        raise SettingsError("is no option of a sweep", unknown[0], f"Choose from {', '.join(known)}")
    settings, path = load_settings(recipe, overrides), find_space(space)
    sweep = Sweep(settings, parse_space(read_yaml(path), str(path)), SweepOptions(**options))
    sweep.space.check(settings)
    return sweep


def read_sweep(folder: Path) -> Sweep:
    """Read back which sweep a folder holds.

    Raises:
        StorageError: it holds none, or ``sweep.yaml`` cannot be read.
    """
    path = folder / "sweep.yaml"
    if not path.exists():
        raise StorageError("is not the folder of a sweep: it has no sweep.yaml", str(folder))
    try:
        tree = yaml.safe_load(path.read_text(encoding="utf-8"))
        parts = ("options", "space", "settings")
        if lacking := [part for part in parts if not isinstance(tree, dict) or not isinstance(tree.get(part), dict)]:
            raise ValueError(f"it has no {' and no '.join(lacking)}")
        options = TypeAdapter(SweepOptions).validate_python(tree["options"])
        return Sweep(load_settings(tree["settings"]), parse_space(tree["space"], str(path)), options)
    except (OSError, ValueError, TypeError, yaml.YAMLError, SettingsError) as error:
        reason = str(error)
        if isinstance(error, ValidationError):
            first = error.errors()[0]
            reason = f"options.{first['loc'][0]}: {first['msg'].lower()}"
        hint = "`hncse tune` wrote it: put back what was changed, or begin another sweep with another --out"
        raise StorageError(f"cannot be read ({' '.join(reason.split())})", str(path), hint) from error


@contextmanager
def claim_sweep_folder(folder: Path, sweep: Sweep) -> Iterator[None]:
    """Hold a sweep's folder for as long as the context lasts, creating it if need be.

    One that was created here is removed again if the context ends in an error before anything was put into it.

    Raises:
        StorageError: it cannot be written, is in use, or holds something else.
    """
    _refuse(folder, sweep)
    with locked(folder / ".lock", hint="Choose another --out") as made:
        _refuse(folder, sweep)
        is_new = not (folder / "sweep.yaml").exists()
        try:
            write_atomically(folder / "sweep.yaml", sweep.to_yaml())
            yield
        except BaseException:
            if is_new:
                leave_nothing(folder, (".lock", "sweep.yaml"), made)
            raise


def _refuse(folder: Path, sweep: Sweep) -> None:
    if (folder / "sweep.yaml").exists():
        stored = read_sweep(folder)
        if changed := _differences(stored, sweep):
            raise StorageError(f"holds another sweep: {'; '.join(changed)}", str(folder),
                               "Choose another --out, or go on with it by --resume")  # fmt: skip
    elif folder.exists() and not folder.is_dir():
        raise StorageError("is a file, not a folder", str(folder), "Choose another --out")
    elif folder.exists() and any(entry.name != ".lock" for entry in folder.iterdir()):
        raise StorageError("is not empty and holds no sweep", str(folder), "Choose another --out")


def _differences(stored: Sweep, sweep: Sweep) -> list[str]:
    """Say what makes two sweeps different ones; the number of trials, seeds and the cluster do not."""
    trees = (one.settings.model_dump(mode="json") for one in (stored, sweep))
    found = list(changes(*trees, free=_FREE_SETTINGS).values())
    if stored.space != sweep.space:
        found.append("the search space differs")
    if (stored.options.stopping, stored.grace_steps) != (sweep.options.stopping, sweep.grace_steps):
        found.append(f"poor trials were stopped by {stored.options.stopping} after"
                     f" {counted(stored.grace_steps, 'step')}, now by {sweep.options.stopping} after"
                     f" {sweep.grace_steps}")  # fmt: skip
    return found


@dataclass(frozen=True)
class SeedScores:
    """One setting trained again with further seeds.

    Attributes:
        number: of the trial it comes from.
        scores: best dev score by seed.
    """

    number: int
    scores: Mapping[int, float]

    @property
    def mean(self) -> float:
        """Mean over the seeds."""
        return statistics.mean(self.scores.values())

    @property
    def spread(self) -> float:
        """Standard deviation over the seeds; 0 for one."""
        return statistics.stdev(self.scores.values()) if len(self.scores) > 1 else 0.0


def seed_run_name(number: int, seed: int) -> str:
    """Name the run, in ``seeds/``, of a trial's settings with another seed."""
    return f"trial-{number:04d}-seed-{seed}"


def read_seed_scores(folder: Path, metric: str) -> list[SeedScores]:
    """Return what finished runs with further seeds scored, the best mean first.

    Raises:
        StorageError: the result of one of them cannot be read.
    """
    found: dict[int, dict[int, float]] = {}
    for path in sorted((folder / "seeds").glob("trial-*-seed-*/result.json")):
        _, number, _, seed = path.parent.name.split("-")
        try:
            score = json.loads(path.read_text(encoding="utf-8"))["after"]["dev"][metric]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise StorageError(f"cannot be read ({error})", str(path), "Delete it to run that seed again") from error
        found.setdefault(int(number), {})[int(seed)] = score
    return sorted((SeedScores(number, scores) for number, scores in found.items()), key=lambda s: -s.mean)


def seeds_command(folder: Path) -> str:
    """Return the shell command that trains the best settings of a sweep with three seeds."""
    recipe = shlex.quote(str(folder / "best.yaml"))
    return f"for seed in 1 2 3; do hncse train {recipe} run.seed=$seed run.name=best-seed-$seed; done"


def rank_trials(trials: Sequence[FrozenTrial]) -> list[FrozenTrial]:
    """Return the completed trials, best first; of equals the earlier."""
    done = [t for t in trials if t.state == TrialState.COMPLETE]
    return sorted(done, key=lambda t: (-(t.value or 0.0), t.number))


def best_settings(sweep: Sweep, trial: FrozenTrial) -> Settings:
    """Return the settings of a trial as a run of its own: test sets scored, and the recipe's share of the cluster."""
    name = sweep.settings.run.name[:90]
    return apply_values(sweep.settings, trial.user_attrs["values"], **{"run.name": f"{name}-best"})


def write_best(folder: Path, sweep: Sweep, trial: FrozenTrial) -> Path:
    """Write ``best.yaml``, a recipe that ``hncse train`` takes."""
    score = f"{trial.value:.4f}" if trial.value is not None else "no score"
    head = (
        f"# The best of a sweep: trial {trial.number}, {sweep.metric} {score} on dev.\n"
        f"# Found values: {', '.join(f'{k}={v!r}' for k, v in trial.user_attrs['values'].items())}\n"
    )
    path = folder / "best.yaml"
    write_atomically(path, head + best_settings(sweep, trial).to_yaml())
    return path


def write_trials_csv(folder: Path, trials: Sequence[FrozenTrial]) -> Path:
    """Write ``trials.csv``: a line for each trial, a column for each setting that any of them varies."""
    keys = sorted({key for t in trials for key in t.user_attrs.get("values", {})})
    text = io.StringIO()
    table = csv.writer(text, lineterminator="\n")
    table.writerow(["trial", "state", "score", "best_step", "steps", "seconds", "reason", *keys])
    for t in trials:
        facts, values = t.user_attrs, t.user_attrs.get("values", {})
        score = t.value if t.state == TrialState.COMPLETE else None
        cells = [t.number, STATE_NAMES[t.state], score, facts.get("best_step"), t.last_step, facts.get("seconds"),
                 facts.get("reason"), *(values.get(key) for key in keys)]  # fmt: skip
        table.writerow(["" if cell is None else cell for cell in cells])
    path = folder / "trials.csv"
    write_atomically(path, text.getvalue())
    return path
