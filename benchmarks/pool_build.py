"""Does a build disturb the search, and is it as fast as encoding alone? One shard with the quickstart's encoder.

Searches of 64 rows, one after another with a pause as between training steps, first with the pool idle, then while it
builds the next version; the search has one thread in both. The rate of the build is compared with the bare bulk encoder
(`SentenceEncoder.encode_rows` over length-sorted batches of the same rows) in a process with as many threads, alone; on
a GPU at several batch sizes, of which the best counts.

    python benchmarks/pool_build.py --out result.json
    python benchmarks/pool_build.py --device cuda --sentences 200000 --set corpus.source=text corpus.path=lines.txt
"""

import argparse
import json
import tempfile
import time
from pathlib import Path

import numpy as np
import ray
import torch
from hardware import provenance

from hncse_ray import load_settings
from hncse_ray.cluster import ray_session
from hncse_ray.cluster.pool import PoolClient, negative_pool
from hncse_ray.cluster.resources import plan_pool
from hncse_ray.config import Settings
from hncse_ray.corpus import Corpus
from hncse_ray.encoder import load_encoder
from hncse_ray.negatives import SourceUnavailable
from hncse_ray.reporting import LineReporter
from hncse_ray.training.checks import prepare


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sentences", type=int, default=12_000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1, help="of the shard and of the bare encoder")
    parser.add_argument("--device", default="cpu", help="of the encoder and of the index")
    parser.add_argument("--set", nargs="*", default=[], metavar="KEY=VALUE", help="further settings of the run")
    parser.add_argument("--pause", type=float, default=0.2, help="seconds between searches")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    settings = load_settings(
        "quickstart",
        [
            f"corpus.max_sentences={args.sentences}",
            "negatives.source=pool",
            f"negatives.threads_per_shard={args.threads}",
            f"negatives.gpus_per_shard={0.5 if args.device == 'cuda' else 0}",
            *args.set,
        ],
    )
    encoder = load_encoder(settings.encoder.model, settings.encoder)
    corpus = prepare(settings, encoder, LineReporter())
    weights = {name: tensor.numpy() for name, tensor in encoder.weights().items()}
    rounds = []
    with ray_session(), tempfile.TemporaryDirectory() as folder:
        plan = plan_pool(settings.negatives, [ray.cluster_resources()], rows=len(corpus), dimension=encoder.dimension)
        with negative_pool(settings, plan, corpus, Path(folder)) as handles:
            handles.wait_until_ready()
            client = PoolClient(handles, timeout_s=60)
            client.publish(weights, step=0, key="0")
            client.wait(3600)
            search_for(client, corpus, args.pause, lambda n: n < 20)
            for number in range(1, args.rounds + 1):
                task = ray.remote(num_cpus=0, num_gpus=plan.gpus)(bare_rate)
                sizes = (128, 512, 1024, 2048) if args.device == "cuda" else (128,)
                bare = {size: ray.get(task.remote(settings, str(corpus.path), args, size)) for size in sizes}
                idle = search_for(client, corpus, args.pause, lambda n: n < 100)
                client.publish(weights, step=number, key=str(number))
                building = search_for(client, corpus, args.pause, lambda n: client.status().building)
                rate = client.status().rows_per_s
                rounds.append(
                    {
                        "idle_p50_ms": percentile(idle, 50),
                        "idle_p99_ms": percentile(idle, 99),
                        "building_p50_ms": percentile(building, 50),
                        "building_p99_ms": percentile(building, 99),
                        "searches_while_building": len(building),
                        "p99_ratio": percentile(building, 99) / percentile(idle, 99),
                        "bare_rows_per_s": max(bare.values()),
                        "build_rows_per_s": rate,
                        "rate_ratio": rate / max(bare.values()),
                    }
                )
                print(rounds[-1], {f"bare, {size} rows a batch": round(r) for size, r in bare.items()}, flush=True)
            client.close()
    medians = {key: float(np.median([r[key] for r in rounds])) for key in rounds[0]}
    result = provenance(torch.device(args.device), "faiss", "ray") | vars(args) | {"rounds": rounds, "median": medians}
    print(json.dumps(medians, indent=2))
    if args.out:
        args.out.write_text(json.dumps(result, indent=2, default=str) + "\n")


def bare_rate(settings: Settings, path: str, args: argparse.Namespace, size: int) -> float:
    """Rows a second of the bulk encoder over a whole corpus, sorted by length."""
    torch.set_num_threads(args.threads)
    encoder = load_encoder(settings.encoder.model, settings.encoder, device=torch.device(args.device))
    encoder.inference_autocast = encoder.autocast  # as a shard does
    corpus = Corpus.open(path)
    order = np.argsort(-corpus.lengths, kind="stable")
    encoder.encode_rows(corpus.token_rows(order[:size]), unit_norm=True)
    started = time.perf_counter()
    for start in range(0, len(order), size):
        encoder.encode_rows(corpus.token_rows(order[start : start + size]), unit_norm=True)
    return len(order) / (time.perf_counter() - started)


def search_for(client: PoolClient, corpus: Corpus, pause_s: float, go_on) -> list[float]:  # type: ignore[no-untyped-def]
    rng, times = np.random.default_rng(0), []
    while go_on(len(times)):
        ids = rng.integers(0, len(corpus), 64)
        started = time.perf_counter()
        try:
            client.search(ids, k=33)
        except SourceUnavailable:  # the version has just given way: look again, as training does
            client.search(ids, k=33)
        times.append(time.perf_counter() - started)
        time.sleep(pause_s)
    return times


def percentile(times: list[float], q: float) -> float:
    return float(np.percentile(times, q)) * 1e3


if __name__ == "__main__":
    main()
