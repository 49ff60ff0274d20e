"""Layers of PyTorch that compute the same faster on a CPU: products by oneDNN, dropout from 16 bits an element.

A model's own layers are turned into them when it is loaded; weights, their names and what is saved stay as they are. On
other devices they are PyTorch's.
"""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

_LEVELS = 1 << 16
_FEWEST_ROWS = 64  # with fewer the weights are longer on their way into oneDNN's layout than the product takes


class OneDnnLinear(nn.Linear):
    """A linear layer whose fp32 products oneDNN computes, as a convolution of width 1 over channels that lie last.

    PyTorch hands ``F.linear`` in fp32 to MKL, which is half as fast as oneDNN on processors of AMD (benchmarks/LOG.md);
    a convolution is its only public way to oneDNN that has a gradient. All of it is views. In bf16 it takes oneDNN
    itself.
    """

    def forward(self, x: Tensor) -> Tensor:
        """Map ``[..., in]`` to ``[..., out]``."""
        rows = x.numel() // self.in_features
        if (
            x.device.type != "cpu"
            or x.dtype != torch.float32
            or torch.is_autocast_enabled("cpu")
            or rows < _FEWEST_ROWS
        ):
            return super().forward(x)
        channels = x.reshape(1, rows, 1, self.in_features).permute(0, 3, 1, 2)
        # A single column is not dilated by 2; but PyTorch leaves undilated filters of 1 x 1 to MKL in one thread.
        z = F.conv2d(channels, self.weight[:, :, None, None], self.bias, dilation=(1, 2))
        return z.permute(0, 2, 3, 1).reshape(*x.shape[:-1], self.out_features)


class BitDropout(nn.Dropout):
    """Dropout whose CPU masks compare 16 random bits to a threshold.

    PyTorch draws a mask element by element from one Mersenne twister, in one thread: a tenth of a training step of a
    small encoder (benchmarks/LOG.md). The rate is ``round(p * 65536) / 65536``, within 1e-5 of p, and survivors are
    scaled by the inverse of their share. The mask is a function of PyTorch's default generator, so
    ``torch.manual_seed`` decides it as usual.
    """

    def forward(self, x: Tensor) -> Tensor:
        """Drop elements of ``x`` (any shape) in training mode."""
        if x.device.type != "cpu":
            return F.dropout(x, self.p, self.training)
        if not self.training or round(self.p * _LEVELS) == 0:
            return x
        kept, inverse = kept_by_dropout(x.numel(), self.p)
        return x * kept.to(x.dtype).mul_(inverse).view(x.shape)


def kept_by_dropout(n: int, p: float) -> tuple[Tensor, float]:
    """Draw on the CPU which of n elements survive, bool ``[n]``; and return the inverse of the survivors' share."""
    dropped = round(p * _LEVELS)
    seed = int(torch.randint(1 << 62, ()))
    words = np.random.Generator(np.random.SFC64(seed)).integers(1 << 64, size=-(-n // 4), dtype=np.uint64)
    bits = torch.from_numpy(words.view(np.int16)[:n])
    return bits >= dropped - _LEVELS // 2, _LEVELS / (_LEVELS - dropped)


def use_fast_layers(model: nn.Module) -> None:
    """Turn a model's layers into those of this module; the linear ones where MKL would run on a processor of AMD."""
    fast: dict[type, type] = {nn.Dropout: BitDropout}
    on_amd = "AMD" in torch.cpu.get_capabilities().get("cpu_name", "")
    has_both = torch.backends.mkl.is_available() and torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
    if on_amd and has_both:
        fast[nn.Linear] = OneDnnLinear
    for layer in model.modules():
        layer.__class__ = fast.get(type(layer), type(layer))
