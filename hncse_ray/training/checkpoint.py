"""What a checkpoint holds, and the store that keeps it.

``state.json`` is written last and names every other file, and itself, by digest, so a folder that was cut short or
damaged is told from a whole one. The digest is XXH3, which finds damage, not forgery, in a fraction of the time of
a cryptographic one. Dropout and random pairs are seeded by (run seed, batch, rank, chunk) at every step,
so no generator state needs saving and the data position follows from the step.
"""

from __future__ import annotations

import json
import logging
import mmap
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import asdict, dataclass, field
from enum import IntEnum
from pathlib import Path
from typing import Any, Protocol

import torch
import xxhash
from safetensors.torch import load_file
from torch import Tensor

from hncse_ray.config import Settings
from hncse_ray.encoder import SentenceEncoder
from hncse_ray.errors import StorageError
from hncse_ray.training.distributed import gather_values
from hncse_ray.training.host_copy import HostCopier, HostCopy
from hncse_ray.training.objective import Objective
from hncse_ray.training.run_folder import LAST_FILE

logger = logging.getLogger(__name__)

Weights = dict[str, Tensor]


class Damaged(StorageError):
    """A checkpoint is not as it was written."""


@dataclass
class TrainState:
    """Where a run stands; everything that is neither a tensor nor a setting.

    Attributes:
        step: optimiser steps taken.
        evaluated_step: step of the last dev evaluation, -1 for none.
        best_step: step whose weights scored best on dev.
        best_score: their score, None before the first evaluation.
        evaluations_without_gain: dev evaluations since then.
        before: scores by split at step 0.
        whitened_base: the same of the base whitened on the corpus; empty where it was not scored.
        whitened_base_power: of that whitening; 0 where it was not scored.
        best_scores: dev scores of the best weights.
        before_earned: what each dev query earned at step 0 by the metric that chooses, by set.
        best_earned: the same with the best weights.
        sentences: sentences trained on, repeats counted.
        train_seconds: time spent on them; evaluation and checkpoints left out.
        seconds: time spent on all else, by what it was.
        corpus_digest: of the prepared corpus.
        positive_similarity: mean cosine of the two views, at the last log.
        index_version: of the global negatives in use, and the positive similarity they were selected by; None
            without global negatives.
    """

    step: int = 0
    evaluated_step: int = -1
    best_step: int = 0
    best_score: float | None = None
    evaluations_without_gain: int = 0
    before: dict[str, dict[str, float]] = field(default_factory=dict)
    whitened_base: dict[str, dict[str, float]] = field(default_factory=dict)
    whitened_base_power: float = 0.0
    best_scores: dict[str, float] = field(default_factory=dict)
    before_earned: dict[str, list[float]] = field(default_factory=dict)
    best_earned: dict[str, list[float]] = field(default_factory=dict)
    sentences: int = 0
    train_seconds: float = 0.0
    seconds: dict[str, float] = field(default_factory=dict)
    corpus_digest: str = ""
    positive_similarity: float = 1.0
    index_version: dict[str, Any] | None = None

    def add_seconds(self, phase: str, seconds: float) -> None:
        """Count time that was not spent on training."""
        self.seconds[phase] = self.seconds.get(phase, 0.0) + seconds

    @contextmanager
    def counted_as(self, phase: str) -> Iterator[None]:
        """Count what is done meanwhile."""
        started = time.perf_counter()
        yield
        self.add_seconds(phase, time.perf_counter() - started)


@dataclass(frozen=True)
class Resumed:
    """What a run resumes with, beside the parts that it was loaded into.

    Attributes:
        state: where the run stands.
        best: weights of the best dev score.
        index: weights that the global negatives in use were made from, if they were kept.
        passed_over: a line for each damaged checkpoint that was newer.
    """

    state: TrainState
    best: Weights | None
    index: Weights | None
    passed_over: list[str]


class Request(IntEnum):
    """What may be asked of a run from outside; the greater includes the less."""

    NOTHING = 0
    CHECKPOINT = 1  # out of turn
    PAUSE = 2  # a checkpoint, and an end from which the run is started again


class RunStore(Protocol):
    """Where checkpoints and the exported model go. All ranks call ``save`` and ``requested`` equally often."""

    def checkpoints(self) -> Iterable[Path]:
        """Yield the folders of complete checkpoints, newest first."""
        ...

    def save(self, step: int, write: Callable[[Path], None] | None) -> None:
        """Keep a checkpoint, and remove old ones from this rank's node.

        Args:
            step: which it is of.
            write: on rank 0, which calls this in a thread: puts it into an empty folder. None on the others.

        Raises:
            StorageError: it could not be written.
        """
        ...

    def requested(self) -> Request:
        """Say what is asked of the run now; the same on every rank, and once for each reason."""
        ...

    def export(self, write: Callable[[Path], None]) -> None:
        """Replace the run's model by what ``write(folder)`` puts into an empty folder; on rank 0 only.

        Raises:
            StorageError: it could not be written; the old model is still there.
        """
        ...


@dataclass(frozen=True)
class Snapshot:
    """Everything that going on needs, as it was when it was taken; on the host, or on its way there.

    Attributes:
        copies: weights and moments that training changes next, by file.
        others: weights that it does not change, by file.
        content: where the run stands, and the progress of optimiser and schedule, for JSON.
        settings: the resolved settings, as YAML.
    """

    copies: dict[str, HostCopy]
    others: dict[str, Weights]
    content: dict[str, Any]
    settings: str

    @classmethod
    def take(
        cls,
        *,
        settings: Settings,
        state: TrainState,
        encoder: SentenceEncoder,
        optimizer: torch.optim.Optimizer,
        schedule: torch.optim.lr_scheduler.LRScheduler,
        objective: Objective,
        copier: HostCopier,
        best: Weights | None,
        index: Weights | None = None,
    ) -> Snapshot:
        """Begin to copy what training changes, over the snapshot before.

        Args:
            settings: the resolved settings.
            state: where the run stands.
            encoder: the present weights.
            optimizer: its moments.
            schedule: its position.
            objective: its state.
            copier: of the optimiser.
            best: weights of the best dev score; None if they are the present ones.
            index: weights that the global negatives in use were made from; None if going on does not need them.
        """
        copies = {
            "encoder": copier.copy(encoder.trained(), over="weights"),
            "training": copier.copy(_moments(optimizer, objective), over="moments"),
        }
        others = {name: part for name, part in (("best", best), ("index", index)) if part is not None}
        progress = {"groups": optimizer.state_dict()["param_groups"], "schedule": schedule.state_dict()}
        return cls(copies, others, {"state": asdict(state), "progress": deepcopy(progress)}, settings.to_yaml())

    def write(self, folder: Path) -> None:
        """Write all of it into an empty folder; from any thread."""
        files = {}
        for name, copy in self.copies.items():
            copy.wait()
            files[f"{name}.safetensors"] = copy.image.write(folder / f"{name}.safetensors")
        image = self.copies["encoder"].image  # on the disk by now
        for name, part in self.others.items():
            image.fill(part)
            files[f"{name}.safetensors"] = image.write(folder / f"{name}.safetensors")
        (folder / "settings.yaml").write_text(self.settings, encoding="utf-8")
        files["settings.yaml"] = file_facts(folder / "settings.yaml")
        content = self.content | {"files": files}
        text = json.dumps(content | {"digest": _text_digest(content)}, indent=1)
        (folder / LAST_FILE).write_text(text, encoding="utf-8")


def read_newest(
    candidates: Iterable[Path],
    *,
    encoder: SentenceEncoder,
    optimizer: torch.optim.Optimizer,
    schedule: torch.optim.lr_scheduler.LRScheduler,
    objective: Objective,
) -> Resumed:
    """Load the newest checkpoint that is whole on every rank into the given parts. All ranks call it.

    Args:
        candidates: checkpoint folders, newest first; ranks on other nodes may have others.
        encoder: takes the weights.
        optimizer: takes the moments.
        schedule: takes the position.
        objective: takes the state.

    Returns:
        What is not taken by the parts; a fresh state if there is no checkpoint.
    """
    passed_over: list[str] = []
    for folder in _on_all_ranks(candidates):
        state, progress, failure = TrainState(), dict[str, Any](), None
        try:
            state, progress = read_state(folder)
        except Damaged as error:
            failure = error
        damaged = next((error for error in gather_values(failure) if error is not None), None)
        if damaged is not None:
            logger.warning("%s", damaged)
            passed_over.append(str(damaged))
            continue
        weights = load_file(folder / "encoder.safetensors")
        encoder.load_weights(weights)
        _take_moments(load_file(folder / "training.safetensors"), progress["groups"], optimizer, objective)
        schedule.load_state_dict(progress["schedule"])
        kept, index = folder / "best.safetensors", folder / "index.safetensors"
        return Resumed(
            state=state,
            best=load_file(kept) if kept.exists() else weights,
            index=load_file(index) if index.exists() else None,
            passed_over=passed_over,
        )
    return Resumed(TrainState(), None, None, passed_over)


def _moments(optimizer: torch.optim.Optimizer, objective: Objective) -> Weights:
    """Return the tensors that the optimiser remembers, and copies of the objective's, which a loss changes already."""
    found = {f"objective.{name}": value.clone() for name, value in objective.state_dict().items()}
    for parameter, moments in optimizer.state_dict()["state"].items():
        found |= {f"optimizer.{parameter}.{name}": value for name, value in moments.items()}
    return found


def _take_moments(
    found: Weights, groups: list[dict[str, Any]], optimizer: torch.optim.Optimizer, objective: Objective
) -> None:
    """Load what :func:`_moments` returned."""
    moments: dict[int, Weights] = defaultdict(dict)
    remembered: Weights = {}
    for name, value in found.items():
        match name.split("."):
            case "optimizer", parameter, moment:
                moments[int(parameter)][moment] = value
            case _, key:
                remembered[key] = value
    optimizer.load_state_dict({"state": dict(moments), "param_groups": groups})
    objective.load_state_dict(remembered)


def _on_all_ranks(candidates: Iterable[Path]) -> list[Path]:
    here = list(candidates)
    everywhere = set.intersection(*gather_values({folder.name for folder in here}))
    return [folder for folder in here if folder.name in everywhere]


def read_state(folder: Path) -> tuple[TrainState, dict[str, Any]]:
    """Return what state.json holds.

    Raises:
        Damaged: it, or a file beside it, is not as it was written.
    """
    try:
        content = json.loads((folder / LAST_FILE).read_text(encoding="utf-8"))
        if content.pop("digest") != _text_digest(content):
            raise Damaged("the checkpoint is damaged (state.json differs from what was written)", str(folder))
        found, files = {path.name for path in folder.iterdir()} - {LAST_FILE}, content["files"]
        if odd := found - files.keys():
            raise Damaged(f"the checkpoint holds what was not written by it ({min(odd)})", str(folder))
        if missing := files.keys() - found:
            raise Damaged(f"the checkpoint is incomplete (there is no {min(missing)})", str(folder))
        for name in found:
            if file_facts(folder / name) != files[name]:
                raise Damaged(f"the checkpoint is damaged ({name} differs from what was written)", str(folder))
        return TrainState(**content["state"]), content["progress"]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise Damaged(f"the checkpoint is incomplete ({type(error).__name__}: {error})", str(folder)) from error


def _text_digest(content: dict[str, Any]) -> str:
    return xxhash.xxh3_128_hexdigest(json.dumps(content, sort_keys=True).encode())


def file_facts(path: Path) -> list[Any]:
    """Return the size and the digest of a file."""
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        return [len(content), xxhash.xxh3_128_hexdigest(content)]
