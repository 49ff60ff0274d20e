"""Model FLOPs utilisation: what share of a GPU's peak the products of training have.

Source: PaLM (Chowdhery et al. 2022, arXiv 2204.02311, appendix B). Products alone count, those of attention among them,
over the tokens without padding. What gradient caching or checkpointing computes again does not count; what cls pooling
spares in the last layer of packed rows does, as in the model.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from hncse_ray.encoder import SentenceEncoder
from hncse_ray.training.step import LocalBatch

# Dense bf16 with sums in fp32, FLOP/s by NVIDIA's data sheets.
_PEAKS = {
    "A10": 125e12,
    "A30": 165e12,
    "A100": 312e12,
    "L4": 121e12,
    "L40S": 362e12,
    "H100": 989e12,
    "H100 PCIe": 756e12,
    "H200": 989e12,
    "B200": 2250e12,
}
_LENGTHS = (2, 4, 8)  # a polynomial of degree 2 goes through three points


@dataclass(frozen=True)
class ModelFlops:
    """FLOPs of training on rows of tokens.

    Attributes:
        token: of a token, in the layers.
        pair: of a pair of tokens of a row, in attention.
    """

    token: float
    pair: float

    @classmethod
    def count(cls, encoder: SentenceEncoder) -> ModelFlops:
        """Count the products of a forward on rows of three lengths; the backward has twice as many.

        Weights that stand still beside adapters need no gradient: then it has as many.
        """
        was_training = encoder.training
        encoder.eval()
        with torch.no_grad(), sdpa_kernel(SDPBackend.MATH):  # the counter does not know the fused attention of CPUs
            forward = [_forward_flops(encoder, length) for length in _LENGTHS]
        encoder.train(was_training)
        _, token, pair = np.polynomial.polynomial.polyfit(_LENGTHS, forward, 2)  # the first is once a row: head, pooler
        passes = 3 if encoder.trained().keys() == encoder.state_dict().keys() else 2
        return cls(passes * float(token), passes * float(pair))

    def of(self, batches: Sequence[LocalBatch]) -> float:
        """Return the FLOPs of batches that are laid out, all views and fresh negatives."""
        lengths_N = np.concatenate([layout.lengths for batch in batches for layout in batch.layouts or ()])
        return self.token * float(lengths_N.sum()) + self.pair * float((lengths_N**2).sum())


def peak_flops(encoder: SentenceEncoder) -> float | None:
    """Return the peak FLOP/s of the GPU that an encoder trains on; None on a CPU, in fp32, and where none is known."""
    if encoder.device.type != "cuda" or encoder.autocast is not torch.bfloat16:
        return None
    return peak_of(torch.cuda.get_device_name(encoder.device))


def peak_of(gpu: str) -> float | None:
    """Return the peak FLOP/s of a GPU, by its driver's name for it, such as ``NVIDIA H100 PCIe``."""
    words = gpu.replace("-", " ") + " "
    fitting = [name for name in _PEAKS if f" {name} " in words]
    return _PEAKS[max(fitting, key=len)] if fitting else None


def _forward_flops(encoder: SentenceEncoder, length: int) -> int:
    features = encoder.features([np.zeros(length, dtype=np.int32)], pack=False)
    with FlopCounterMode(display=False) as counter:
        encoder(features)
    return int(counter.get_total_flops())
