"""What the steps between two lines of the log have measured."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from hncse_ray.training.distributed import gather_rows
from hncse_ray.training.guards import batch_uniformity
from hncse_ray.training.objective import Metrics


class StepLog:
    """Metrics of the steps since the last log; they stay on the device until their mean is asked for."""

    def __init__(self) -> None:
        self.steps = 0
        self.sentences = 0
        self.flops = 0.0
        self.seconds = 0.0
        self.learning_rate = 0.0
        self._metrics: list[Metrics] = []
        self._z1_bD: Tensor | None = None
        self._sizes: tuple[int, ...] = ()
        self._z1_BD: Tensor | None = None

    def add(self, metrics: Metrics, z1_bD: Tensor, sizes: Sequence[tuple[int, ...]], learning_rate: float) -> None:
        self.steps += 1
        self.sentences += sum(map(sum, sizes))
        self.learning_rate = learning_rate
        self._metrics.append(metrics)
        self._z1_bD, self._sizes = z1_bD, sizes[-1]

    def gather(self) -> None:
        """Get the last batch of all ranks; on all of them, before its means are asked for."""
        assert self._z1_bD is not None
        self._z1_BD = gather_rows(self._z1_bD, self._sizes)

    def means(self) -> dict[str, float]:
        """Return the means, and the uniformity of the last batch."""
        assert self._z1_BD is not None
        uniformity = batch_uniformity(self._z1_BD)
        names = list(self._metrics[0])
        values = torch.stack([torch.stack([m[name].float() for name in names]) for m in self._metrics]).mean(dim=0)
        return dict(zip(names, values.tolist(), strict=True)) | {"uniformity": float(uniformity)}
