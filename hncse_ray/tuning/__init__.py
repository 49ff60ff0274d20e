"""Sweeps without Ray: search spaces, the study that remembers all trials, and the folder that it leaves."""

from hncse_ray.tuning.folder import (
    STATE_NAMES,
    SeedScores,
    Sweep,
    SweepOptions,
    best_settings,
    claim_sweep_folder,
    load_sweep,
    rank_trials,
    read_seed_scores,
    read_sweep,
    seed_run_name,
    seeds_command,
    write_best,
    write_trials_csv,
)
from hncse_ray.tuning.space import SearchSpace, Values, apply_values, parse_space
from hncse_ray.tuning.study import SweepStudy, TrialTask, open_study

__all__ = [
    "STATE_NAMES",
    "SearchSpace",
    "SeedScores",
    "Sweep",
    "SweepOptions",
    "SweepStudy",
    "TrialTask",
    "Values",
    "apply_values",
    "best_settings",
    "claim_sweep_folder",
    "load_sweep",
    "open_study",
    "parse_space",
    "rank_trials",
    "read_seed_scores",
    "read_sweep",
    "seed_run_name",
    "seeds_command",
    "write_best",
    "write_trials_csv",
]
