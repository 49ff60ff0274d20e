"""``hncse submit``."""

from __future__ import annotations

import os
from contextlib import chdir
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from hncse_ray.cli.app import JsonOption, app, command, plain_console
from hncse_ray.cli.tune import sweep_of
from hncse_ray.config import LOCAL_IS_ONE, Settings, load_settings
from hncse_ray.errors import SettingsError
from hncse_ray.storage import check_outlasts_job

# Arguments of commands that name what is read.
_READ = ("recipe", "space", "resume", "models", "model", "corpus", "texts", "pairs", "data", "senteval")


@app.command(
    options_metavar="[OPTIONS BEFORE COMMAND]",
    context_settings={"ignore_unknown_options": True, "allow_interspersed_args": False},
)
def submit(
    job: Annotated[str, typer.Argument(help="train, tune, evaluate, mine, prepare, ...", metavar="COMMAND")],
    args: Annotated[list[str] | None, typer.Argument(help="Its arguments and options.", metavar="ARGS")] = None,
    address: Annotated[
        str | None,
        typer.Option(
            help="The cluster's job server, http://HOST:8265. Default: $RAY_API_SERVER_ADDRESS, $RAY_ADDRESS."
        ),
    ] = None,
    working_dir: Annotated[
        Path, typer.Option(help="The folder that is uploaded, and that the job starts in.")
    ] = Path(),
    env: Annotated[
        list[str] | None, typer.Option(help="A variable that the job gets too, by name; may be repeated.")
    ] = None,
    cpus: Annotated[float, typer.Option(min=0, help="CPUs for the command's own process.")] = 0,
    gpus: Annotated[float, typer.Option(min=0, help="GPUs for the command's own process, as evaluate uses them.")] = 0,
    stop_on_interrupt: Annotated[bool, typer.Option(help="Ctrl-C stops the job; otherwise it runs on.")] = False,
    wait: Annotated[bool, typer.Option(help="Follow the log to the end, or only print the job's id.")] = True,
    as_json: JsonOption = False,
) -> None:
    """Run another command as a job on a cluster, and show its log; exit with its exit status."""
    status = 0

    def run(console: Console) -> dict[str, Any]:
        nonlocal status
        _check_command(job, args or [])
        files = _check_arguments(job, args or [], working_dir)
        _use_token()
        from hncse_ray.cluster.submit import JobRequest, submit_job

        request = JobRequest((job, *(args or [])), working_dir, tuple(env or ()), cpus, gpus, files)
        submitted = submit_job(request, address=address)
        facts = {"job_id": submitted.id, "address": submitted.address}
        if not wait:
            if not as_json:
                typer.echo(submitted.id)
            return facts | {"status": submitted.outcome().status, "exit_code": None}
        console.print(f"job {submitted.id} on {submitted.address}", style="dim", highlight=False)
        try:
            outcome = submitted.follow(lambda text: _write(console, text))
        except KeyboardInterrupt:
            if not stop_on_interrupt:
                hint = submitted.hint()
                plain_console(stderr=True).print(f"the job runs on. {hint}", style="yellow", highlight=False)
                raise typer.Exit(130) from None
            outcome = submitted.stop()
            status = 130
        status = status or outcome.exit_code or 0
        if outcome.message:
            plain_console(stderr=True).print(outcome.message, style="red", markup=False, highlight=False)
        console.print(f"job {submitted.id} {outcome.status}", style="dim", highlight=False)
        return facts | {"status": outcome.status, "exit_code": status}

    command(run, as_json)
    if status:
        raise typer.Exit(status)


def _use_token() -> None:
    """Have Ray show its token if there is one; it looks at the mode when it is imported."""
    named = os.environ.get("RAY_AUTH_TOKEN") or os.environ.get("RAY_AUTH_TOKEN_PATH")
    if named or os.path.isfile(os.path.expanduser("~/.ray/auth_token")):
        os.environ.setdefault("RAY_AUTH_MODE", "token")


def _write(console: Console, text: str) -> None:
    console.file.write(text)
    console.file.flush()


def _check_command(job: str, args: list[str]) -> None:
    """Refuse what is no command, and options of this one among those of the other."""
    names = [c.name or getattr(c.callback, "__name__", "") for c in app.registered_commands]
    if job not in names or job == "submit":
        jobs = ", ".join(name for name in names if name != "submit")
        raise SettingsError("is not a command that can be submitted", job or repr(job), f"Choose from {jobs}")
    if "cluster.engine=local" in args:  # one in a recipe is refused where the job runs
        raise SettingsError(f"{LOCAL_IS_ONE}, and a job is on a cluster", "cluster.engine", "Leave it out")
    mine = {
        "--address",
        "--working-dir",
        "--env",
        "--stop-on-interrupt",
        "--no-stop-on-interrupt",
        "--wait",
        "--no-wait",
    }
    if misplaced := [arg for arg in args if arg.partition("=")[0] in mine]:
        raise SettingsError(f"is an option of submit, not of {job}", misplaced[0], f"Write it before {job!r}")


def _check_arguments(job: str, args: list[str], folder: Path) -> tuple[str, ...]:
    """Refuse what the command would refuse wherever it runs: its options, and settings of recipes that are uploaded.

    Returns:
        What it reads, if that is a file or a folder.
    """
    commands: Any = typer.main.get_command(app)
    given = commands.commands[job].make_context(f"hncse {job}", list(args)).params
    recipes = (given.get("recipe"), given.get("space"))
    read_by_it = [name for key in _READ for name in _names(given.get(key))]
    theirs = any(os.path.isabs(file or "") for file in recipes) or given.get("resume") is not None
    package = folder / "hncse_ray"  # another version, if it is uploaded, knows other settings
    theirs = theirs or (package.is_dir() and not package.samefile(Path(__file__).parents[1]))
    if job not in ("prepare", "train", "tune") or theirs or not folder.is_dir():
        return tuple(read_by_it)

    def read(overrides: list[str]) -> tuple[Settings, str | Path, str]:
        if job == "tune":
            sweep, out = sweep_of(**given | {"overrides": overrides})
            return sweep.settings, out, "--out"
        settings = load_settings(given["recipe"], overrides)
        return settings, settings.run.storage_path, "run.storage_path"

    overrides = given["overrides"] or []
    with chdir(folder):
        try:
            settings, place, setting = read(overrides)
        except SettingsError as error:
            try:  # `auto` is documents where a folder lies that only the cluster sees
                settings, place, setting = read([*overrides, "corpus.source=documents"])
            except SettingsError:
                raise error from None
    if job != "prepare":
        check_outlasts_job(place, setting, in_job=True)
    return (*read_by_it, settings.encoder.model, *settings.corpus.path)


def _names(value: Any) -> list[str]:
    """Return the names in the value of an argument: one, several, or several joined by commas."""
    values = value if isinstance(value, list) else [] if value is None else [value]
    return [name for each in values for name in str(each).split(",") if name]
