"""``hncse report``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from rich.console import Console

from hncse_ray.cli.app import JsonOption, app, command
from hncse_ray.errors import SettingsError, StorageError

Projection = Literal["pca", "umap"]  # as in reporting/projection.py, which imports numpy


@app.command()
def report(
    folders: Annotated[list[Path], typer.Argument(help="The folder of a run, or of a sweep; or of several runs.")],
    out: Annotated[Path | None, typer.Option(help="Of several runs: the page to write.  [default: runs.html]")] = None,
    projection: Annotated[
        Projection,
        typer.Option("--map", help="Of one run: the map of its sentences; umap needs the extra of that name."),
    ] = "pca",
    as_json: JsonOption = False,
) -> None:
    """Write the page of a run or a sweep, finished or not: report.html in its folder; of several runs, side by side."""

    def run(console: Console) -> dict[str, Any]:
        for folder in folders:
            if not folder.is_dir():
                raise StorageError("no such folder", str(folder), "Name the folder of a run or of a sweep")
        kind, path = (
            _write_report(folders[0], out, projection)
            if len(folders) == 1
            else _write_comparison(folders, out, projection)
        )
        console.print(str(path), markup=False, highlight=False)
        return {"kind": kind, "report": str(path)}

    command(run, as_json)


def _write_report(folder: Path, out: Path | None, projection: Projection) -> tuple[str, Path]:
    """Write the page for what a folder holds; return what that is, and where the page is."""
    if out is not None:
        raise SettingsError("is for several runs: the page of one lies in its folder", "--out")
    if (folder / "sweep.yaml").exists() and (folder / "study.db").exists():
        _refuse_map(projection)
        from hncse_ray.cluster.sweep_report import write_sweep_report

        return "sweep", write_sweep_report(folder)
    if (folder / "settings.yaml").exists():
        from hncse_ray.reporting.run_page import write_run_page

        return "run", write_run_page(folder, projection=projection)
    raise StorageError(
        "holds neither a run nor a sweep", str(folder), "A run has settings.yaml; a sweep has sweep.yaml and study.db"
    )


def _write_comparison(folders: list[Path], out: Path | None, projection: Projection) -> tuple[str, Path]:
    from hncse_ray.reporting.runs_page import write_runs_page

    _refuse_map(projection)
    for folder in folders:
        if not (folder / "settings.yaml").exists():
            raise StorageError("holds no run", str(folder), "Runs are compared, and have settings.yaml")
    return "runs", write_runs_page(folders, out or Path("runs.html"))


def _refuse_map(projection: Projection) -> None:
    if projection != "pca":
        raise SettingsError("is for one run: this page has no map", f"--map {projection}")
