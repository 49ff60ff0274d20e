"""How does training scale over workers, and what does a checkpoint cost? Real runs of `hncse train`, one after another.

The quickstart's model and sentences without a pool; the global batch stays the same, each worker computes with one
thread. Sentences a second are those of the run's own log, evaluation and checkpoints left out, its first steps too;
efficiency is the speed over that of one worker, by the number of workers or of cores, whichever is less. A checkpoint's
cost is its median duration over the time that the steps between two take, for the interval of the quickstart.

    python benchmarks/worker_scaling.py --workers 1 2 4 --out result.json
"""

import argparse
import json
import os
import re
import statistics
import tempfile
from pathlib import Path

import torch
from hardware import provenance
from small import Command

INTERVAL = 20  # steps between checkpoints, as in recipes/quickstart.yaml


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    cores = len(os.sched_getaffinity(0))
    speeds: dict[int, list[float]] = {workers: [] for workers in args.workers}
    saves: dict[int, list[float]] = {workers: [] for workers in args.workers}
    step_s: dict[int, list[float]] = {workers: [] for workers in args.workers}
    with tempfile.TemporaryDirectory() as folder:
        for number in range(args.rounds):
            for workers in args.workers:
                steps, seconds = train(Path(folder), f"w{workers}r{number}", workers, args.steps)
                speeds[workers].append(statistics.median(steps))
                saves[workers] += seconds
                step_s[workers] += [64 / speed for speed in steps]
                print(
                    f"{workers} worker(s): {speeds[workers][-1]:.1f} sentences/s, checkpoints {seconds} s", flush=True
                )
    one = statistics.median(speeds[args.workers[0]])
    table = {}
    for workers, of_rounds in speeds.items():
        speed = statistics.median(of_rounds)
        table[workers] = {
            "sentences_per_s": speed,
            "speedup": speed / one,
            "efficiency": speed / one / min(workers, cores),
        }
        save_s, interval_s = statistics.median(saves[workers]), INTERVAL * statistics.median(step_s[workers])
        table[workers] |= {"checkpoint_s": save_s, "interval_s": interval_s, "checkpoint_cost": save_s / interval_s}
    print(json.dumps({"scaling": table}, indent=2))
    if args.out:
        result = provenance(torch.device("cpu"), "ray") | {"cores": cores} | vars(args)
        result |= {"scaling": table, "by_round": speeds, "saves_s": saves}
        args.out.write_text(json.dumps(result, indent=2, default=str) + "\n")


def train(folder: Path, name: str, workers: int, steps: int) -> tuple[list[float], list[float]]:
    """Sentences a second of each logged stretch but the first, and the duration of each checkpoint."""
    command = Command(
        "train", "quickstart", f"run.name={name}", f"run.storage_path={folder}", f"cluster.num_workers={workers}",
        "cluster.engine=ray",
        "cluster.cpus_per_worker=" + ("1" if workers <= 2 else "0.5"), "negatives.source=none",
        f"train.max_steps={steps}", "train.log_every_steps=5", "train.evaluate_every_steps=1000",
        f"train.checkpoint_every_steps={INTERVAL}",
    )  # fmt: skip
    if command.wait() != 0:
        raise RuntimeError(command.log.read_text())
    lines = [json.loads(line) for line in (folder / name / "metrics.jsonl").read_text().splitlines()]
    speeds = [line["sentences_per_s"] for line in lines if "sentences_per_s" in line][1:]
    saves = [float(s) for s in re.findall(r"checkpoint saved in ([\d.]+) s", (folder / name / "log.txt").read_text())]
    return speeds, saves


if __name__ == "__main__":
    main()
