"""Columns in blocks: the same numbers as from one matrix, and no objective ever holds such a matrix."""

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from hncse_ray import objectives
from hncse_ray.objectives import blocks

torch.set_num_threads(1)

b, N, D = 7, 300, 5  # five blocks of columns, the last one of 44
TEMPERATURE = 0.3


@pytest.fixture(autouse=True)
def narrow(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blocks, "BLOCK", 1)


def unit(*shape: int, seed: int) -> Tensor:
    draw = torch.Generator().manual_seed(seed)
    return F.normalize(torch.randn(*shape, generator=draw, dtype=torch.float64), dim=-1)


def masks_of(kind: str) -> list[Tensor]:
    draw = torch.Generator().manual_seed(4)
    masks = [torch.rand(b, N, generator=draw) < 0.6, (torch.rand(N, generator=draw) < 0.5).expand(b, N)]
    masks[0][2] = False  # an anchor without any column
    return {"none": [], "one": masks[:1], "two": masks}[kind]


def all_at_once(z_bD: Tensor, columns_ND: Tensor, own_from: int | None, masks: list[Tensor]) -> tuple[Tensor, ...]:
    s_bN = z_bD @ columns_ND.T
    others_bN = functools.reduce(torch.logical_and, masks, torch.ones(b, N, dtype=torch.bool))
    own_b = s_bN.new_zeros(b)
    if own_from is not None:
        rows = torch.arange(b)
        own_b = s_bN[rows, own_from + rows]
        others_bN = others_bN.clone()
        others_bN[rows, own_from + rows] = False
    s_bN = s_bN.masked_fill(~others_bN, -torch.inf)
    return (s_bN / TEMPERATURE).logsumexp(dim=1), own_b, s_bN.amax(dim=1), s_bN


@pytest.mark.parametrize("masks", ["none", "one", "two"])
@pytest.mark.parametrize("own_from", [None, 0, 60, 126, N - b])  # within a block, and across the bounds of two
def test_sums_and_gradients_are_those_of_one_matrix(own_from: int | None, masks: str) -> None:
    given = [unit(b, D, seed=1).requires_grad_(), unit(N, D, seed=2).requires_grad_()]
    how: dict[str, Any] = {"own_from": own_from, "masks": masks_of(masks)}
    found = blocks.over_columns(*given, temperature=TEMPERATURE, **how)
    expected = all_at_once(*given, own_from, masks_of(masks))
    torch.testing.assert_close(found, expected[:3], atol=1e-12, rtol=0)
    assert not found[2].requires_grad
    weights_b = torch.linspace(0.5, 2, b, dtype=torch.float64)
    finite_b = expected[0].detach().isfinite()  # -inf has no gradient; beside it there is always the own column

    def gradients(total_b: Tensor, own_b: Tensor) -> tuple[Tensor, ...]:
        rows_b = torch.logaddexp(total_b, own_b / TEMPERATURE)
        return torch.autograd.grad((weights_b * rows_b)[finite_b].sum() + own_b.square().sum(), given)

    torch.testing.assert_close(gradients(*found[:2]), gradients(*expected[:2]), atol=1e-12, rtol=0)


@pytest.mark.parametrize("k", [1, 4, 70, N])
@pytest.mark.parametrize("masks", ["none", "two"])
def test_the_nearest_are_those_of_one_matrix(k: int, masks: str) -> None:
    z_bD, columns_ND = unit(b, D, seed=1), unit(N, D, seed=2)
    top_bk, which_bk = blocks.nearest(z_bD, columns_ND, k=k, own_from=60, masks=masks_of(masks))
    expected_bN = all_at_once(z_bD, columns_ND, 60, masks_of(masks))[3]
    torch.testing.assert_close(top_bk, expected_bN.topk(k, dim=1).values, atol=1e-12, rtol=0)
    torch.testing.assert_close(expected_bN.gather(1, which_bk), top_bk, atol=1e-12, rtol=0)


class Largest(TorchDispatchMode):
    """Remembers how many numbers the largest new tensor had."""

    most = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        result = func(*args, **(kwargs or {}))
        for made in tree_leaves(result):
            if isinstance(made, Tensor) and made.numel() == made.untyped_storage().size() // made.itemsize:
                self.most = max(self.most, made.numel())
        return result


ROWS, M = 1024, 2
POSITIVE = {"margin": 0.4, "w_pos": 1.2, "w_neg": 0.7}
NEGATIVE = {"k": 4, "n_mixes": 5, "alpha": 0.5}
SMOOTHING = {"group_size": 3, "attention_temperature": 2.0, "weight": 0.5}
EVERY: dict[str, Callable[..., Any]] = {
    "info_nce": objectives.info_nce,
    "three_view": objectives.three_view,
    "positive_mixing": functools.partial(objectives.positive_mixing, **POSITIVE),
    "hard_negative_mixing": functools.partial(objectives.hard_negative_mixing, **NEGATIVE),
    "hybrid": functools.partial(objectives.hybrid, **POSITIVE, **NEGATIVE),
    "instance_smoothing": functools.partial(objectives.instance_smoothing, **SMOOTHING),
}
BY_COLUMNS = [(name, "all") for name in EVERY if name != "instance_smoothing"]


@pytest.mark.parametrize(("name", "columns"), [*((name, "own") for name in EVERY), *BY_COLUMNS])
def test_no_objective_holds_a_matrix_of_the_batch(name: str, columns: str) -> None:
    views = [unit(ROWS, D, seed=i).requires_grad_() for i in range(3 if name == "three_view" else 2)]
    given: dict[str, Any] = {"batch_mask": ~torch.eye(ROWS, dtype=torch.bool)}
    if name == "instance_smoothing":
        given["buffer"] = unit(64, D, seed=5)
    else:
        given |= {"negatives": unit(ROWS, M, D, seed=6), "negatives_mask": torch.rand(ROWS, M) < 0.5}
        given["columns"] = columns
    if columns == "all":
        given["columns_mask"] = torch.rand(ROWS, ROWS * M) < 0.5
    with Largest() as seen:
        EVERY[name](*views, temperature=0.2, **given)[0].backward()
    assert ROWS * 64 <= seen.most <= ROWS * 80 < ROWS * ROWS / 8  # a block, 64 columns wide, with k beside it
