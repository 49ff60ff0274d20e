"""Copies on the host of what training changes, made beside the forward and backward of the next step."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from concurrent.futures import Future, ThreadPoolExecutor

import torch
from torch import Tensor

Copies = dict[str, Tensor]


class HostCopy:
    """Tensors that are on the host, or on their way there; made by :class:`HostCopier`."""

    def __init__(self, under_way: Future[tuple[Copies, torch.cuda.Event | None]]) -> None:
        self._under_way = under_way

    def wait(self) -> Copies:
        """Return them when they are whole; from any thread."""
        copies, done = self._under_way.result()
        if done is not None:
            done.synchronize()
        return copies

    def hold(self) -> None:
        """Have what this thread does next, and the device is given next, come after the copy."""
        _, done = self._under_way.result()
        if done is not None:
            torch.cuda.current_stream().wait_event(done)


class HostCopier:
    """Copies tensors to the host as they are now, by a thread and, on a GPU, by a stream of its own.

    Only the optimiser's next step waits for it: nothing else of a training step changes weights or moments. What is
    changed otherwise must wait by itself.

    Args:
        optimizer: changes the tensors.
    """

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self._threads = ThreadPoolExecutor(1, thread_name_prefix="host-copy")
        self._under_way: list[HostCopy] = []
        optimizer.register_step_pre_hook(self._before_step)

    def copy(self, tensors: Mapping[str, Tensor], *, rounded: Collection[str] = ()) -> HostCopy:
        """Begin to copy.

        Args:
            tensors: by name.
            rounded: names of those that are copied in bf16.
        """
        side: torch.cuda.Stream | None = None
        if any(value.is_cuda for value in tensors.values()):
            side = torch.cuda.Stream()  # type: ignore[no-untyped-call]
            side.wait_stream(torch.cuda.current_stream())
        copy = HostCopy(self._threads.submit(_copied, dict(tensors), set(rounded), side))
        self._under_way.append(copy)
        return copy

    def _before_step(self, *_: object) -> None:
        for copy in self._under_way:
            copy.hold()
        self._under_way.clear()


@torch.no_grad()
def _copied(
    tensors: Copies, rounded: Collection[str], side: torch.cuda.Stream | None
) -> tuple[Copies, torch.cuda.Event | None]:
    copies, done = {}, None
    with torch.cuda.stream(side):  # nothing where there is none
        for name, value in tensors.items():
            dtype = torch.bfloat16 if name in rounded else value.dtype
            if not value.is_cuda:
                copies[name] = value.to(dtype, copy=True).contiguous()
                continue
            assert side is not None
            value.record_stream(side)
            pinned = torch.empty(value.shape, dtype=dtype, pin_memory=True)
            copies[name] = pinned.copy_(value.to(dtype), non_blocking=True)
        if side is not None:
            done = torch.cuda.Event(blocking=True)  # type: ignore[no-untyped-call]
            done.record()
    return copies, done
