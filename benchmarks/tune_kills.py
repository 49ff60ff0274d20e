"""Sweeps that are killed: SIGKILL at a random moment, then `--resume`, five times; and what stays behind.

    python benchmarks/tune_kills.py --out result.json
    python benchmarks/tune_kills.py --out result.json --whole 3     # whole sweeps of 12 trials, with and without a pool

Of a killed sweep it is checked that every trial that had ended keeps its state and score, that none is run twice (its
log says once that it starts), that the number of trials is right in the end, and that no process is left.
"""

import argparse
import json
import random
import tempfile
import time
from pathlib import Path

import torch
import yaml
from hardware import provenance
from optuna.trial import TrialState
from small import Command, make_recipe

from hncse_ray.tuning import open_study

SPACE = {
    "parameters": {
        "objective.name": {"categorical": ["info_nce", "hybrid"]},
        "objective.temperature": {"loguniform": [0.01, 1.0]},
        "objective.k": {"int": [2, 30], "when": {"objective.name": "hybrid"}},
    }
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--kills", type=int, default=5)
    parser.add_argument("--trials", type=int, default=6)
    parser.add_argument("--whole", type=int, default=0, help="instead: whole sweeps of 12 trials, so many of each kind")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    results = json.loads(args.out.read_text()) if args.out.exists() else {"kills": [], "whole": []}
    measured_on = provenance(torch.device("cpu"), "optuna")
    if not args.whole:
        results |= measured_on
    with tempfile.TemporaryDirectory() as scratch:
        recipe = make_recipe(Path(scratch), steps=60)
        space = Path(scratch) / "space.yaml"
        space.write_text(yaml.safe_dump(SPACE))
        if args.whole:
            for number in range(args.whole):
                for source in ("none", "pool"):
                    found = whole(recipe, space, Path(scratch) / f"{source}-{number}", source)
                    results["whole"].append(found | measured_on)
                    args.out.write_text(json.dumps(results, indent=1) + "\n")
                    print(results["whole"][-1], flush=True)
            return
        dice = random.Random(args.seed)
        out = Path(scratch) / "killed"
        first = ["tune", recipe, "--space", space, "--trials", args.trials, "--out", out]
        for number in range(args.kills):
            command = Command(*(first if number == 0 else ["tune", "--resume", out]))
            results["kills"].append(kill(command, out, dice.uniform(30, 150)))
            args.out.write_text(json.dumps(results, indent=1) + "\n")
            print(results["kills"][-1], flush=True)
        before = ended(out)
        last = Command("tune", "--resume", out)
        assert last.wait() == 0, last.log.read_text()
        after = ended(out)
        twice = [n for n, (state, _) in after.items() if state == "COMPLETE" and starts(out, n) != 1]
        results["end"] = {
            "trials": len(after),
            "asked": args.trials,
            "scores_changed": not before.items() <= after.items(),
            "run_twice": twice,
            "seconds_until_gone": last.seconds_until_gone(),
        }
        args.out.write_text(json.dumps(results, indent=1) + "\n")
        print(results["end"])


def kill(command: Command, out: Path, seconds: float) -> dict:
    """Kill a sweep after some seconds and see what it leaves."""
    end = time.monotonic() + seconds
    before = ended(out)
    while time.monotonic() < end and command.process.poll() is None:
        time.sleep(0.1)
    finished = command.process.poll() is not None
    command.process.kill()
    gone = command.seconds_until_gone(10)
    slow = [] if gone < 10 else [" ".join(process.cmdline())[-60:] for process in command.processes()]
    gone = gone if gone < 10 else 10 + command.seconds_until_gone(110)
    after = ended(out)
    return {
        "after_s": round(seconds, 1),
        "was_finished": finished,
        "trials_ended": len(after),
        "at_work": sum(t.state == TrialState.RUNNING for t in trials(out)),
        "scores_changed": not before.items() <= after.items(),
        "seconds_until_gone": round(gone, 1),
        "there_after_10_s": slow,
    }


def whole(recipe: Path, space: Path, out: Path, source: str) -> dict:
    """Run a sweep of 12 trials to its end."""
    started = time.perf_counter()
    command = Command("tune", recipe, f"negatives.source={source}", "--space", space, "--trials", 12, "--out", out)
    status = command.wait()
    seconds = time.perf_counter() - started
    assert status == 0, command.log.read_text()
    states = [state for state, _ in ended(out).values()]
    return {
        "negatives": source,
        "seconds": round(seconds, 1),
        "states": {state: states.count(state) for state in sorted(set(states))},
        "seconds_until_gone": round(command.seconds_until_gone(), 1),
    }


def trials(out: Path) -> list:
    return open_study(out).get_trials() if (out / "study.db").exists() else []


def ended(out: Path) -> dict[int, tuple[str, float | None]]:
    return {
        t.number: (t.state.name, t.value) for t in trials(out) if t.state.is_finished() and "misfit" not in t.user_attrs
    }


def starts(out: Path, number: int) -> int:
    return (out / "trials" / f"trial-{number:04d}" / "log.txt").read_text().count(" starts: ")


if __name__ == "__main__":
    main()
