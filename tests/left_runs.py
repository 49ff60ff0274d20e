"""Folders of runs as the real reporters leave them, without a run."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from hncse_ray.config import load_settings
from hncse_ray.reporting import MetricsFile, RunFinished, RunStarted
from hncse_ray.reporting.events import Evaluated, StepsLogged, Verdict
from hncse_ray.tuning import Sweep, SweepOptions, SweepStudy, claim_sweep_folder, parse_space

METRIC = "python-docs/recall@10"
POOL = {
    "negative_similarity": 0.5,
    "negatives/index_age_steps": 20.0,
    "negatives/index_step": 80.0,
    "negatives/usable": 1.0,
    "negatives/waited": 0.25,
    "negatives/missing": 0.0,
    "negatives/partial": 0.0,
    "negatives/index_similarity": 0.625,
    "negatives/search_ms_p50": 30.0,
    "negatives/search_ms_p99": 90.0,
    "negatives/removed_itself": 16.0,
    "negatives/removed_max_score": 0.0,
    "negatives/shards_alive": 2.0,
    "negatives/build_seconds": 0.5,
    "negatives/build_rows_per_s": 1234.0,
    "negatives/failed_builds": 0.0,
}


def leave_run(folder: Path, *, finished: bool = True, steps: int = 3, extra: dict[str, float] | None = None) -> None:
    """Leave what the real reporter writes: scores 0.5, 0.75, 0.625 at steps 0, 10, 20."""
    evaluation = {"suites": ["python-docs"], "metric": METRIC}
    settings = load_settings({"run": {"name": "small"}, "corpus": {"source": "python-docs"}, "evaluation": evaluation})
    folder.mkdir(exist_ok=True)
    (folder / "settings.yaml").write_text(settings.to_yaml(), encoding="utf-8")
    reporter = MetricsFile(folder / "metrics.jsonl")
    reporter.on(RunStarted("small", 0, 30, 100, 16, 1, "cpu", "fp32", resumed=False))
    for i, score in enumerate((0.5, 0.75, 0.625)[:steps]):
        if i:
            metrics = {
                "loss": 1 / i,
                "positive_similarity": 0.9,
                "hardest_negative_similarity": 0.5,
                "uniformity": -2.0,
            }
            reporter.on(StepsLogged(10 * i, metrics | (extra or {}), 1e-4 / i, 250.0))
        reporter.on(Evaluated(10 * i, "dev", {METRIC: score, "python-docs/mrr": 0.25}, METRIC, i < 2))
    if finished:
        before = {"dev": {METRIC: 0.5}, "test": {METRIC: 0.625}}
        after = {"dev": {METRIC: 0.75}, "test": {METRIC: 0.5, "python-docs/mrr": 76.5}}
        verdict = Verdict(10, 0.75, 0.0, METRIC, 0.5, 0.75, 0.1, 0.4, tried=3)
        reporter.on(verdict)
        result = RunFinished(20, 10, 240.5, False, before, after, verdict)
        (folder / "result.json").write_text(json.dumps(asdict(result)), encoding="utf-8")


def leave_samples(folder: Path, **changes: Any) -> None:
    """Four sentences and a query: the neighbours of the first change, those of the others do not."""
    texts = ["How to sort a list.", "Return <b>sorted</b> values.", "Open a file.", "Close a file."]
    near = [[[1, 0.9]], [[0, 0.9]], [[3, 0.8]], [[2, 0.8]]]
    positions = [[0.0, 0.1], [0.2, -0.1], [0.5, 0.4], [-0.7, -0.4]]
    before = {"neighbours": near, "query_neighbours": [[[1, 0.9], [0, 0.5]]], "map": positions, "explained": 0.5}
    turned = [[y, x] for x, y in positions]
    after = before | {"neighbours": [[[2, 0.7]], *near[1:]], "query_neighbours": [[[0, 0.8], [1, 0.6]]], "map": turned}
    sentences = {"texts": texts, "queries": ["sort a list"], "right": [[0]], "before": before, "after": after}
    hits = [
        {"text": texts[1], "cosine": 0.95, "rank": 1, "fate": "max_score", "is_target": False},
        {"text": texts[2], "cosine": 0.55, "rank": 2, "fate": "taken", "is_target": False},
    ]
    negatives = {"index_step": 8, "anchors": [{"anchor": texts[0], "target": None, "hits": hits}]}
    cosines = {"bins": [-1.0, -0.5, 0.0, 0.5, 1.0], "positive": [0, 0, 0, 4], "in batch": [0, 6, 6, 0]}
    rows = [{"step": step, "similarities": cosines} for step in (1, 5, 10, 15, 20)]
    rows = [*rows, {"step": 20, "sentences": sentences}, {"step": 20, "negatives": negatives}]
    text = "".join(json.dumps(row | {key: changes[key] for key in changes if key in row}) + "\n" for row in rows)
    (folder / "samples.jsonl").write_text(text, encoding="utf-8")


def leave_sweep(folder: Path) -> None:
    """A sweep whose second trial is the better one, as the tune command keeps it."""
    space = {"parameters": {"objective.temperature": {"loguniform": [0.01, 0.2]}}}
    sweep = Sweep(load_settings("quickstart"), parse_space(space, "space"), SweepOptions(trials=2))
    with claim_sweep_folder(folder, sweep):
        study = SweepStudy(folder, sweep.space, seed=0, stopping="none", grace=10, accepts=lambda values: None)
        for score in (0.5, 0.625):
            task = study.next()
            study.report(task.number, 10, 0.25)
            study.report(task.number, 20, score)
            study.complete(task.number, {"seconds": 3.0, "best_step": 20})
