"""``hncse report``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from hncse_ray.cli.app import JsonOption, app, command
from hncse_ray.errors import StorageError


@app.command()
def report(
    folder: Annotated[Path, typer.Argument(help="The folder of a run, or of a sweep.")],
    as_json: JsonOption = False,
) -> None:
    """Write the page of a run or a sweep, finished or not: report.html in its folder."""

    def run(console: Console) -> dict[str, Any]:
        kind, path = _write_report(folder)
        console.print(str(path), markup=False, highlight=False)
        return {"kind": kind, "report": str(path)}

    command(run, as_json)


def _write_report(folder: Path) -> tuple[str, Path]:
    """Write the page for what a folder holds; return what that is, and where the page is."""
    if not folder.is_dir():
        raise StorageError("no such folder", str(folder), "Name the folder of a run or of a sweep")
    if (folder / "sweep.yaml").exists() and (folder / "study.db").exists():
        from hncse_ray.cluster.sweep_report import write_sweep_report

        return "sweep", write_sweep_report(folder)
    if (folder / "settings.yaml").exists():
        from hncse_ray.reporting.run_page import write_run_page

        return "run", write_run_page(folder)
    raise StorageError(
        "holds neither a run nor a sweep", str(folder), "A run has settings.yaml; a sweep has sweep.yaml and study.db"
    )
