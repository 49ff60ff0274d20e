"""Layers made for CPUs: the distribution of PyTorch's dropout, the products of its linear layers."""

import copy
import pickle
import platform
import resource
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from hncse_ray.encoder import load_encoder
from hncse_ray.encoder.layers import BitDropout, OneDnnLinear, use_fast_layers

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


@pytest.mark.parametrize("shape", [(300, 24), (2, 50, 24), (5, 24), (1, 64, 24)])
@pytest.mark.parametrize("threads", [1, 2])
def test_products_and_gradients_are_those_of_a_linear_layer(shape: tuple[int, ...], threads: int) -> None:
    torch.manual_seed(0)
    plain = nn.Linear(24, 40)
    fast = copy.deepcopy(plain)
    fast.__class__ = OneDnnLinear
    x = torch.randn(shape)

    def everything(layer: nn.Linear, x: Tensor) -> list[Tensor]:
        x = x.clone().requires_grad_()
        z = layer(x)
        return [z, *torch.autograd.grad(z.square().sum(), [x, layer.weight, layer.bias])]

    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        found = everything(fast, x)
    finally:
        torch.set_num_threads(before)
    for mine, exact in zip(found, everything(plain.double(), x.double()), strict=True):
        torch.testing.assert_close(mine, exact.float(), atol=1e-4, rtol=1e-5)
    assert found[0].is_contiguous()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert fast(x).dtype == torch.bfloat16


@pytest.mark.parametrize("threads", [1, 2])
def test_onednn_computes_the_products(threads: int) -> None:
    layer, x = nn.Linear(200, 100), torch.randn(1, 200, 200)
    layer.__class__ = OneDnnLinear
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        with torch.profiler.profile() as profiled:
            layer(x).sum().backward()
    finally:
        torch.set_num_threads(before)
    names = {event.key for event in profiled.key_averages()}
    assert "aten::mkldnn_convolution" in names and not any("slow_conv" in name for name in names)


@pytest.mark.parametrize("name", ["AMD EPYC", "Intel Xeon"])
def test_a_model_gets_the_layers_that_are_fast_on_its_processor(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"cpu_name": name})
    model = nn.Sequential(nn.Linear(2, 2), nn.Sequential(nn.Dropout(0.2), nn.ReLU()), nn.Dropout(0.3))
    keys = list(model.state_dict())
    use_fast_layers(model)
    kinds = [type(m) for m in pickle.loads(pickle.dumps(copy.deepcopy(model))).modules()][1:]
    linear = OneDnnLinear if "AMD" in name and torch.backends.mkl.is_available() else nn.Linear
    assert kinds == [linear, nn.Sequential, BitDropout, nn.ReLU, BitDropout]
    assert list(model.state_dict()) == keys and model[2].p == 0.3


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another C library")
def test_large_blocks_of_memory_are_kept_for_the_next_ones(tiny_model: Path) -> None:
    load_encoder(tiny_model)
    floats, pages = 16 * 2**20, 16 * 2**20 * 4 // resource.getpagesize()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(8):
        torch.ones(floats)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before < 3 * pages  # not those of all eight
