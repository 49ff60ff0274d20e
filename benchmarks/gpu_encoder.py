"""How fast does a GPU train BERT-base: rows packed, rows padded, and sentence-transformers' trainer?

Unsupervised SimCSE (two views of each sentence, dropout 0.1) in bf16 on one GPU, at 32 tokens at most. The weights are
random, which changes no speed. The contestants take turns; warm-up steps are not in the timings.

- packed: ``train_step`` with the rows of a batch behind each other, attention by PyTorch's kernels for ragged rows;
- padded: the same step with every row padded to the longest of the batch;
- sentence-transformers: its trainer with ``MultipleNegativesRankingLoss``, PyTorch's scaled dot product attention on
  padded rows. It can flatten rows for flash-attention 2, a package of its own that this benchmark does not ask for.

Batches above ``--chunk-size`` rows go by gradient caching, everyone's. Where the time of a packed step goes is written
beside the result: ``gpu_profile_512.txt`` and so on, PyTorch's profiler and where the host waited for the GPU.

Model FLOPs utilisation is what a run logs too, see ``hncse_ray.training.model_flops``.

    HNCSE_DATA=/path/to/data python benchmarks/gpu_encoder.py --tokenizer /path/to/bert_base_uncased_tokenizer \
        --out benchmarks/results
"""

import argparse
import json
import shutil
import statistics
import tempfile
import warnings
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from hardware import provenance, synchronise
from torch.profiler import ProfilerActivity, profile
from training_throughput import Ours, Theirs, make_corpus, quiet
from transformers import BertConfig, BertModel

from hncse_ray.encoder import load_encoder
from hncse_ray.training.model_flops import ModelFlops, peak_of


def main() -> None:
    args = parse_arguments()
    quiet()
    torch.manual_seed(0)
    on_gpu = args.device.type == "cuda"
    name = torch.cuda.get_device_name() if on_gpu else "no GPU"
    peak = peak_of(name)
    with tempfile.TemporaryDirectory() as folder:
        config = BertConfig(num_hidden_layers=args.layers)
        shutil.copytree(args.tokenizer, f"{folder}/bert")
        BertModel(config, add_pooling_layer=False).save_pretrained(f"{folder}/bert")
        args.model = f"{folder}/bert"
        corpus, about = make_corpus(args, Path(folder))
        texts = corpus.texts(range(len(corpus)))
        needed = ModelFlops.count(load_encoder(args.model))
        lengths = corpus.lengths.astype(float)
        flops = 2 * (needed.token * lengths.mean() + needed.pair * (lengths**2).mean())  # two views
        result: dict[str, Any] = {
            "question": "How fast does a GPU train BERT-base, packed, padded, and by sentence-transformers?",
            **provenance(args.device, "sentence-transformers", "accelerate"),
            "corpus": about,
            "max_length": args.max_length,
            "precision": "bf16",
            "peak_flops": peak,
            "contestants": {},
        }
        for size in args.batch_sizes:
            args.batch_size, args.steps = size, max(2, args.rows_a_round // size)
            args.chunk_size = args.most_rows if size > args.most_rows else None
            contestants = lineup(args, corpus, texts, folder)
            rounds, allocations = contest(args, contestants)
            for who, speeds in rounds.items():
                row: dict[str, Any] = {"batch_size": size, "chunk_size": args.chunk_size, "contestant": who}
                row |= {"rounds": speeds, "device_allocations": allocations[who]}
                if speeds:
                    row["sentences_per_s"] = statistics.median(speeds)
                    row["model_flops_utilisation"] = peak and row["sentences_per_s"] * flops / peak
                result["contestants"][f"{who}, {size}"] = row
                print(row, flush=True)
            write(args.out, "gpu_encoder.json", json.dumps(result, indent=2))
            if rounds["packed"]:
                write(args.out, f"gpu_profile_packed_{size}.txt", where_time_goes(contestants["packed"], args))


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="BERT-base on one GPU.")
    parser.add_argument("--tokenizer", type=Path, required=True, help="folder of BERT's tokenizer")
    parser.add_argument("--layers", type=int, default=12, help="fewer to try the benchmark on a CPU")
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[512, 4096])
    parser.add_argument("--chunk-size", dest="most_rows", type=int, default=1024, help="rows encoded at a time")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--rows-a-round", type=int, default=16_384, help="sentences trained on, warm-up left out")
    parser.add_argument("--warm-up", type=int, default=4, help="steps before them; the first make kernels and memory")
    parser.add_argument("--max-length", type=int, default=32)
    parser.add_argument("--sentences", type=int, default=40_000)
    parser.add_argument("--device", type=torch.device, default=torch.device("cuda"))
    parser.add_argument("--out", type=Path, help="folder of the result and the profiles")
    parser.set_defaults(cpu_seconds=False)
    return parser.parse_args()


def write(folder: Path | None, name: str, text: str) -> None:
    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text + "\n", encoding="utf-8")


def lineup(args: argparse.Namespace, corpus: Any, texts: list[str], folder: str) -> dict[str, Any]:
    """Return who takes turns."""
    packed = Ours(args, corpus, "bf16")
    assert packed.encoder.packs, "the rows of this model are not packed here"
    padded = Ours(args, corpus, "bf16")
    padded.encoder.packs = False
    theirs = Theirs(args, texts, folder, "bf16", args.max_length)
    return {"packed": packed, "padded": padded, "sentence-transformers": theirs}


def contest(args: argparse.Namespace, contestants: dict[str, Any]) -> tuple[dict[str, list[float]], Counter[str]]:
    """Return the sentences a second of every round, nothing for who ran out of memory; and calls for memory."""
    found: dict[str, list[float]] = {}
    allocations: Counter[str] = Counter()
    for r in range(args.rounds):
        for name, contestant in contestants.items():
            if name in found and not found[name]:
                continue
            before = allocated(args.device)
            try:
                found.setdefault(name, []).append(contestant.run(r).sentences_per_s)
            except torch.OutOfMemoryError:
                print(f"{name} with batches of {args.batch_size} does not fit into memory", flush=True)
                found[name] = []
            allocations[name] += allocated(args.device) - before
            if args.device.type == "cuda":
                torch.cuda.empty_cache()
    return found, allocations


def allocated(device: torch.device) -> int:
    """How often memory of the GPU was asked for or given back; each may make the host wait for it."""
    if device.type != "cuda":
        return 0
    stats = torch.cuda.memory_stats()
    return int(stats["num_device_alloc"] + stats["num_device_free"])


def where_time_goes(contestant: Any, args: argparse.Namespace) -> str:
    """Profile a few steps: the operators that cost most on either side, calls of CUDA, and places that wait."""
    on_gpu = args.device.type == "cuda"
    args.steps, steps = 4, args.steps
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]
    with profile(activities=activities) as profiled:
        contestant.run(0)
        synchronise(args.device)
    averages = profiled.key_averages()
    sides = ["self_cuda_time_total", "self_cpu_time_total"] if on_gpu else ["self_cpu_time_total"]
    tables = [f"{side}, {args.warm_up} + 4 steps\n" + averages.table(sort_by=side, row_limit=25) for side in sides]
    calls = [
        f"{e.count:8} {e.key}, {e.self_cpu_time_total / 1000:.1f} ms" for e in averages if e.key.startswith("cuda")
    ]
    places: Counter[str] = Counter()
    if on_gpu:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            torch.cuda.set_sync_debug_mode("warn")
            contestant.run(0)
            torch.cuda.set_sync_debug_mode("default")
        places.update(f"{w.filename}:{w.lineno}: {w.message}" for w in caught if "synchron" in str(w.message))
    args.steps = steps
    waits = [f"{count:8} {place}" for place, count in places.most_common()]
    return "\n".join([*tables, "calls of CUDA:", *calls, "where the host waits:", *waits])


if __name__ == "__main__":
    main()
