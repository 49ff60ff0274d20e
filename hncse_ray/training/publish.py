"""Handing weights to a source of global negatives while training goes on."""

from __future__ import annotations

import uuid
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from hncse_ray.negatives import NegativeSource, weights_digest

Weights = dict[str, Tensor]


def to_arrays(weights: Mapping[str, Tensor]) -> dict[str, NDArray[Any]]:
    """Return weights as a source takes them; NumPy has no bf16, so its bits travel as uint16, which no weight is."""
    return {
        name: (value.view(torch.uint16) if value.dtype == torch.bfloat16 else value).numpy()
        for name, value in weights.items()
    }


def from_arrays(arrays: Mapping[str, NDArray[Any]]) -> Weights:
    """Return copies of what :func:`to_arrays` was given."""
    tensors = {name: torch.tensor(np.asarray(array)) for name, array in arrays.items()}
    return {
        name: value.view(torch.bfloat16) if value.dtype == torch.uint16 else value for name, value in tensors.items()
    }


class Publisher:
    """Hands weights to a source: in a thread, but for a source that makes its version in this process.

    Args:
        source: takes them.
    """

    def __init__(self, source: NegativeSource) -> None:
        self._source = source
        self._threads = ThreadPoolExecutor(1, thread_name_prefix="publish")
        self._taken_step: int | None = None
        self._under_way: tuple[int, Future[bool]] | None = None

    @property
    def under_way(self) -> bool:
        """Whether weights are being handed over, or how that has ended has not been heard."""
        return self._under_way is not None

    @property
    def step(self) -> int | None:
        """Step of the weights that are being handed over, else of the last that were taken; None if none were."""
        return self._taken_step if self._under_way is None else self._under_way[0]

    def begin(self, weights: Callable[[], Weights], *, step: int, key: str | None = None) -> None:
        """Begin to hand weights over; the last must have been heard of.

        Args:
            weights: gives them, once they are on the host.
            step: which they are of.
            key: tells the version from others of that step; default: a new one, but before the first step what the
                weights are, so that an index of them is known again.
        """
        assert self._under_way is None

        def hand_over() -> bool:
            arrays = to_arrays(weights())
            new_key = key or (uuid.uuid4().hex if step else weights_digest(arrays))
            return self._source.publish(arrays, step=step, key=new_key)

        if self._source.builds_elsewhere:
            self._under_way = step, self._threads.submit(hand_over)
            return
        future: Future[bool] = Future()
        self._under_way = step, future
        try:
            future.set_result(hand_over())
        except Exception as error:
            future.set_exception(error)

    def hear(self, *, wait: bool) -> bool | None:
        """Return whether the weights were taken; None if that is not known yet, or was heard before.

        Raises:
            SourceUnavailable: the source cannot be reached.
        """
        if self._under_way is None or not (wait or self._under_way[1].done()):
            return None
        (step, future), self._under_way = self._under_way, None
        taken = future.result()
        if taken:
            self._taken_step = step
        return taken

    def close(self) -> None:
        """Hand nothing over any more."""
        self._threads.shutdown(wait=False, cancel_futures=True)
