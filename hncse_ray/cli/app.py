"""What all commands share: the application, argument types, errors turned into exit status, progress."""

from __future__ import annotations

import errno
import glob
import io
import json
import logging
import os
import select
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.logging import RichHandler

from hncse_ray import __version__
from hncse_ray.config import load_settings
from hncse_ray.errors import HncseError, SettingsError
from hncse_ray.reading.kinds import relative_hint
from hncse_ray.recipe import find_recipe, shipped_folder

if TYPE_CHECKING:
    from hncse_ray.reporting import Reporter

_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class _Commands(typer.Typer):
    """The command line in a process of its own: as other tools, it ends when nobody reads its output any more."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        unread = False

        def leave(number: int, frame: object) -> None:
            nonlocal unread
            given_up = [stream for stream in (sys.stdout, sys.stderr) if _is_unread(stream)]
            for stream in given_up:  # or Python would write what is left, and say that it cannot
                os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
            if given_up:  # else it was a connection's end, which whoever writes to that sees to
                unread = True
                sys.exit(128 + number)

        signal.signal(signal.SIGPIPE, leave)
        _make_streams_usable()
        try:
            try:
                return super().__call__(*args, **kwargs)
            finally:
                sys.stdout.flush()
        except OSError as error:
            if error.errno not in _NO_ROOM:
                raise
            raise SystemExit(_no_room(error).exit_code) from None
        except SystemExit as end:
            if unread:  # Ray's calls pass an exit on with another status
                raise SystemExit(128 + signal.SIGPIPE) from end
            raise


def _is_unread(stream: object) -> bool:
    """Whether a stream writes into a pipe that nobody reads from."""
    if not isinstance(stream, io.TextIOWrapper) or stream.closed:
        return False
    look = select.poll()
    look.register(stream, 0)
    return any(event & select.POLLERR for _, event in look.poll(0))


app = _Commands(
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)


def complete_recipe(typed: str) -> list[str]:
    """Return the recipes and YAML files that begin so."""
    names = [path.stem for path in shipped_folder("recipes").glob("*.yaml")]
    return [name for name in sorted(names) if name.startswith(typed)] + sorted(glob.glob(f"{glob.escape(typed)}*.yaml"))


def complete_setting(typed: str) -> list[str]:
    """Return the sections and settings that begin so."""
    from hncse_ray.config.explain import setting_paths

    return [path for path in dict.fromkeys(setting_paths()) if path.startswith(typed)]


def complete_override(typed: str) -> list[str]:
    """Return the settings that begin so, ready for a value."""
    from hncse_ray.config.reference import reference

    keys = dict.fromkeys(setting.key for section in reference() for setting in section.settings)
    return [f"{key}=" for key in keys if key.startswith(typed)]


RecipeArgument = Annotated[
    str,
    typer.Argument(
        help="A YAML file, or the name of a recipe that comes with hncse_ray.", autocompletion=complete_recipe
    ),
]
CorpusArgument = Annotated[
    str,
    typer.Argument(
        help="A text, JSONL, CSV, TSV or Parquet file, a folder of documents, or a recipe for its corpus.",
        autocompletion=complete_recipe,
    ),
]
OverridesArgument = Annotated[
    list[str] | None,
    typer.Argument(
        help="Settings to change, as section.key=value; of one given twice the last counts.",
        metavar="KEY=VALUE",
        autocompletion=complete_override,
    ),
]
SettingArgument = Annotated[
    str | None,
    typer.Argument(
        help="A section, or a setting such as train.batch_size.",
        metavar="SECTION|KEY",
        autocompletion=complete_setting,
    ),
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON object as the last line of standard output.")]
DeviceOption = Annotated[str, typer.Option(help="auto (a GPU where there is one), cpu, cuda or cuda:N.")]
PrecisionOption = Annotated[str, typer.Option(help="fp32, bf16, or auto: bf16 where the hardware computes in it.")]
RevisionOption = Annotated[str | None, typer.Option(help="Of a hub model: a commit, a tag or a branch.")]
TrustOption = Annotated[bool, typer.Option("--trust-remote-code", help="Run code that comes with the model.")]
PoolingOption = Annotated[str, typer.Option(help="How to pool a model whose folder does not say: mean, cls, ...")]
ModelArgument = Annotated[str, typer.Argument(help="A model folder, a hub name, or package:NAME/FOLDER.")]


@app.callback()
def main(
    version: Annotated[
        bool, typer.Option("--version", is_eager=True, callback=lambda asked: _say_version(asked), help="Say which.")
    ] = False,
) -> None:
    """Train sentence encoders by contrast, from text or from pairs, on a laptop or on a Ray cluster."""


def _say_version(asked: bool) -> None:
    if asked:
        typer.echo(f"hncse_ray {__version__}")
        raise typer.Exit


def command(run: Callable[[Console], dict[str, Any]], as_json: bool, *, resumes: bool = False) -> None:
    """Run a command body; turn its result into JSON and its expected failures into exit status 2.

    Args:
        run: the body; what it returns is printed with ``--json``.
        as_json: whether that was asked for.
        resumes: whether the same command goes on where it was interrupted.
    """
    _make_streams_usable()
    console = plain_console(stderr=as_json)
    _configure_logging(console)
    try:
        _check_surroundings()
        result = run(console)
        if as_json:
            typer.echo(json.dumps(result))
        sys.stdout.flush()
    except HncseError as error:
        raise _refusal(error) from None
    except OSError as error:
        if error.errno in _NO_ROOM:
            raise _no_room(error) from None
        if error.filename is None:  # not about a path that someone gave
            raise
        hint = "See that the path is right and yours to use"
        raise _refusal(HncseError(str(error.strerror), os.fsdecode(error.filename), hint)) from None
    except KeyboardInterrupt:
        _say_stopped(resumes)
        raise typer.Exit(130) from None
    except SystemExit as end:
        if end.code == 128 + signal.SIGTERM:
            _say_stopped(resumes)
        raise


def _say_stopped(resumes: bool) -> None:
    advice = "; the same command again goes on where it stopped" if resumes else ""
    plain_console(stderr=True).print(f"stopped{advice}", style="yellow")


def plain_console(*, stderr: bool) -> Console:
    """Return a console that leaves long lines whole, and ``module:x:`` without a picture in place of ``:x:``."""
    return Console(stderr=stderr, soft_wrap=True, emoji=False)


def _refusal(error: HncseError) -> typer.Exit:
    plain_console(stderr=True).print(f"error: {error}", style="red", markup=False, highlight=False)
    return typer.Exit(2)


def _check_surroundings() -> None:
    """Refuse to begin without what Ray and others need as soon as they are imported: a home, and a present folder."""
    if os.path.expanduser("~") == "~":
        raise HncseError("this user has no home directory", "HOME", "Set HOME to a folder that can be written")
    try:
        os.getcwd()
    except OSError as error:
        raise HncseError(f"the present folder is gone ({error.strerror})", hint="Change to another") from None


def _no_room(error: OSError) -> typer.Exit:
    """Refuse what is full; write no more to it if that is standard output: Python would try again at its end."""
    try:
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return _refusal(HncseError(f"a file or standard output cannot be written ({error.strerror})"))


def _make_streams_usable() -> None:
    """Have characters that a stream cannot take written as escapes; of one that is closed nothing is read or seen."""
    if sys.stdin is None:
        sys.stdin = open(os.devnull)
    if sys.stdout is None:
        sys.stdout = open(os.devnull, "w")
    if sys.stderr is None:
        sys.stderr = open(os.devnull, "w")
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


class _Lines(logging.StreamHandler[IO[str]]):
    """Writes lines; if nobody reads them any more, the main thread learns it, and ends the command."""

    def handleError(self, record: logging.LogRecord) -> None:
        if isinstance(sys.exc_info()[1], BrokenPipeError):
            signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGPIPE)
        else:
            super().handleError(record)


def _configure_logging(console: Console) -> None:
    """Show warnings, and where no progress bar can be drawn also the lines of progress."""
    logger = logging.getLogger("hncse_ray")
    logger.setLevel(logging.INFO)
    logger.propagate = False
    if not logger.handlers:
        handler: logging.Handler
        if console.is_terminal:
            handler = RichHandler(console=console, show_time=False, show_path=False, level=logging.WARNING)
            # The lines of a run are for its log file: here its bars show the same.
            handler.addFilter(lambda record: record.name != "hncse_ray.reporting.reporters")
        else:
            handler = _Lines(console.file)
            handler.setFormatter(logging.Formatter("%(message)s"))
        logger.addHandler(handler)


@contextmanager
def console_reporter(console: Console) -> Iterator[Reporter]:
    """Show progress while the context lasts: bars in a terminal, lines elsewhere."""
    from hncse_ray.reporting import LineReporter, TerminalReporter

    reporter = TerminalReporter(console) if console.is_terminal else LineReporter()
    try:
        yield reporter
    finally:
        reporter.close()


def run_job(script: str) -> None:
    """Run the command that a script in jobs/ is named after, with the script's arguments."""
    app([Path(script).stem, *sys.argv[1:]])


def encoder_tree(pooling: str, precision: str, revision: str | None, trust_remote_code: bool) -> dict[str, Any]:
    """Return the section ``encoder`` of the options that load a model; all else is as its folder says."""
    return {
        "pooling": pooling,
        "inference_precision": precision,
        "revision": revision,
        "trust_remote_code": trust_remote_code,
    }


def counter(reporter: Reporter, stage: str) -> Callable[[int, int], None]:
    """Return a callback that reports how far a stage is."""
    from hncse_ray.reporting import StageProgress

    return lambda done, total: reporter.on(StageProgress(stage, done, total))


def corpus_tree(corpus: str, model: str) -> dict[str, Any]:
    """Return settings of a model and a corpus: files or a folder, read as their names say, or that of a recipe.

    A name without an ending, where nothing is called so, is that of a recipe.
    """
    path, max_length = Path(corpus), 128
    tree: dict[str, Any] = {"corpus": {"path": corpus}}
    if path.suffix in ("", ".yaml", ".yml") and not (path.suffix == "" and corpus and path.exists()):
        if path.suffix == "":
            try:
                find_recipe(corpus)
            except SettingsError as error:
                hints = (
                    "The corpus comes behind the model, before what is looked for",
                    relative_hint(path),
                    error.hint,
                )
                raise SettingsError("is no file, no folder and no recipe", repr(corpus),
                                    ". ".join(filter(None, hints))) from error  # fmt: skip
        recipe = load_settings(corpus)
        tree = {"corpus": recipe.corpus.model_dump(), "run": {"seed": recipe.run.seed}}  # the seed chooses the sample
        max_length = recipe.encoder.max_length
    return tree | {"encoder": {"model": model, "max_length": max_length}}
