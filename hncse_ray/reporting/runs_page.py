"""Several runs side by side: their scores, the settings in which they differ, their curves over each other."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from hncse_ray.reporting.page import draw, line_figure, write_page
from hncse_ray.reporting.run_page import RunFacts, changed_settings, read_run, series

_OWN = ("run.name", "run.storage_path")  # these differ in any case
_CURVES = (("Loss", "loss"), ("Uniformity", "uniformity"), ("Speed", "sentences_per_s"))


def write_runs_page(run_folders: Sequence[Path], out: Path) -> Path:
    """Write a page that compares runs, finished or not.

    Args:
        run_folders: two or more.
        out: the file to write.

    Returns:
        The page's path.

    Raises:
        StorageError: a folder holds no run or cannot be read, or the page cannot be written.
        SettingsError: settings of a run cannot be read.
    """
    found = [read_run(folder) for folder in run_folders]
    names = [run.name for run in found]
    labels = names if len(set(names)) == len(names) else _short(run_folders)
    runs = dict(zip(labels, found, strict=True))
    cells = {label: {(row["split"], row["metric"]): row for row in run.scores} for label, run in runs.items()}
    return write_page(
        out,
        "runs.html",
        title=f"{len(runs)} runs",
        runs=runs,
        columns=sorted({column for row in cells.values() for column in row}, reverse=True),
        cells=cells,
        differing=_differing(found),
        figures=_figures(runs),
    )


def _short(folders: Sequence[Path]) -> list[str]:
    """Name folders by what they do not share."""
    shared = os.path.commonpath([folder.absolute().parent for folder in folders])
    return [os.path.relpath(folder, shared) for folder in folders]


def _differing(runs: Sequence[RunFacts]) -> dict[str, list[str]]:
    """Return the settings that not all runs have alike, with the value of each run."""
    changed = [changed_settings(run.settings) for run in runs]
    default = {key: its_default for its in changed for key, (_, its_default) in its.items() if key not in _OWN}
    values = {key: [its[key][0] if key in its else default[key] for its in changed] for key in default}
    return {key: row for key, row in values.items() if len(set(row)) > 1}


def _figures(runs: Mapping[str, RunFacts]) -> list[dict[str, Any]]:
    metrics = dict.fromkeys(run.metric for run in runs.values())
    wanted = [(f"{metric} on dev", metric, {name: run.dev for name, run in runs.items()}) for metric in metrics]
    wanted += [(caption, metric, {name: run.logged for name, run in runs.items()}) for caption, metric in _CURVES]
    found = []
    for number, (caption, metric, rows) in enumerate(wanted):
        drawn = {name: points for name, its in rows.items() if (points := series(its, metric))[0]}
        if drawn:
            figure = line_figure(drawn, x_title="optimiser step", y_title=metric)
            found.append({"caption": caption, "figure": draw(figure, f"curves-{number}")})
    return found
