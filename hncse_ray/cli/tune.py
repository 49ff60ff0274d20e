"""``hncse tune``."""

from __future__ import annotations

import os
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from hncse_ray.cli.app import JsonOption, OverridesArgument, app, command, console_reporter
from hncse_ray.errors import SettingsError

if TYPE_CHECKING:
    from hncse_ray.cluster.sweep import SweepResult
    from hncse_ray.tuning import Sweep


@app.command()
def tune(
    recipe: Annotated[str | None, typer.Argument(help="A YAML file, or the name of a recipe.")] = None,
    overrides: OverridesArgument = None,
    space: Annotated[str | None, typer.Option(help="What to vary: a YAML file, or the name of a search space.")] = None,
    trials: Annotated[int | None, typer.Option(help="How many settings to try.  [default: 20]")] = None,
    metric: Annotated[str | None, typer.Option(help="The dev metric to maximise; default: the recipe's.")] = None,
    max_concurrent: Annotated[int | None, typer.Option(help="Trials side by side; default: what fits.")] = None,
    stopping: Annotated[
        str | None, typer.Option(help="Stop poor trials by: asha, median, none.  [default: asha]")
    ] = None,
    grace_steps: Annotated[
        int | None, typer.Option(help="Steps every trial gets; default: to the first score.")
    ] = None,
    seeds: Annotated[int | None, typer.Option(help="Train the best again with so many further seeds.")] = None,
    top: Annotated[int | None, typer.Option(help="How many of the best that is done for.  [default: 3]")] = None,
    out: Annotated[str | None, typer.Option(help="The sweep's folder; default: STORAGE/NAME-SPACE.")] = None,
    resume: Annotated[Path | None, typer.Option(help="Go on with the sweep in this folder.")] = None,
    as_json: JsonOption = False,
) -> None:
    """Search the settings of a recipe: many short runs, the poor ones stopped early."""
    given = locals()

    def run(console: Console) -> dict[str, Any]:
        sweep, folder = sweep_of(**given)
        from hncse_ray.cluster.sweep import tune as run_tune
        from hncse_ray.reporting.sweep import SweepLines, SweepTable

        reporter = SweepTable(console) if console.is_terminal else SweepLines()
        with console_reporter(console) as progress:
            try:
                result = run_tune(sweep, folder, reporter=reporter, progress=progress)
            finally:
                reporter.close()
        _print_result(console, result)
        return asdict(result)

    command(run, as_json, resumes=True)


def sweep_of(
    *,
    recipe: str | None,
    overrides: list[str] | None,
    space: str | None,
    metric: str | None,
    out: str | None,
    resume: Path | None,
    as_json: bool,
    **options: Any,
) -> tuple[Sweep, str | Path]:
    """Put together which sweep is asked for by the arguments of the command, and where it lies."""
    from hncse_ray.tuning import load_sweep, read_sweep

    options = {name: value for name, value in options.items() if value is not None}
    if resume is not None:
        for name, value in (("a recipe", recipe), ("--space", space), ("--metric", metric), ("--out", out)):
            if value is not None:
                raise SettingsError(f"and {name} cannot be given together: the folder says all", "--resume")
        stored = read_sweep(resume)
        return replace(stored, options=replace(stored.options, **options)), resume
    if recipe is None or space is None:
        raise SettingsError(
            "name a recipe and a search space", "hncse tune", "hncse tune quickstart --space hncse_full"
        )
    changes = [*(overrides or ()), *([] if metric is None else [f"evaluation.metric={metric}"])]
    sweep = load_sweep(recipe, space, changes, **options)
    run = sweep.settings.run
    return sweep, os.path.join(run.storage_path, f"{run.name}-{Path(space).stem}") if out is None else out


def _print_result(console: Console, result: SweepResult) -> None:
    """Print what was found, and the command that goes on from it."""
    from hncse_ray.reporting import score_table
    from hncse_ray.tuning import seeds_command

    if result.seeds:
        table = Table(title=f"{result.metric} on dev, further seeds")
        for column in ("trial", "mean", "sd", "seeds"):
            table.add_column(column, justify="right")
        for row in result.seeds:
            table.add_row(str(row.number), f"{row.mean:.4f}", f"{row.spread:.4f}", str(len(row.scores)))
        console.print(table)
    if result.after:
        console.print(score_table({"test": result.before}, {"test": result.after}))
    counts = ", ".join(f"{count} {state}" for state, count in result.trials.items())
    console.print(f"trials: {counts}; report: {result.folder}/report.html", markup=False, highlight=False)
    values = " ".join(f"{key}={value}" for key, value in result.values.items())
    console.print(f"best: trial {result.best_trial}, {result.metric} {result.score:.4f} on dev: {values}", markup=False)
    console.print("train it with several seeds:", markup=False)
    console.print(f"  {seeds_command(Path(result.folder))}", markup=False, highlight=False)
