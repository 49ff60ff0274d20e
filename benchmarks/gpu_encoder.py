"""How fast does a GPU train BERT-base: rows packed, rows padded, and sentence-transformers' trainer?

Unsupervised SimCSE (two views of each sentence, dropout 0.1) in bf16 on one GPU, at 32 tokens at most. The weights are
random, which changes no speed. The contestants take turns; warm-up steps are not in the timings.

- packed: ``train_step`` with the rows of a batch behind each other, attention by PyTorch's kernels for ragged rows;
- padded: the same step with every row padded to the longest of the batch;
- sentence-transformers: its trainer with ``MultipleNegativesRankingLoss``, PyTorch's scaled dot product attention on
  padded rows. It can flatten rows for flash-attention 2, a package of its own that this benchmark does not ask for.

Model FLOPs utilisation counts what the tokens without padding need, 6 FLOPs a weight and token for forward and backward
(Chowdhery et al. 2022, arXiv 2204.02311, appendix B; attention's products among them), over the GPU's dense bf16 peak.

    HNCSE_DATA=/path/to/data python benchmarks/gpu_encoder.py --tokenizer /path/to/bert_base_uncased_tokenizer \
        --out result.json
"""

import argparse
import json
import shutil
import statistics
import tempfile
from pathlib import Path
from typing import Any

import torch
from hardware import provenance
from training_throughput import Ours, Theirs, make_corpus, quiet
from transformers import BertConfig, BertModel

PEAK_FLOPS = {"H100": 989e12, "H200": 989e12, "A100": 312e12}  # dense bf16, from NVIDIA's data sheets


def main() -> None:
    parser = argparse.ArgumentParser(description="BERT-base on one GPU.")
    parser.add_argument("--tokenizer", type=Path, required=True, help="folder of BERT's tokenizer")
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[512, 4096])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--rows-a-round", type=int, default=16_384, help="sentences trained on, warm-up left out")
    parser.add_argument("--max-length", type=int, default=32)
    parser.add_argument("--sentences", type=int, default=40_000)
    parser.add_argument("--device", type=torch.device, default=torch.device("cuda"))
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    quiet()
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        config = BertConfig()
        shutil.copytree(args.tokenizer, f"{folder}/bert")
        BertModel(config, add_pooling_layer=False).save_pretrained(f"{folder}/bert")
        args.model = f"{folder}/bert"
        corpus, about = make_corpus(args, Path(folder))
        texts = corpus.texts(range(len(corpus)))
        tokens = 2 * corpus.report.mean_tokens  # two views
        flops = tokens * flops_of_token(config, float((corpus.lengths.astype(float) ** 2).sum() / corpus.lengths.sum()))
        peak = (
            next((p for name, p in PEAK_FLOPS.items() if name in torch.cuda.get_device_name()), None)
            if args.device.type == "cuda"
            else None
        )
        found: dict[str, Any] = {}
        for size in args.batch_sizes:
            args.batch_size = size
            args.steps = max(2, args.rows_a_round // size)
            for name, rounds in contest(args, corpus, texts, folder).items():
                row: dict[str, Any] = {"batch_size": size, "contestant": name, "rounds": rounds}
                if rounds:
                    row["sentences_per_s"] = statistics.median(rounds)
                    row["model_flops_utilisation"] = peak and row["sentences_per_s"] * flops / peak
                found[f"{name}, {size}"] = row
                print({k: v for k, v in row.items() if k != "rounds"}, flush=True)
    result = {
        "question": "How fast does a GPU train BERT-base, packed, padded, and by sentence-transformers?",
        **provenance(args.device, "sentence-transformers", "accelerate"),
        "corpus": about,
        "max_length": args.max_length,
        "precision": "bf16",
        "peak_flops": peak,
        "contestants": found,
    }
    if args.out:
        args.out.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


def contest(args: argparse.Namespace, corpus: Any, texts: list[str], folder: str) -> dict[str, list[float]]:
    """Return the sentences a second of every round; nothing for who ran out of memory."""
    found: dict[str, list[float]] = {}
    packed, padded = Ours(args, corpus, "bf16"), Ours(args, corpus, "bf16")
    assert packed.encoder.packs, "the rows of this model are not packed here"
    padded.encoder.packs = False
    contestants = {"packed": packed, "padded": padded}
    contestants["sentence-transformers"] = Theirs(args, texts, folder, "bf16", args.max_length)
    for r in range(args.rounds):
        for name, contestant in contestants.items():
            if name in found and not found[name]:
                continue
            try:
                found.setdefault(name, []).append(contestant.run(r).sentences_per_s)
            except torch.OutOfMemoryError:
                print(f"{name} with batches of {args.batch_size} does not fit into memory", flush=True)
                found[name] = []
            if args.device.type == "cuda":
                torch.cuda.empty_cache()
    return found


def flops_of_token(config: BertConfig, attended: float) -> float:
    """FLOPs of forward and backward of one token that attends to so many on the mean over tokens."""
    width, layers = config.hidden_size, config.num_hidden_layers
    weights = layers * (4 * width**2 + 2 * width * config.intermediate_size)
    return 6 * weights + 12 * layers * width * attended


if __name__ == "__main__":
    main()
