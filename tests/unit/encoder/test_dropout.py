"""Dropout from 16 random bits an element: the distribution of PyTorch's, decided by PyTorch's seed."""

import pytest
import torch
from torch import nn

from hncse_ray.encoder.dropout import BitDropout, replace_dropout

N = 1_000_000


@pytest.mark.parametrize("p", [0.1, 0.3, 0.5])
def test_share_and_scale_are_those_of_dropout(p: float) -> None:
    torch.manual_seed(0)
    dropped = BitDropout(p).train()(torch.ones(N))
    assert (dropped == 0).float().mean().item() == pytest.approx(p, abs=5 * (p * (1 - p) / N) ** 0.5)
    assert dropped.max().item() == pytest.approx(1 / (1 - p), rel=1e-4)
    assert dropped.mean().item() == pytest.approx(1, abs=0.01)


def test_neighbours_are_independent() -> None:
    torch.manual_seed(1)
    zero = (BitDropout(0.1).train()(torch.ones(N)) == 0).float()
    for distance in (1, 2, 3, 4, 8):
        both = (zero[:-distance] * zero[distance:]).mean().item()
        assert both == pytest.approx(0.01, abs=5 * (0.01 * 0.99 / N) ** 0.5)


def test_the_seed_decides() -> None:
    dropout, x = BitDropout(0.1).train(), torch.randn(7, 5, 3)
    torch.manual_seed(2)
    first, second = dropout(x), dropout(x)
    torch.manual_seed(2)
    assert torch.equal(dropout(x), first)
    assert not torch.equal(first, second)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradient_takes_the_same_mask(dtype: torch.dtype) -> None:
    x = torch.ones(1001, dtype=dtype, requires_grad=True)
    y = BitDropout(0.5).train()(x)
    y.sum().backward()
    assert y.dtype == dtype and torch.equal(x.grad, y.detach())


def test_nothing_happens_outside_training_or_at_rate_zero() -> None:
    x = torch.randn(10)
    assert BitDropout(0.5).eval()(x) is x
    assert BitDropout(0.0).train()(x) is x


def test_it_takes_the_place_of_every_dropout() -> None:
    module = nn.Sequential(nn.Linear(2, 2), nn.Sequential(nn.Dropout(0.2), nn.ReLU()), nn.Dropout(0.3))
    replace_dropout(module)
    assert [(type(m), m.p) for m in module.modules() if hasattr(m, "p")] == [(BitDropout, 0.2), (BitDropout, 0.3)]
