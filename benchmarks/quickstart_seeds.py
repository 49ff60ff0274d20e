"""What does the quickstart gain? Its test scores before and after, over several seeds.

Runs ``recipes/quickstart.yaml`` as ``hncse train`` does, once a seed and objective. The checkpoint is chosen on the dev
half of the names, the gain is reported on the test half.

    python benchmarks/quickstart_seeds.py --seeds 0 1 2 --objectives hybrid info_nce --out result.json

`--runs FOLDER` keeps the runs, to score their models on more suites: FOLDER/hybrid-0/model.
"""

import argparse
import json
import statistics
import tempfile
from pathlib import Path

import torch
from hardware import provenance

from hncse_ray import load_settings, train
from hncse_ray.cluster import ray_session

METRICS = ("python-docs/recall@1", "python-docs/recall@10", "python-docs/mrr")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--objectives", nargs="+", default=["hybrid"])
    parser.add_argument("--runs", type=Path, help="keep the runs in this folder")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    result: dict[str, object] = provenance(torch.device("cpu")) | {"recipe": "quickstart", "seeds": args.seeds}
    with tempfile.TemporaryDirectory() as scratch, ray_session():
        folder = args.runs.absolute() if args.runs else scratch
        for objective in args.objectives:
            runs = []
            for seed in args.seeds:
                overrides = [f"run.storage_path={folder}", f"run.name={objective}-{seed}", f"run.seed={seed}"]
                settings = load_settings("quickstart", [*overrides, f"objective.name={objective}"])
                runs.append(train(settings))
            summary = {}
            for metric in METRICS:
                before, after = ([getattr(r, when)["test"][metric] for r in runs] for when in ("before", "after"))
                gains = [new - old for new, old in zip(after, before, strict=True)]
                spread = statistics.stdev(gains) if len(gains) > 1 else 0.0
                summary[metric] = {
                    "before": statistics.mean(before),
                    "after": statistics.mean(after),
                    "gain": statistics.mean(gains),
                    "gain_stdev": spread,
                    "gains": gains,
                }
                change = f"{statistics.mean(before):.4f} -> {statistics.mean(after):.4f}"
                gain = f"{statistics.mean(gains):+.4f} +- {spread:.4f}"
                print(f"{objective:20s} test {metric:24s} {change}  gain {gain}", flush=True)
            result[objective] = summary | {"best_steps": [r.best_step for r in runs]}
    if args.out:
        args.out.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
