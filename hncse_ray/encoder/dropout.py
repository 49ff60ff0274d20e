"""Dropout for CPUs: the same distribution as ``torch.nn.Dropout``, drawn several times as fast.

On a CPU PyTorch draws a mask element by element from one Mersenne twister, in one thread: a tenth of a training step of
a small encoder (benchmarks/LOG.md). Sixteen bits a element from a faster generator decide as well.
"""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

_LEVELS = 1 << 16


class BitDropout(nn.Module):
    """Dropout whose CPU masks compare 16 random bits to a threshold.

    The rate is ``round(p * 65536) / 65536``, within 1e-5 of p, and survivors are scaled by the inverse of their share.
    The mask is a function of PyTorch's default generator, so ``torch.manual_seed`` decides it as usual. On
    other devices it is PyTorch's own dropout.

    Args:
        p: the dropout rate, from 0 to below 1.
    """

    def __init__(self, p: float) -> None:
        super().__init__()
        self.p = p

    def forward(self, x: Tensor) -> Tensor:
        """Drop elements of ``x`` (any shape) in training mode."""
        if x.device.type != "cpu":
            return F.dropout(x, self.p, self.training)
        if not self.training or round(self.p * _LEVELS) == 0:
            return x
        kept, inverse = kept_by_dropout(x.numel(), self.p)
        return x * kept.to(x.dtype).mul_(inverse).view(x.shape)

    def extra_repr(self) -> str:
        return f"p={self.p}"


def kept_by_dropout(n: int, p: float) -> tuple[Tensor, float]:
    """Draw on the CPU which of n elements survive, bool ``[n]``; and return the inverse of the survivors' share."""
    dropped = round(p * _LEVELS)
    seed = int(torch.randint(1 << 62, ()))
    words = np.random.Generator(np.random.SFC64(seed)).integers(1 << 64, size=-(-n // 4), dtype=np.uint64)
    bits = torch.from_numpy(words.view(np.int16)[:n])
    return bits >= dropped - _LEVELS // 2, _LEVELS / (_LEVELS - dropped)


def replace_dropout(module: nn.Module) -> None:
    """Put :class:`BitDropout` in place of every ``nn.Dropout`` below ``module``."""
    for name, child in module.named_children():
        if type(child) is nn.Dropout:
            setattr(module, name, BitDropout(child.p))
        else:
            replace_dropout(child)
