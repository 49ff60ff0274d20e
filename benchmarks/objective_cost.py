"""What does an objective cost beside the encoder it trains?

Times forward and backward of every objective on random unit-norm embeddings, and forward and backward of a
randomly initialised BERT-base (nothing is downloaded) on fewer rows, scaled linearly to the 2B rows of a
training step. Rounds alternate over the objectives, so that a busy moment of the machine hits all of them
alike, and the encoder is timed after them; medians over the rounds are reported.

    python benchmarks/objective_cost.py --batch-size 256 --out result.json
"""

import argparse
import functools
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from hardware import provenance, synchronise
from torch import Tensor
from transformers import BertConfig, BertModel

from hncse_ray.objectives import (
    hard_negative_mixing,
    hybrid,
    info_nce,
    instance_smoothing,
    positive_mixing,
    three_view,
)

Step = Callable[[], None]


def main() -> None:
    """Measure, print the table and, if asked to, write the result."""
    args = parse_arguments()
    if args.threads:
        torch.set_num_threads(args.threads)
    device = torch.device(args.device)
    torch.manual_seed(0)
    objectives = objective_steps(args, device)
    seconds = median_seconds(objectives, rounds=args.rounds, device=device)
    encoder = {"encoder": encoder_step(args, device)}
    measured = median_seconds(encoder, rounds=args.encoder_rounds, device=device)["encoder"]
    encoder_seconds = measured * 2 * args.batch_size / args.encoder_rows
    result = describe(args, seconds, measured, encoder_seconds)
    print_table(result)
    if args.out:
        args.out.write_text(json.dumps(result, indent=2) + "\n")


def parse_arguments() -> argparse.Namespace:
    """The sizes; defaults are those of the published objectives and of BERT-base."""
    parser = argparse.ArgumentParser(description="Cost of every objective beside a BERT-base step.")
    parser.add_argument("--batch-size", type=int, default=256, help="B, anchors")
    parser.add_argument("--dim", type=int, default=768, help="D, embedding size")
    parser.add_argument("--negatives", type=int, default=0, help="m, global negatives of each anchor")
    parser.add_argument("--k", type=int, default=10, help="hardest candidates to mix from")
    parser.add_argument("--mixes", type=int, default=40, help="s, mixed negatives of each anchor")
    parser.add_argument("--buffer", type=int, default=1024, help="K, rows of the smoothing buffer")
    parser.add_argument("--group", type=int, default=16, help="neighbours in a smoothing group")
    parser.add_argument("--rounds", type=int, default=15, help="alternations over the objectives")
    parser.add_argument("--encoder-rows", type=int, default=32, help="rows that the encoder is timed on")
    parser.add_argument("--encoder-tokens", type=int, default=32, help="tokens in each of those rows")
    parser.add_argument("--encoder-rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=0, help="torch threads; 0 leaves torch's choice")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--out", type=Path, default=None, help="write the result here, as JSON")
    return parser.parse_args()


def objective_steps(args: argparse.Namespace, device: torch.device) -> dict[str, Step]:
    """Forward and backward of each objective, on embeddings of which some positives are rivalled."""
    B, D, m = args.batch_size, args.dim, args.negatives

    def embeddings(*shape: int) -> Tensor:
        return F.normalize(torch.randn(*shape, device=device), dim=-1)

    z1, z2, z3 = embeddings(B, D), embeddings(B, D), embeddings(B, D)
    # From positives that are hardly one (mixed by similarity) to near copies (kept).
    pull = torch.linspace(0.05, 1.0, B, device=device).unsqueeze(1)
    z2, z3 = (F.normalize(pull * z1 + z, dim=1) for z in (z2, z3))
    g = embeddings(B, m, D) if m else None
    leaves = [z.requires_grad_() for z in (z1, z2, z3, g) if z is not None]
    buffer = embeddings(args.buffer, D)
    positive: dict[str, Any] = {"margin": 0.1, "w_pos": 1.0, "w_neg": 0.5}
    negative: dict[str, Any] = {"k": args.k, "n_mixes": args.mixes, "alpha": 0.5}
    smoothing: dict[str, Any] = {"group_size": args.group, "attention_temperature": 2.0, "weight": 0.1}
    losses: dict[str, Callable[[], Tensor]] = {
        "info_nce": lambda: info_nce(z1, z2, g, temperature=0.05)[0],
        "three_view": lambda: three_view(z1, z2, z3, temperature=0.05)[0],
        "positive_mixing": lambda: positive_mixing(z1, z2, g, temperature=0.05, **positive)[0],
        "hard_negative_mixing": lambda: hard_negative_mixing(z1, z2, g, temperature=0.05, **negative)[0],
        "hybrid": lambda: hybrid(z1, z2, g, temperature=0.05, **positive, **negative)[0],
        "instance_smoothing": lambda: instance_smoothing(z1, z2, buffer, temperature=0.05, **smoothing)[0],
    }

    def step(loss: Callable[[], Tensor]) -> None:
        for leaf in leaves:
            leaf.grad = None
        torch.autograd.backward(loss())

    return {name: functools.partial(step, loss) for name, loss in losses.items()}


def encoder_step(args: argparse.Namespace, device: torch.device) -> Step:
    """Forward and backward of a BERT-base in training mode on full rows of random tokens."""
    config = BertConfig()
    model: torch.nn.Module = BertModel(config, add_pooling_layer=False)
    model.to(device).train()
    tokens = torch.randint(config.vocab_size, (args.encoder_rows, args.encoder_tokens), device=device)

    def step() -> None:
        model.zero_grad(set_to_none=True)
        first_tokens = model(input_ids=tokens).last_hidden_state[:, 0]
        torch.autograd.backward(first_tokens.square().mean())

    return step


def median_seconds(steps: dict[str, Step], *, rounds: int, device: torch.device) -> dict[str, float]:
    """Median wall time of each step over alternating rounds, after one round that is not counted."""
    times: dict[str, list[float]] = {name: [] for name in steps}
    for round_number in range(rounds + 1):
        for name, step in steps.items():
            synchronise(device)
            start = time.perf_counter()
            step()
            synchronise(device)
            if round_number:
                times[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in times.items()}


def describe(
    args: argparse.Namespace, seconds: dict[str, float], measured: float, encoder_seconds: float
) -> dict[str, Any]:
    """The numbers together with where, when and on what they were measured."""
    settings = {name: value for name, value in vars(args).items() if name not in ("out", "device")}
    return {
        "question": "What does an objective cost beside the encoder it trains?",
        **provenance(torch.device(args.device)),
        "settings": settings,
        "encoder": {
            "model": "BERT-base, random weights, fp32, forward and backward",
            "measured_rows": args.encoder_rows,
            "measured_seconds": measured,
            "scaled_to_rows": 2 * args.batch_size,
            "scaled_seconds": encoder_seconds,
        },
        "objectives": {
            name: {"seconds": value, "share_of_encoder_percent": 100 * value / encoder_seconds}
            for name, value in seconds.items()
        },
    }


def print_table(result: dict[str, Any]) -> None:
    """A line for each objective: milliseconds, and its share of the encoder's step."""
    settings, encoder = result["settings"], result["encoder"]
    print(f"{result['hardware']}, {result['threads']} threads, torch {result['torch']}, {result['date']}")
    print(
        "B = {batch_size}, D = {dim}, m = {negatives}, k = {k}, s = {mixes}; forward and backward, "
        "median of {rounds} rounds".format(**settings)
    )
    print(f"{'':24}{'ms':>12}{'% of encoder':>16}")
    for name, row in result["objectives"].items():
        print(f"{name:24}{1000 * row['seconds']:12.2f}{row['share_of_encoder_percent']:16.3f}")
    print(f"{'encoder, ' + str(encoder['scaled_to_rows']) + ' rows':24}{1000 * encoder['scaled_seconds']:12.0f}")
    print(
        f"The encoder was measured on {encoder['measured_rows']} rows of {settings['encoder_tokens']} tokens "
        f"({1000 * encoder['measured_seconds']:.0f} ms) and scaled linearly by rows."
    )


if __name__ == "__main__":
    main()
