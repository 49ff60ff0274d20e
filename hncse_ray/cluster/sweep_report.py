"""The page of a sweep, from what its folder holds. No Ray here: it works while a sweep runs and after it was killed."""

from __future__ import annotations

from pathlib import Path

from hncse_ray.reporting.sweep_page import SeedRow, write_sweep_page
from hncse_ray.tuning import open_study, read_seed_scores, read_sweep, seeds_command


def write_sweep_report(folder: Path) -> Path:
    """Write ``report.html`` and ``plots/`` into a sweep's folder, as far as the sweep has come; return the page.

    Raises:
        StorageError: the folder holds no sweep, or cannot be read or written.
    """
    sweep, study = read_sweep(folder), open_study(folder)
    trials = study.get_trials(deepcopy=False)
    values = {trial.number: trial.user_attrs.get("values", {}) for trial in trials}
    seeds = [SeedRow(s.number, s.scores, s.mean, s.spread, values[s.number])
             for s in read_seed_scores(folder, sweep.metric)]  # fmt: skip
    return write_sweep_page(
        study,
        folder,
        title=f"Sweep {folder.resolve().name}",
        total_steps=max((t.user_attrs.get("total_steps", t.last_step or 0) for t in trials), default=0),
        metric=sweep.metric,
        command=seeds_command(folder),
        seeds=seeds or None,
    )
