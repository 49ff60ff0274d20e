"""The tune command: Ray Tune runs trials side by side, each a training of its own with its own negative pool.

The study in the sweep's folder (:mod:`hncse_ray.tuning`) decides what is tried and what is stopped. Ray Tune starts and
stops the trials, and knows nothing that a kill could lose.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import ray
import ray.tune
import torch
from optuna.trial import FrozenTrial
from ray.tune import FailureConfig, RunConfig, TuneConfig, Tuner
from ray.tune.schedulers import TrialScheduler

from hncse_ray.cluster.placement import survey, without_orphaned_groups
from hncse_ray.cluster.resources import SweepPlan, plan_sweep
from hncse_ray.cluster.session import named_cluster, ray_session
from hncse_ray.cluster.sweep_report import write_sweep_report
from hncse_ray.cluster.sweep_scheduler import NextTrial, StudyScheduler, Watcher, free_space, trial_folder
from hncse_ray.cluster.trial import run_trial
from hncse_ray.config import LOCAL_IS_ONE, Settings
from hncse_ray.encoder import load_encoder
from hncse_ray.errors import ClusterError, HncseError, SettingsError, StorageError, TrainingError, counted
from hncse_ray.reporting import LineReporter, Reporter
from hncse_ray.reporting.sweep import SweepLines, SweepReporter
from hncse_ray.storage import check_outlasts_job, write_folder
from hncse_ray.training import load_evaluation_sets
from hncse_ray.training.checks import check_run
from hncse_ray.training.encoding import ShardedEncode
from hncse_ray.training.objective_check import check_objectives
from hncse_ray.tuning import (
    STATE_NAMES,
    SeedScores,
    Sweep,
    SweepStudy,
    TrialTask,
    Values,
    apply_values,
    claim_sweep_folder,
    rank_trials,
    read_seed_scores,
    seed_run_name,
    write_best,
    write_trials_csv,
)

_QUIET = {
    "RAY_AIR_NEW_OUTPUT": "0",  # no table of Ray Tune's own
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",  # the runs have records of their own
    "TUNE_DISABLE_STRICT_METRIC_CHECKING": "1",  # the last report of a trial has no score
    "TUNE_DISABLE_SIGINT_HANDLER": "1",  # Ctrl-C ends a sweep as it ends any command
}
_RETRIES = 1  # of a run whose driver died: it goes on from its checkpoint


@dataclass(frozen=True)
class SweepResult:
    """What a finished sweep leaves.

    Attributes:
        folder: of the sweep.
        best_trial: number of the chosen trial.
        metric: what was maximised, as ``suite/metric``.
        score: of the chosen settings on dev: the mean over further seeds if there are any, else the trial's.
        values: the chosen settings.
        recipe: ``best.yaml``.
        model: the best model.
        trials: how many ended in each state.
        seeds: scores of the best settings with further seeds, best first.
        before: test scores of the model that all began with.
        after: test scores of ``model``; these sets were scored for no other trial.
    """

    folder: str
    best_trial: int
    metric: str
    score: float
    values: Values
    recipe: str
    model: str
    trials: Mapping[str, int]
    seeds: tuple[SeedScores, ...]
    before: Mapping[str, float]
    after: Mapping[str, float]


def tune(
    sweep: Sweep, folder: str | Path, *, reporter: SweepReporter | None = None, progress: Reporter | None = None
) -> SweepResult:
    """Run a sweep to its end, from where it stands if it was interrupted.

    Args:
        sweep: recipe, space and options.
        folder: where all of it lies.
        reporter: receives how the trials stand.
        progress: receives the progress of preparing the corpus.

    Raises:
        HncseError: before anything is started, if the space, the data, the model or the cluster cannot be used;
            at the end, if no trial came to a score.
    """
    if not isinstance(sweep, Sweep):
        raise SettingsError(f"is no Sweep, but of type {type(sweep).__name__}", "sweep",
                            "Make it by hncse_ray.load_sweep(recipe, space)")  # fmt: skip
    if "://" in (place := os.fspath(folder)) or not place:
        raise StorageError("is no folder", repr(place), "Name one by --out, local or a network mount")
    check_outlasts_job(folder, "--out")
    reporter = reporter or SweepLines()
    folder, base, options = Path(folder), sweep.settings, sweep.options
    sweep.space.check(base)
    extremes = [base, *(apply_values(base, values) for values, _ in sweep.space.extremes(base))]
    if any(settings.cluster.engine == "local" for settings in extremes):
        raise SettingsError(f"{LOCAL_IS_ONE}, and a sweep runs many", "cluster.engine", "Set cluster.engine=ray")
    if not ray.is_initialized() and named_cluster() is None:  # what Ray started here will have
        here = {"CPU": float(os.cpu_count() or 1), "GPU": float(torch.cuda.device_count())}
        plan_sweep(extremes, [here], max_concurrent=options.max_concurrent)
    with claim_sweep_folder(folder, sweep):
        encoder, _, _ = check_run(base, progress or LineReporter())  # prepares the corpus that the trials share, too
        check_objectives(extremes, model=base.encoder.model, dimension=encoder.dimension)
        study = SweepStudy(
            folder,
            sweep.space,
            seed=base.run.seed,
            stopping=options.stopping,
            grace=sweep.grace_steps,
            accepts=lambda values: _misfit(base, values),
        )
        left = study.unfinished(options.trials)
        if left < options.trials:
            reporter.tell(f"trials done: {options.trials - left} of {options.trials}")
        if left or options.seeds:
            with ray_session():
                there = [node.resources for node in survey().alive]
                plan = plan_sweep(extremes, there, max_concurrent=options.max_concurrent)
                reporter.tell(
                    f"{counted(plan.concurrent, 'trial')} at a time, {counted(plan.cpus_per_worker, 'CPU')} a worker"
                )
                if left:
                    _run_trials(sweep, folder, study, plan, left, reporter)
                if options.seeds:
                    _run_seeds(sweep, folder, rank_trials(study.finished()), plan, reporter)
        reporter.close()
        return _finish(sweep, folder, study)


def _misfit(base: Settings, values: Values) -> str | None:
    """Say why values do not fit together; None if they do."""
    try:
        apply_values(base, values)
    except HncseError as error:
        return str(error)
    return None


def _run_trials(
    sweep: Sweep, folder: Path, study: SweepStudy, plan: SweepPlan, left: int, reporter: SweepReporter
) -> None:
    def job(task: TrialTask) -> dict[str, Any]:
        settings = _run_settings(sweep, task.values, plan, trial_folder(folder, task.number))
        return {"name": str(task.number), "number": task.number, "values": task.values, "settings": settings}

    searcher = NextTrial(study, job)
    _fit(sweep, plan, StudyScheduler(study, reporter, folder), search_alg=searcher, num_samples=left)
    if searcher.error is not None:
        raise searcher.error


def _run_seeds(
    sweep: Sweep, folder: Path, ranked: Sequence[FrozenTrial], plan: SweepPlan, reporter: SweepReporter
) -> None:
    """Train the best settings with seeds that they were not chosen by; a run that is finished is not run again."""
    top = ranked[: sweep.options.top]
    first = sweep.settings.run.seed + 1
    jobs = []
    for trial in top:
        values = trial.user_attrs["values"]
        for seed in range(first, first + sweep.options.seeds):
            place = folder / "seeds" / seed_run_name(trial.number, seed)
            settings = _run_settings(sweep, values | {"run.seed": seed}, plan, place)
            jobs.append({"name": f"{trial.number} seed {seed}", "values": values, "settings": settings})
    if jobs:
        reporter.tell(f"training the best {len(top)} with {counted(sweep.options.seeds, 'further seed')} each")
        _fit(sweep, plan, Watcher(reporter), {"job": ray.tune.grid_search(jobs)})
        for run in (folder / "seeds").iterdir():  # the models stay: with more seeds another may turn out the best
            free_space(run, keep_model=True)


def _run_settings(sweep: Sweep, values: Values, plan: SweepPlan, place: Path) -> dict[str, Any]:
    """Return the settings of one run, as a tree: its values, its share of the cluster, its folder; no test sets."""
    fixed: dict[str, Any] = {
        "run.name": place.name,
        "run.storage_path": str(place.parent.absolute()),
        "cluster.cpus_per_worker": plan.cpus_per_worker,
        "cluster.min_workers": None,  # as many workers from its start to its end
        "evaluation.test": False,
    }
    if sweep.settings.negatives.threads_per_shard is None and plan.concurrent > 1:
        fixed["negatives.threads_per_shard"] = max(1, int(plan.cpus_per_worker))
    return apply_values(sweep.settings, values, **fixed).model_dump(mode="json")


def _fit(
    sweep: Sweep, plan: SweepPlan, scheduler: TrialScheduler, param_space: dict[str, Any] | None = None, **trials: Any
) -> None:
    """Let Ray Tune run, with each run's process on this node, beside the sweep's folder."""
    here = next(n for n in ray.nodes() if n["NodeID"] == ray.get_runtime_context().get_node_id())
    place = next(name for name in here["Resources"] if name.startswith("node:") and "internal" not in name)
    os.environ.update(_QUIET)
    scratch = tempfile.mkdtemp(prefix="hncse-tune-")  # Ray Tune's own state is of no use to us: the study has it all
    try:
        # A run in one process is resumed as often as Ray Train would start its worker again.
        retries = sweep.settings.cluster.max_failures if plan.in_one_process else _RETRIES
        run_config = RunConfig(
            name="sweep", storage_path=scratch, verbose=0, failure_config=FailureConfig(max_failures=retries)
        )
        share = {"CPU": plan.cpus_per_worker} | ({"GPU": plan.gpus_per_worker} if plan.gpus_per_worker else {})
        with without_orphaned_groups():
            Tuner(
                ray.tune.with_resources(
                    partial(run_trial, in_one_process=plan.in_one_process, place=os.getcwd()),
                    {place: 0.001} | (share if plan.in_one_process else {}),
                ),
                param_space=param_space,
                tune_config=TuneConfig(
                    scheduler=scheduler,
                    max_concurrent_trials=plan.concurrent,
                    reuse_actors=plan.in_one_process,
                    **trials,
                ),
                run_config=run_config,
            ).fit()
    except ray.tune.TuneError as error:
        raise ClusterError(f"Ray Tune could not run the trials ({error})") from error
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _finish(sweep: Sweep, folder: Path, study: SweepStudy) -> SweepResult:
    """Choose, export the best model and score it on the test sets: the only time that these are looked at."""
    trials = study.finished()
    ranked = rank_trials(trials)
    write_trials_csv(folder, trials)
    if not ranked:
        write_sweep_report(folder)
        reasons = Counter(t.user_attrs.get("reason", STATE_NAMES[t.state]) for t in trials)
        raise TrainingError(f"no trial came to a score; most often: {reasons.most_common(1)[0][0]}", str(folder))
    best, score = ranked[0], float(ranked[0].value or 0.0)
    run = trial_folder(folder, best.number)
    seeds = read_seed_scores(folder, sweep.metric) if sweep.options.seeds else []
    if seeds:
        best = next(t for t in ranked if t.number == seeds[0].number)
        score, by_seed = seeds[0].mean, seeds[0].scores
        run = folder / "seeds" / seed_run_name(best.number, max(by_seed, key=lambda seed: by_seed[seed]))
    write_folder(folder / "model", lambda new: shutil.copytree(run / "model", new, dirs_exist_ok=True))
    recipe = write_best(folder, sweep, best)
    write_sweep_report(folder)
    evaluation = sweep.settings.evaluation.model_copy(update={"test": True})
    sets = load_evaluation_sets(evaluation, sweep.settings.corpus)
    models = ((sweep.settings.encoder.model, sweep.settings.encoder), (folder / "model", None))
    before, after = (sets.score(ShardedEncode(load_encoder(*model), evaluation.batch_size), "test") for model in models)
    return SweepResult(
        folder=str(folder),
        best_trial=best.number,
        metric=sweep.metric,
        score=score,
        values=best.user_attrs["values"],
        recipe=str(recipe),
        model=str(folder / "model"),
        trials=dict(Counter(STATE_NAMES[t.state] for t in trials)),
        seeds=tuple(seeds),
        before=before,
        after=after,
    )
