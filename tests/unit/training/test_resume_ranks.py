"""Ranks on several nodes resume from the same checkpoint, though not every node has every one of them whole."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from rank_parity import free_port, join_group
from tiny import make_model

from hncse_ray.config import load_settings
from hncse_ray.encoder import load_encoder
from hncse_ray.training.checkpoint import Snapshot, TrainState, read_newest
from hncse_ray.training.host_copy import HostCopier
from hncse_ray.training.objective import Objective

STEPS = (4, 8, 12)


def parts(model: Path) -> dict:
    encoder = load_encoder(model)
    optimizer = torch.optim.SGD(encoder.parameters(), lr=0.1)
    return {
        "encoder": encoder,
        "optimizer": optimizer,
        "schedule": torch.optim.lr_scheduler.ConstantLR(optimizer),
        "objective": Objective(
            load_settings({"corpus": {"path": "x"}}).objective, dimension=encoder.dimension, device="cpu"
        ),
    }


def node(folder: Path, model: Path, *steps: int) -> None:
    for step in steps:
        (folder / f"step_{step:09d}").mkdir(parents=True)
        settings, state = load_settings({"corpus": {"path": "x"}}), TrainState(step=step)
        own = parts(model)
        copier = HostCopier(own["optimizer"])
        snapshot = Snapshot.take(settings=settings, state=state, best=None, copier=copier, **own)
        snapshot.write(folder / f"step_{step:09d}")


# what the second node has, which of these is damaged there, the step that both resume from, what is passed over
CASES = {
    "the same": (STEPS, (), 12, 0),
    "the newest was never sent to it": ((4, 8), (), 8, 0),
    "its newest is damaged": (STEPS, (12,), 8, 1),
    "its only one is damaged": ((4,), (4,), 0, 1),
    "none": ((), (), 0, 0),
}


def resume(rank: int, port: int, folder: str) -> None:
    join_group(rank, 2, port)
    for number in range(len(CASES)):
        place = Path(folder) / str(number)
        found = read_newest(sorted((place / str(rank)).glob("step_*"), reverse=True), **parts(Path(folder) / "model"))
        (place / f"{rank}.json").write_text(json.dumps([found.state.step, found.passed_over]))
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def resumed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("nodes")
    model = make_model(folder / "model")
    for number, (has, damaged, _, _) in enumerate(CASES.values()):
        place = folder / str(number)
        node(place / "0", model, *STEPS)
        node(place / "1", model, *has)
        for step in damaged:
            path = place / "1" / f"step_{step:09d}" / "training.safetensors"
            content = bytearray(path.read_bytes())
            content[len(content) // 2] ^= 1
            path.write_bytes(content)
    mp.spawn(resume, (free_port(), str(folder)), nprocs=2)
    return folder


@pytest.mark.parametrize("case", CASES)
def test_what_one_does_not_have_whole_none_takes(case: str, resumed: Path) -> None:
    place, (_, _, step, said) = resumed / str(list(CASES).index(case)), CASES[case]
    found = [json.loads((place / f"{rank}.json").read_text()) for rank in range(2)]
    assert found[0] == found[1]
    assert found[0][0] == step and len(found[0][1]) == said


def test_a_file_that_was_not_written_with_it_is_not_loaded(tmp_path: Path, tiny_model: Path) -> None:
    node(tmp_path, tiny_model, 4, 8)
    kept = tmp_path / "step_000000004/encoder.safetensors"
    (tmp_path / "step_000000008/best.safetensors").write_bytes(kept.read_bytes())
    found = read_newest(sorted(tmp_path.glob("step_*"), reverse=True), **parts(tiny_model))
    assert found.state.step == 4 and "best.safetensors" in found.passed_over[0]
