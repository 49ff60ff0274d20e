"""``hncse data``: evaluation sets, and the sentences that the papers train on."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from hncse_ray.cli.app import JsonOption, app, command, console_reporter
from hncse_ray.storage import check_outlasts_job

data = typer.Typer(
    no_args_is_help=True, help="Fetch evaluation sets, and the papers' sentences.", rich_markup_mode=None
)
app.add_typer(data, name="data")


@data.command()
def sts(
    out: Annotated[Path | None, typer.Option(help="The folder to make; default: where `hncse evaluate` looks.")] = None,
    as_json: JsonOption = False,
) -> None:
    """Fetch SentEval's STS and transfer sets from the Hugging Face hub, checked; go on with a broken-off download."""

    def run(console: Console) -> dict[str, Any]:
        from hncse_ray.reporting import StageProgress
        from hncse_ray.training.senteval import default_folder, fetch_senteval

        if out is not None:
            check_outlasts_job(out, "--out")
        with console_reporter(console) as reporter:
            found = fetch_senteval(out, tell=lambda *facts: reporter.on(StageProgress(*facts)))
        verb = "fetched" if found.fetched else "there already"
        console.print(f"{verb}: {', '.join(found.tasks)} ({found.files} files) -> {found.folder}", markup=False)
        if Path(found.folder).absolute() != default_folder():
            console.print(f"hncse evaluate takes them with --senteval {found.folder}", markup=False)
        return asdict(found)

    command(run, as_json, resumes=True)


@data.command()
def wiki1m(
    out: Annotated[Path, typer.Option(help="The file to make; the papers' recipes look for this one.")] = Path(
        "wiki1m_for_simcse.txt"
    ),
    as_json: JsonOption = False,
) -> None:
    """Fetch the million Wikipedia sentences of SimCSE, HNCSE and IS-CSE from the Hugging Face hub, checked."""

    def run(console: Console) -> dict[str, Any]:
        from hncse_ray.reporting import StageProgress
        from hncse_ray.training.simcse_files import fetch_wiki1m

        check_outlasts_job(out, "--out")
        with console_reporter(console) as reporter:
            found = fetch_wiki1m(out, tell=lambda *facts: reporter.on(StageProgress(*facts)))
        verb = "fetched" if found.fetched else "there already"
        console.print(f"{verb}: {found.path}", markup=False)
        return asdict(found)

    command(run, as_json, resumes=True)
