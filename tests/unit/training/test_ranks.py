"""One, two and four ranks on the same global batch: the same loss and the same gradient, for every objective."""

import socket
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from tiny import make_sentences
from torch.nn.parallel import DistributedDataParallel

from hncse_ray.config import OBJECTIVES, load_settings
from hncse_ray.corpus import rank_slice
from hncse_ray.encoder import SentenceEncoder, load_encoder
from hncse_ray.errors import DataError
from hncse_ray.training.distributed import ShardedEncode, gather_rows, raise_together
from hncse_ray.training.objective import Objective
from hncse_ray.training.step import LocalBatch, StepContext, train_step

BATCH = 18  # does not divide by 4
SENTENCES = make_sentences(2 * BATCH, seed=5)
# name of the case -> objective, chunk size of gradient caching, accumulated batches
CASES = {name: (name, None, 1) for name in OBJECTIVES} | {
    "cached": ("hybrid", 2, 1),
    "cached and accumulated": ("instance_smoothing", 3, 2),
    "accumulated": ("positive_mixing", None, 2),
}


def gradients(model: str, rank: int, world: int) -> dict[str, tuple[float, torch.Tensor]]:
    """Loss and flattened gradient of one step of each case, on this rank."""
    found = {}
    for case, (name, chunk, accumulation) in CASES.items():
        overrides = [f"objective.name={name}", "encoder.dropout=0", "encoder.pooling=mean", f"encoder.model={model}"]
        if name == "instance_smoothing":
            overrides += ["objective.buffer_size=20", "objective.group_size=4", "objective.weight=2"]
        settings = load_settings({"corpus": {"source": "python-docs"}}, overrides)
        encoder = load_encoder(model, settings.encoder)
        wrapped: SentenceEncoder | DistributedDataParallel = encoder
        if world > 1:
            wrapped = DistributedDataParallel(encoder, broadcast_buffers=False)
        objective = Objective(settings.objective, dimension=encoder.dimension, device=encoder.device)
        if name == "instance_smoothing":  # a full buffer, so that smoothing is at work in the first step
            filled = torch.randn(20, encoder.dimension, generator=torch.Generator().manual_seed(1))
            objective.load_state_dict({"buffer": torch.nn.functional.normalize(filled, dim=-1)})
        rows = encoder.tokenize(SENTENCES)
        batches = []
        for number in range(accumulation):
            ids = np.arange(number * BATCH, (number + 1) * BATCH)
            sizes = tuple(len(rank_slice(ids, r, world)) for r in range(world))
            batches.append(LocalBatch(number, [rows[i] for i in rank_slice(ids, rank, world)], sizes))
        optimizer = torch.optim.SGD(encoder.parameters(), lr=0.0)
        context = StepContext(objective=objective, seed=1, step=0, total_steps=10, chunk_size=chunk)
        metrics, z1 = train_step(wrapped, optimizer, batches, context, max_grad_norm=1e9)
        assert z1.shape == (BATCH, encoder.dimension)
        flat = torch.cat([p.grad.flatten() for p in encoder.parameters() if p.grad is not None])
        found[case] = (float(metrics["loss"]), flat)
    return found


def work(rank: int, world: int, port: int, model: str, out: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=world)
    found: dict[str, object] = dict(gradients(model, rank, world))
    encoder = load_encoder(
        model, load_settings({"corpus": {"source": "python-docs"}, "encoder": {"pooling": "mean"}}).encoder
    )
    found["vectors"] = ShardedEncode(encoder, batch_size=5)(SENTENCES)
    gathered = gather_rows(torch.full((rank, 2), float(rank)), tuple(range(world)))
    found["gathered"] = gathered[:, 0].tolist()
    try:
        raise_together(DataError("only the last rank has met this") if rank == world - 1 else None)
    except DataError as error:
        found["error"] = str(error)
    torch.save(found, f"{out}/{rank}.pt")
    dist.destroy_process_group()


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.fixture(scope="module")
def reference(tiny_model: Path) -> dict[str, tuple[float, torch.Tensor]]:
    return gradients(str(tiny_model), 0, 1)


@pytest.fixture(scope="module", params=[2, 4])
def ranks(request: pytest.FixtureRequest, tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> list[dict]:
    out = tmp_path_factory.mktemp("ranks")
    mp.spawn(work, (request.param, free_port(), str(tiny_model), str(out)), nprocs=request.param)
    return [torch.load(out / f"{r}.pt", weights_only=False) for r in range(request.param)]


@pytest.mark.parametrize("case", CASES)
def test_loss_and_gradient_equal_those_of_one_process(
    case: str, ranks: list[dict], reference: dict[str, tuple[float, torch.Tensor]]
) -> None:
    loss, gradient = reference[case]
    assert gradient.norm() > 1e-3
    for found in ranks:
        assert abs(found[case][0] - loss) <= 1e-5 * abs(loss)
        assert (found[case][1] - gradient).norm() <= 1e-5 * gradient.norm()


def test_gradient_caching_changes_nothing(reference: dict[str, tuple[float, torch.Tensor]]) -> None:
    whole, cached = reference["hybrid"], reference["cached"]
    assert cached[0] == pytest.approx(whole[0], rel=1e-6)
    assert (cached[1] - whole[1]).norm() <= 1e-5 * whole[1].norm()


def test_sharded_encoding_gives_the_vectors_of_one_process(ranks: list[dict], tiny_model: Path) -> None:
    settings = load_settings({"corpus": {"source": "python-docs"}, "encoder": {"pooling": "mean"}})
    alone = ShardedEncode(load_encoder(tiny_model, settings.encoder), batch_size=5)(SENTENCES)
    for found in ranks:
        np.testing.assert_allclose(found["vectors"], alone, atol=1e-6)
        np.testing.assert_array_equal(found["vectors"], ranks[0]["vectors"])


def test_gathering_takes_ranks_of_any_size_even_none(ranks: list[dict]) -> None:
    expected = [float(r) for r in range(len(ranks)) for _ in range(r)]
    assert all(found["gathered"] == expected for found in ranks)


def test_an_error_of_one_rank_is_raised_on_all(ranks: list[dict]) -> None:
    assert all(found["error"] == "only the last rank has met this" for found in ranks)
