"""How many pool GPUs does a corpus need, with which index, and what ends first? Formulas, checked by a simulation.

Costs of the parts (encode, build, search, gather, step) come from constants that were measured on a CPU
(`benchmarks/results/`, `LOG.md`) and, for GPUs, from ASSUMED ones, but for the choice of the best among the scores of
an exact index, which was measured on an H200. Memory is that of `plan_index`. docs/scaling.md explains; the formulas
are in `scaling_costs.py`, `scaling_simulation.py` plays them.

    python benchmarks/scaling_model.py --out benchmarks/results/scaling_model.json
    python benchmarks/scaling_model.py --gpu-tflops 40 --gpu-gb 48 --gpu-gbs 400 --trainers 4 --nic-gbit 25
"""

import argparse
import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import scaling_simulation
import torch
from hardware import provenance
from scaling_costs import (
    BERT_BASE,
    GPU_STEP_OVER_FORWARD,
    PREPARE_S_A_ROW,
    Device,
    Rules,
    Setup,
    build_all_s,
    costs_of,
    host_bytes,
    index_of,
    input_s,
    look_up_s,
    measured_cpu,
    period_s,
    step_s,
)

from hncse_ray.errors import HncseError

MOST_SHARDS = 4096  # negatives.num_shards


@dataclass(frozen=True)
class Answer:
    """The least pool that keeps up with a refresh interval, or the best that there is.

    Attributes:
        gpus: how many; None: none makes the index within the interval, or none answers in time.
        decided_by: what asks for the most of them, or what cannot be had.
        memory_gpus: the fewest that hold two versions.
        encode_gpus: the fewest that make one within the interval.
        shortest_steps: the shortest interval that any number of them reaches and still answers in time (if none
            answers in time: that of the number that comes nearest).
        shortest_gpus: and how many those are.
    """

    index: str
    gpus: int | None
    decided_by: str
    memory_gpus: int
    encode_gpus: int | None
    shortest_steps: int
    shortest_gpus: int
    build_s: float
    search_s: float
    look_up_s: float
    period_over_step: float
    bytes_building: int
    bytes_on_disk: int


def _room(setup: Setup) -> bool:
    try:
        index_of(setup)
    except HncseError:
        return False
    return True


def least_memory(setup: Setup) -> int | None:
    """The fewest shards that hold two versions; None if no number does."""
    if not _room(replace(setup, shards=MOST_SHARDS)):
        return None
    low, high = 0, MOST_SHARDS
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if _room(replace(setup, shards=middle)) else (middle, high)
    return high


def needed(setup: Setup, every: int, *, most_period: float = 1.1) -> Answer | None:
    """The fewest shards, one a GPU, that hold the setup's index, make it within `every` steps, and answer in time.

    Args:
        setup: all but the shards.
        every: steps between two versions.
        most_period: how much longer steps may take for the pool.

    Returns:
        None if no number of shards holds it.
    """
    step = max(step_s(setup), input_s(setup))  # without a pool
    rules, memory = Rules(refresh_every=every), least_memory(setup)
    if memory is None:
        return None
    # Not monotone: more shards build and search faster until the network is full. So tried, 1 % apart.
    tried = sorted({min(MOST_SHARDS, math.ceil(memory * 1.01**i)) for i in range(900)})
    costs = {n: costs_of(replace(setup, shards=n)) for n in tried}
    answering = {n for n in tried if period_s(costs[n], rules) <= most_period * step}
    building = next((n for n in tried if build_all_s(costs[n]) <= every * step), None)
    found = next((n for n in tried if n in answering and build_all_s(costs[n]) <= every * step), None)
    if answering:
        shortest = min(answering, key=lambda n: build_all_s(costs[n]))
    else:
        shortest = min(tried, key=lambda n: period_s(costs[n], rules))
    if found is None:
        decided = "too slow to build" if answering else "too slow to answer"
    else:
        decided = "memory" if found == memory else "encoding" if found == building else "search"
    shown = found or shortest
    plan = index_of(replace(setup, shards=shown))
    return Answer(
        index=setup.index,
        gpus=found,
        decided_by=decided,
        memory_gpus=memory,
        encode_gpus=building,
        shortest_steps=math.ceil(build_all_s(costs[shortest]) / step),
        shortest_gpus=shortest,
        build_s=build_all_s(costs[shown]),
        search_s=costs[shown].search_s,
        look_up_s=look_up_s(costs[shown]),
        period_over_step=period_s(costs[shown], rules) / step,
        bytes_building=plan.bytes_building,
        bytes_on_disk=plan.bytes_on_disk,
    )


def best(setup: Setup, every: int) -> Answer | None:
    """The better of `flat` and `ivf_pq`: fewer GPUs, the exact one where both need as many."""
    answers = [a for kind in ("flat", "ivf_pq") if (a := needed(replace(setup, index=kind), every)) is not None]
    able = [a for a in answers if a.gpus is not None]
    if able:
        return min(able, key=lambda a: (a.gpus or 0, a.index != "flat"))
    answering = [a for a in answers if a.decided_by != "too slow to answer"]
    if answering:
        return min(answering, key=lambda a: a.shortest_steps)
    return min(answers, key=lambda a: a.period_over_step, default=None)


def assumed_gpu(args: argparse.Namespace, peak_tflops: float, gigabytes: float, gigabytes_s: float) -> Device:
    """A GPU by its data sheet and the shares of it that are ASSUMED to be reached; not measured here."""
    flops = peak_tflops * 1e12 * args.gpu_share
    return Device(
        flops=flops,
        search_flops=flops,
        bandwidth=gigabytes_s * 1e9 * args.bandwidth_share,
        memory=gigabytes * 1e9 * args.memory_share,
        host_flops=args.host_gflops * 1e9,
        step_over_forward=GPU_STEP_OVER_FORWARD,
        on_gpu=True,
    )


# ---- tables


def table(setup: Setup, rows: Sequence[int], intervals: Sequence[int]) -> list[dict[str, Any]]:
    """One line for each size of the corpus and refresh interval."""
    lines = []
    for count in rows:
        for every in intervals:
            sized = replace(setup, rows=count)
            answer = best(sized, every)
            line: dict[str, Any] = {"rows": count, "refresh_every_steps": every}
            line["steps_an_epoch"] = count // setup.batch
            line |= {"index": None} if answer is None else asdict(answer)
            shards = MOST_SHARDS if answer is None else answer.gpus or answer.shortest_gpus
            line["host_gb"] = {name: size / 1e9 for name, size in host_bytes(count, shards).items()}
            line["prepare_hours"] = count * PREPARE_S_A_ROW / 3600
            lines.append(line)
    return lines


def show(name: str, lines: Sequence[dict[str, Any]]) -> None:
    print(f"\n{name}")
    print("rows    every    index   GPUs  decided by          memory  encode  build s   look-up ms  period  shortest")
    for x in lines:
        if x["index"] is None:
            print(f"{x['rows']:<7.0e} {x['refresh_every_steps']:<8} does not fit {MOST_SHARDS} shards")
            continue
        cells = [
            f"{x['rows']:<7.0e} {x['refresh_every_steps']:<8} {x['index']:<7} {x['gpus'] or '-':<5}",
            f"{x['decided_by']:<19} {x['memory_gpus']:<7} {x['encode_gpus'] or '-':<7}",
            f"{x['build_s']:<9.4g} {1e3 * x['look_up_s']:<11.4g} {x['period_over_step']:<7.3g}",
            f"{x['shortest_steps']} steps, {x['shortest_gpus']} GPUs",
        ]
        print(" ".join(cells))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--rows", type=float, nargs="+", default=[1e6, 1e8, 1e10])
    add("--refresh", type=int, nargs="+", default=[100, 1000, 10_000, 100_000], help="steps between two versions")
    add("--tokens", type=float, default=25, help="of a row, padding included")
    add("--views", action="store_true", help="are made of passages, as in the recipe adapt")
    add("--trainers", type=int, default=8, help="GPUs that train, in one node unless --trainer-gbs says otherwise")
    add("--batch", type=int, default=None, help="over all trainers; default: 64 for each L4, 512 for each H100")
    add("--nic-gbit", type=float, default=None, help="of a node; default: 10 for the L4, 100 for the H100")
    add("--trainer-gbs", type=float, default=None, help="GB/s between trainers; default: 10 (PCIe), 100 (NVLink)")
    add("--shards-per-node", type=int, default=None, help="default: 1 for the L4, 8 for the H100")
    add("--gpu-tflops", type=float, default=None, help="peak, dense bf16: a table for this GPU instead of the two")
    add("--gpu-gb", type=float, default=24)
    add("--gpu-gbs", type=float, default=300, help="memory bandwidth, GB/s")
    add("--gpu-share", type=float, default=0.2, help="of the peak that is reached: ASSUMED")
    add("--bandwidth-share", type=float, default=0.5, help="likewise")
    add("--memory-share", type=float, default=0.8, help="of a GPU that is free for the index")
    add("--host-gflops", type=float, default=500, help="of the CPU beside a GPU: ASSUMED")
    add("--out", type=Path)
    args = parser.parse_args()
    kinds = {"L4": (121, 24, 300, 1, 10, 10, 64), "H100": (989, 80, 3350, 8, 100, 100, 512)}
    if args.gpu_tflops is not None:
        kinds = {"your GPU": (args.gpu_tflops, args.gpu_gb, args.gpu_gbs, 1, 10, 10, 64)}
    tables = {}
    for name, (tflops, gigabytes, gigabytes_s, per_node, gbit, link, each) in kinds.items():
        setup = Setup(
            rows=1,
            encoder=BERT_BASE,
            device=assumed_gpu(args, tflops, gigabytes, gigabytes_s),
            tokens=args.tokens,
            views=args.views,
            trainers=args.trainers,
            batch=args.batch or each * args.trainers,
            shards_per_node=args.shards_per_node or per_node,
            nic=(args.nic_gbit or gbit) * 1e9 / 8,
            trainer_link=(args.trainer_gbs or link) * 1e9,
        )
        tables[name] = table(setup, [int(n) for n in args.rows], args.refresh)
        times = f"step {step_s(setup):.3f} s, input {input_s(setup):.4f} s"
        show(f"BERT-base, {args.trainers} trainers, {name}: ASSUMED throughput, {times}", tables[name])
    results = Path(__file__).parent / "results"
    cpu, facts = measured_cpu(results)
    checks = scaling_simulation.against_formulas()
    scaling_simulation.show_checks(checks)
    measured = scaling_simulation.against_measured(cpu, results)
    print("\nagainst what was measured here\n" + json.dumps(measured, indent=2))
    if args.out:
        result = provenance(torch.device("cpu"), "faiss", "ray") | {"settings": vars(args) | {"out": None}}
        result["note"] = "GPU throughputs are assumed, but for the choice of the best scores (gpu_index_h200.json)"
        result |= {"measured_constants": facts, "tables": tables, "simulation": checks, "against_measured": measured}
        args.out.write_text(json.dumps(result, indent=2, default=str) + "\n")


if __name__ == "__main__":
    main()
