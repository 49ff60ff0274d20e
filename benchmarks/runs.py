"""Many short runs, side by side: each writes its result to a file of its own, and what has one is not run again."""

import json
import multiprocessing
import os
import time
import traceback
from argparse import ArgumentParser
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from hardware import provenance
from numpy.typing import NDArray

from hncse_ray.encoder import SentenceEncoder
from hncse_ray.training.whitening import Spread

Task = tuple[str, ...]  # what names a run


def add_options(commands: Any, run: ArgumentParser, methods: Sequence[str]) -> None:
    """Add what runs of methods share to the command ``run``, and the command ``table``."""
    run.add_argument("--out", type=Path, required=True, help="folder of the results; what has one is not run again")
    named = "in this order; a method may name its seeds, as in METHOD@0,1,2"
    run.add_argument("--methods", nargs="+", default=list(methods), help=named)
    run.add_argument("--override", nargs="*", default=[], help="settings for all methods")
    run.add_argument("--workers", type=int, default=1, help="processes")
    run.add_argument("--minutes", type=float, default=600, help="begin no run after so long")
    table = commands.add_parser("table")
    table.add_argument("folder", type=Path)
    table.add_argument("--out", type=Path)


def with_seeds(methods: Sequence[str]) -> list[Task]:
    """Return (method, seed) of each method and each of its seeds, 0 where it names none."""
    named = [name.partition("@") for name in methods]
    return [(method, seed) for method, _, seeds in named for seed in (seeds or "0").split(",")]


def device() -> torch.device:
    """The GPU, if there is one."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def run_tasks(
    tasks: Sequence[Task], measure: Callable[..., dict[str, Any]], folder: Path, *, workers: int, minutes: float
) -> None:
    """Run the tasks that ``folder`` has no result of, in their order, some at a time.

    Args:
        tasks: each a few words.
        measure: called with these words; returns what goes into the result.
        folder: of the results.
        workers: processes.
        minutes: no task begins after so long.
    """
    folder.mkdir(parents=True, exist_ok=True)
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    for task in [*(task for task in tasks if not _result(folder, task).exists()), *[None] * workers]:
        queue.put(task)
    until = time.time() + 60 * minutes
    processes = [context.Process(target=_work, args=(queue, measure, folder, workers, until)) for _ in range(workers)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()


def read_results(folder: Path) -> list[dict[str, Any]]:
    """Return the results in a folder."""
    return [json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))]


class Encoded:
    """An encoder that embeds a text once, and may whiten."""

    def __init__(self, encoder: SentenceEncoder) -> None:
        self.encoder = encoder
        self.known: dict[str, NDArray[np.float32]] = {}

    def __call__(self, texts: Sequence[str]) -> NDArray[np.float32]:
        """Embed N texts; ``[N, D]``."""
        if new := [text for text in dict.fromkeys(texts) if text not in self.known]:
            self.known.update(zip(new, self.encoder.encode(new), strict=True))
        return np.stack([self.known[text] for text in texts])

    def whitened(self, corpus: Sequence[str], power: float) -> Callable[[list[str]], NDArray[Any]]:
        """Return this encoder, whitened on the vectors of a corpus."""
        spread = Spread.of(self(corpus))
        return lambda texts: spread.whitened(self(texts), power)


def _result(folder: Path, task: Task) -> Path:
    return folder / ("-".join(word.replace(", ", ",").replace(" ", "_") for word in task) + ".json")


def _work(queue: Any, measure: Callable[..., dict[str, Any]], folder: Path, workers: int, until: float) -> None:
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // workers))
    while (task := queue.get()) is not None and time.time() < until:
        started = time.perf_counter()
        try:
            found = {"task": task, **measure(*task), "seconds": round(time.perf_counter() - started, 1)}
        except Exception:  # the other runs are worth having
            traceback.print_exc()
            continue
        path = _result(folder, task)
        path.with_suffix(".tmp").write_text(json.dumps(found | provenance(device(), "sentence-transformers")) + "\n")
        path.with_suffix(".tmp").rename(path)
        print(*task, f"{found['seconds']} s", flush=True)
