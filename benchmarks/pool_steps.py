"""What do global negatives cost a training step? Steps with and without them, taken in turn.

A real pool serves the quickstart's corpus; this process trains. On every batch follow each other, in random order, a
step without negatives, one with prefetched `stored` ones and one with `fresh` ones (m = 1), no build under way. There
are two references for `fresh`, which both encode 3B rows instead of 2B: the very same ones, known beforehand, so that
what is left is the pool's doing; and a third view of the anchors (`three_view`), all of one length, which shows what
texts of any length cost besides. All batches are gone through several times, and of a batch's times the least counts,
as other work on the machine only adds to them.

    python benchmarks/pool_steps.py --out result.json
    python benchmarks/pool_steps.py --device cuda --batch 512 --set encoder.model=bert-base-uncased --out result.json
"""

import argparse
import json
import tempfile
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import numpy as np
import ray
import torch
from hardware import provenance, synchronise
from numpy.typing import NDArray

from hncse_ray import load_settings
from hncse_ray.cluster import ray_session
from hncse_ray.cluster.pool import PoolClient, negative_pool
from hncse_ray.cluster.resources import plan_pool
from hncse_ray.config import Settings
from hncse_ray.corpus import BatchPlan, Corpus
from hncse_ray.encoder import SentenceEncoder, load_encoder
from hncse_ray.reporting import LineReporter
from hncse_ray.training.batch import local_batch
from hncse_ray.training.checkpoint import TrainState
from hncse_ray.training.checks import prepare
from hncse_ray.training.host_copy import HostCopier
from hncse_ray.training.negatives import GlobalNegatives
from hncse_ray.training.objective import Objective
from hncse_ray.training.publish import to_arrays
from hncse_ray.training.schedule import build_optimizer
from hncse_ray.training.step import LocalBatch, StepContext, StepNegatives, train_step

MODES = ("none", "stored", "fresh", "3B rows", "3B rows of a length")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sentences", type=int, default=6000)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--batches", type=int, default=40, help="each trained on in every mode")
    parser.add_argument("--rounds", type=int, default=3, help="how often; with many batches kernels are made anew")
    parser.add_argument("--device", default="cpu", help="of the trainer and of the one shard, which share it")
    parser.add_argument("--set", nargs="*", default=[], metavar="KEY=VALUE", help="further settings of the run")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    settings = {use: read_settings(args, use) for use in ("stored", "fresh")}
    device = torch.device(args.device)
    encoder = load_encoder(settings["stored"].encoder.model, settings["stored"].encoder, device=device)
    corpus = prepare(settings["stored"], encoder, LineReporter())
    with ray_session(), tempfile.TemporaryDirectory() as folder:
        negatives = settings["stored"].negatives
        plan = plan_pool(negatives, [ray.cluster_resources()], rows=len(corpus), dimension=encoder.dimension)
        with negative_pool(settings["stored"], plan, corpus, Path(folder)) as handles:
            handles.wait_until_ready()
            times, tokens = measure(args, settings, encoder, corpus, PoolClient(handles, timeout_s=60))
    least = {mode: of_rounds.min(0) for mode, of_rounds in times.items()}
    pairs = (("stored", "none"), *(("fresh", other) for other in ("3B rows", "3B rows of a length", "none")))
    found = {
        "median_step_s": {mode: float(np.median(of_batches)) for mode, of_batches in least.items()},
        "ratio": {f"{one} over {other}": ratio_of_sums(least, one, other) for one, other in pairs},
        "tokens": {mode: int(tokens[mode].sum()) for mode in MODES},
    }
    print(json.dumps(found, indent=2))
    if args.out:
        result = provenance(device, "faiss", "ray") | vars(args) | found
        result |= {"step_s": {mode: of_rounds.tolist() for mode, of_rounds in times.items()}}
        args.out.write_text(json.dumps(result, indent=2, default=str) + "\n")


def read_settings(args: argparse.Namespace, use: str) -> Settings:
    return load_settings(
        "quickstart",
        [
            f"corpus.max_sentences={args.sentences}",
            f"train.batch_size={args.batch}",
            "objective.name=info_nce",
            "negatives.source=pool",
            "negatives.columns=own",
            "negatives.refresh=async",
            f"negatives.use={use}",
            "negatives.refresh_every_steps=null",
            f"negatives.gpus_per_shard={1 if args.device == 'cuda' else 0}",
            *args.set,
        ],
    )


def measure(
    args: argparse.Namespace,
    settings: dict[str, Settings],
    encoder: SentenceEncoder,
    corpus: Corpus,
    client: PoolClient,
) -> tuple[dict[str, NDArray[np.float64]], dict[str, NDArray[np.int64]]]:
    """Return the seconds of each step ``[rounds, batches]`` and its tokens ``[batches]``, by mode."""
    plan = BatchPlan(corpus.lengths, batch_size=args.batch, seed=0, bucket_by_length=True, min_batch=2)
    train = settings["stored"].train
    optimizer = build_optimizer(encoder, train)
    objectives = [
        Objective(
            load_settings("quickstart", [f"objective.name={name}"]).objective,
            dimension=encoder.dimension,
            device=encoder.device,
        )
        for name in ("info_nce", "three_view")
    ]
    client.publish(to_arrays(encoder.weights()), step=0, key="0")
    client.wait(3600)
    copy = partial(HostCopier(optimizer).copy, encoder.trained())
    states = {use: TrainState(step=1) for use in settings}
    sources = {
        use: GlobalNegatives(s, corpus=corpus, plan=plan, dimension=encoder.dimension, source=client, notify=print)
        for use, s in settings.items()
    }
    for use, source in sources.items():
        source.take([0], states[use], copy)  # has the index made
    client.wait(3600)

    def look_up(use: str, number: int) -> StepNegatives:
        found = sources[use].take([number], states[use], copy)[0][0]
        negatives = local_batch(number, plan.batch(number), corpus, found, settings=settings[use]).negatives
        assert negatives is not None
        return negatives

    known = [look_up("fresh", number) for number in range(args.batches + 2)]
    seconds = {mode: np.zeros((args.rounds, args.batches)) for mode in MODES}
    tokens = {mode: np.zeros(args.batches, dtype=np.int64) for mode in MODES}
    steps = [(0, number) for number in (args.batches, args.batches + 1)]  # these warm up
    steps += [(of_round, number) for of_round in range(args.rounds) for number in range(args.batches)]
    for of_round, number in steps:
        for mode in np.random.default_rng((of_round, number)).permutation(MODES):
            started = time.perf_counter()
            taken = None
            if mode in sources:
                taken = look_up(mode, number)
                if not taken.mask_bm.any():
                    raise RuntimeError("no negatives came")
            elif mode == "3B rows":
                taken = known[number]
            rows = corpus.token_rows(plan.batch(number))
            batch = LocalBatch(number, rows, (len(rows),), taken)
            context = StepContext(
                objective=objectives[mode == "3B rows of a length"], seed=0, step=1, total_steps=1000, chunk_size=None
            )
            train_step(encoder, optimizer, [batch], context, max_grad_norm=train.max_grad_norm)
            synchronise(encoder.device)
            if number < args.batches:
                seconds[mode][of_round, number] = time.perf_counter() - started
                tokens[mode][number] = count_tokens(mode, rows, taken)
        if number < args.batches:
            print(of_round, number, {mode: f"{of[of_round, number]:.3f}" for mode, of in seconds.items()}, flush=True)
    for source in sources.values():
        source.close()
    return seconds, tokens


def count_tokens(mode: str, rows: Sequence[NDArray[np.integer]], taken: StepNegatives | None) -> int:
    anchors = sum(map(len, rows))
    if taken is None or taken.fresh_bm is None:
        return anchors * (3 if mode == "3B rows of a length" else 2)
    return 2 * anchors + sum(len(text) for of_row in taken.fresh_bm for text in of_row if text is not None)


def ratio_of_sums(seconds: dict[str, NDArray[np.float64]], one: str, other: str) -> dict[str, float]:
    """Time of all batches in one mode over that in another, and 95 % of what other samples of batches would give."""
    pairs = np.array([seconds[one], seconds[other]])
    drawn = pairs[:, np.random.default_rng(0).integers(0, pairs.shape[1], (2000, pairs.shape[1]))].sum(-1)
    low, high = np.quantile(drawn[0] / drawn[1], (0.025, 0.975))
    return {"ratio": float(pairs[0].sum() / pairs[1].sum()), "low": float(low), "high": float(high)}


if __name__ == "__main__":
    main()
