"""One, two and four ranks on the same global batch: the same loss and the same gradient, for every objective."""

from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from rank_parity import CASES, SENTENCES, Found, errors, free_port, gradients, join_group

from hncse_ray.config import load_settings
from hncse_ray.encoder import load_encoder
from hncse_ray.errors import DataError
from hncse_ray.training.distributed import ShardedEncode, gather_rows, raise_together


def sharded_vectors(model: str | Path) -> np.ndarray:
    settings = load_settings({"corpus": {"source": "python-docs"}, "encoder": {"pooling": "mean"}})
    return ShardedEncode(load_encoder(model, settings.encoder), batch_size=5)(SENTENCES)


def work(rank: int, world: int, port: int, model: str, out: str) -> None:
    join_group(rank, world, port)
    found: dict[str, object] = {"gradients": gradients(model, rank, world), "vectors": sharded_vectors(model)}
    gathered = gather_rows(torch.full((rank, 2), float(rank)), tuple(range(world)))
    found["gathered"] = gathered[:, 0].tolist()
    try:
        raise_together(DataError("only the last rank has met this") if rank == world - 1 else None)
    except DataError as error:
        found["error"] = str(error)
    torch.save(found, f"{out}/{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def reference(tiny_model: Path) -> Found:
    return gradients(str(tiny_model), 0, 1)


@pytest.fixture(scope="module", params=[2, 4])
def ranks(request: pytest.FixtureRequest, tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> list[dict]:
    out = tmp_path_factory.mktemp("ranks")
    mp.spawn(work, (request.param, free_port(), str(tiny_model), str(out)), nprocs=request.param)
    return [torch.load(out / f"{r}.pt", weights_only=False) for r in range(request.param)]


@pytest.mark.parametrize("case", CASES)
def test_loss_and_gradient_equal_those_of_one_process(case: str, ranks: list[dict], reference: Found) -> None:
    assert reference[case][1].norm() > 1e-3
    for found in ranks:
        error = errors(found["gradients"], reference)[case]
        assert error["loss"] <= 1e-5 and error["gradient"] <= 1e-5


def test_gradient_caching_changes_nothing(reference: Found) -> None:
    error = errors({"hybrid": reference["hybrid, cached"]}, {"hybrid": reference["hybrid"]})["hybrid"]
    assert error["loss"] <= 1e-5 and error["gradient"] <= 1e-5


def test_sharded_encoding_gives_the_vectors_of_one_process(ranks: list[dict], tiny_model: Path) -> None:
    alone = sharded_vectors(tiny_model)
    for found in ranks:
        np.testing.assert_allclose(found["vectors"], alone, atol=1e-6)
        np.testing.assert_array_equal(found["vectors"], ranks[0]["vectors"])


def test_gathering_takes_ranks_of_any_size_even_none(ranks: list[dict]) -> None:
    expected = [float(r) for r in range(len(ranks)) for _ in range(r)]
    assert all(found["gathered"] == expected for found in ranks)


def test_an_error_of_one_rank_is_raised_on_all(ranks: list[dict]) -> None:
    assert all(found["error"] == "only the last rank has met this" for found in ranks)
