"""Runs that meet a fault drawn at random: which process, and when; and what becomes of them.

A small run with a negative pool of two shards and two workers is started as a user would; after a random time a process
of it is killed by SIGKILL: a worker, a shard, the pool's coordinator, Ray Train's controller, the event channel, or the
command itself. After the loss of the command, and of the controller, which ends it with a message, the same command is
started again. In the end each must have taken the right number of steps and have a model that loads, no step
may be repeated beyond one checkpoint interval a fault, and no process may be left.

    python benchmarks/chaos.py --runs 20 --out result.json
    python benchmarks/chaos.py --table --out result.json
"""

import argparse
import json
import random
import re
import tempfile
import time
from pathlib import Path

import psutil
import torch
from hardware import provenance
from small import Command, make_recipe

from hncse_ray import load_encoder

STEPS, CHECKPOINT_EVERY = 120, 10
VICTIMS = {
    "worker": "RayTrainWorker",
    "shard": "ShardActor",
    "coordinator": "PoolCoordinator",
    "controller": "TrainController",
    "event channel": "EventQueue",
    "command": "",
}
HANG_S = 600.0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--runs", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--table", action="store_true")
    args = parser.parse_args()
    results = json.loads(args.out.read_text()) if args.out.exists() else {"runs": []}
    if not args.table:
        results |= provenance(torch.device("cpu"), "faiss", "ray") | {
            "steps": STEPS,
            "checkpoint_every": CHECKPOINT_EVERY,
        }
        with tempfile.TemporaryDirectory() as scratch:
            recipe = make_recipe(Path(scratch), steps=STEPS, evaluate_every=40, checkpoint_every=CHECKPOINT_EVERY)
            assert Command("prepare", recipe).wait() == 0
            for number in range(len(results["runs"]), args.runs):
                results["runs"].append(run(recipe, Path(scratch), number, random.Random(f"{args.seed} {number}")))
                args.out.write_text(json.dumps(results, indent=1) + "\n")
                print(results["runs"][-1], flush=True)
    print_table(results["runs"])


def run(recipe: Path, scratch: Path, number: int, dice: random.Random) -> dict:
    """Start a run, kill one of its processes, and see how it ends."""
    victim = dice.choice(list(VICTIMS))
    at_step = dice.randrange(0, STEPS - 20)
    arguments = ["train", recipe, f"run.name=chaos-{number}", "negatives.source=pool", "negatives.num_shards=2",
                 "cluster.num_workers=2", "cluster.cpus_per_worker=1"]  # fmt: skip
    folder = scratch / "runs" / f"chaos-{number}"
    started = time.monotonic()
    command = Command(*arguments)
    wait_for_step(command, folder, at_step)
    killed = kill(command, victim)
    hung = False
    try:
        status = command.wait(HANG_S)
    except Exception:
        hung, status = True, -1
        command.process.kill()
    left_s = command.seconds_until_gone()
    if victim == "command" or (victim == "controller" and status == 2):  # which says: start the same command again
        command = Command(*arguments)
        try:
            status = command.wait(HANG_S)
        except Exception:
            hung, status = True, -1
            command.process.kill()
        left_s = max(left_s, command.seconds_until_gone())
    return {
        "victim": victim,
        "killed": killed,
        "at_step": at_step,
        "status": status,
        "hung": hung,
        "steps": finished_steps(folder),
        "model_scores": model_is_right(folder),
        "repeated_steps": repeated_steps(folder),
        "processes_gone_after_s": round(left_s, 1),
        "seconds": round(time.monotonic() - started, 1),
    }


def wait_for_step(command: Command, folder: Path, step: int) -> None:
    """Wait until a run has logged a step; for step 0 until its processes are there."""
    log = folder / "log.txt"
    while command.process.poll() is None:
        text = log.read_text() if log.exists() else ""
        steps = [int(found) for found in re.findall(r" step (\d+)/", text)]
        if (" starts: " in text and step < 10) or (steps and max(steps) >= step):
            return
        time.sleep(0.05)


def kill(command: Command, victim: str) -> bool:
    """Kill a process of the run; False if there was none."""
    if victim == "command":
        command.process.kill()
        return True
    for process in command.processes():
        try:
            if VICTIMS[victim] in " ".join(process.cmdline()):
                process.kill()
                return True
        except psutil.Error:
            continue
    return False


def finished_steps(folder: Path) -> int | None:
    path = folder / "result.json"
    return json.loads(path.read_text())["step"] if path.exists() else None


def model_is_right(folder: Path) -> bool:
    """Whether the model loads and gives finite vectors, and the last score is that of its best step."""
    try:
        vectors = load_encoder(folder / "model").encode(["return the indices that would sort an array"])
    except Exception as error:
        print(f"the model does not load: {error}")
        return False
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    logged = [line["step"] for line in lines if "loss" in line]
    return bool(abs((vectors**2).sum() - 1) < 1e-4) and logged == sorted(set(logged)) and max(logged) == STEPS


def repeated_steps(folder: Path) -> int:
    """How many steps were taken twice: those that had been logged beyond the checkpoint of a resumption."""
    reached = repeated = 0
    for line in (folder / "log.txt").read_text().splitlines():
        if found := re.search(r" step (\d+)/", line):
            reached = max(reached, int(found[1]))
        elif found := re.search(r"resumes at step (\d+)", line):
            repeated += reached - int(found[1])
        elif " starts: " in line:
            repeated += reached
    return repeated


def print_table(runs: list[dict]) -> None:
    print("victim         at step  steps  model  repeated  gone after s  seconds")
    for r in runs:
        print(
            f"{r['victim']:14s} {r['at_step']:7d} {r['steps'] or 0:6d} {r['model_scores']!s:>6s}"
            f" {r['repeated_steps']:9d} {r['processes_gone_after_s']:13.1f} {r['seconds']:8.1f}"
            f"{'  HUNG' if r['hung'] else ''}"
        )
    good = sum(r["steps"] == STEPS and r["model_scores"] and not r["hung"] and r["killed"]
               and r["repeated_steps"] <= CHECKPOINT_EVERY for r in runs)  # fmt: skip
    print(f"{good} of {len(runs)} ended with a right model and at most one checkpoint interval repeated")


if __name__ == "__main__":
    main()
