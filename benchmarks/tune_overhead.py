"""What a sweep costs beside the same runs started one after another: 6 trials against 6 times `hncse train`.

The sweep tries six given settings without stopping any; then each is trained by `hncse train` with the test sets left
out, as trials do. The sweep's time includes starting Ray once; of each single run the start of Ray and of the Python
process is counted too, so the ratio with one start counted for both is given as well: the time from a command's start
to `run ... starts` is measured for the first single run and taken off the other five.

    python benchmarks/tune_overhead.py --out result.json
"""

import argparse
import json
import tempfile
import time
from pathlib import Path

import torch
import yaml
from hardware import provenance
from small import Command, make_recipe

TEMPERATURES = (0.02, 0.03, 0.05, 0.1, 0.2, 0.5)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=200)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        recipe = make_recipe(Path(scratch), steps=args.steps, evaluate_every=50, checkpoint_every=100)
        assert Command("prepare", recipe).wait() == 0  # both find it prepared
        space = Path(scratch) / "space.yaml"
        points = [{"objective.temperature": t} for t in TEMPERATURES]
        space.write_text(yaml.safe_dump(
            {"parameters": {"objective.temperature": {"loguniform": [0.01, 1.0]}}, "first": points}
        ))  # fmt: skip
        started = time.perf_counter()
        sweep = Command("tune", recipe, "--space", space, "--trials", len(points), "--stopping", "none")
        assert sweep.wait() == 0, sweep.log.read_text()
        sweep_s = time.perf_counter() - started
        print(f"sweep: {sweep_s:.1f} s", flush=True)
        singles, starts = [], []
        for temperature in TEMPERATURES:
            started = time.perf_counter()
            single = Command("train", recipe, f"objective.temperature={temperature}", f"run.name=t{temperature}",
                             "evaluation.test=false")  # fmt: skip
            while " starts: " not in single.log.read_text() and single.process.poll() is None:
                time.sleep(0.05)
            starts.append(time.perf_counter() - started)
            assert single.wait() == 0, single.log.read_text()
            singles.append(time.perf_counter() - started)
            print(f"train: {singles[-1]:.1f} s, of which {starts[-1]:.1f} s before the first step", flush=True)
    same_start = sum(singles) - sum(starts[1:])
    results = provenance(torch.device("cpu"), "optuna") | {
        "steps": args.steps,
        "sweep_s": sweep_s,
        "train_s": singles,
        "train_start_s": starts,
        "ratio": sweep_s / sum(singles),
        "ratio_one_start": sweep_s / same_start,
    }
    args.out.write_text(json.dumps(results, indent=1) + "\n")
    print(f"sweep over runs: {results['ratio']:.2f}; one start counted for the six: {results['ratio_one_start']:.2f}")


if __name__ == "__main__":
    main()
