"""Copies on the host of what training changes, made beside the forward and backward of the next step."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Mapping
from concurrent.futures import Future, ThreadPoolExecutor

import torch
from torch import Tensor

from hncse_ray.training.image import FileImage

Copies = dict[str, Tensor]


class HostCopy:
    """Tensors that are on the host, or on their way there, as an image of a file; made by :class:`HostCopier`."""

    def __init__(self, image: FileImage, under_way: Future[tuple[Copies, torch.cuda.Event | None]]) -> None:
        self.image, self._under_way = image, under_way

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
        self._kept: defaultdict[str, FileImage] = defaultdict(FileImage)
        optimizer.register_step_pre_hook(self._before_step)

    def copy(
        self, tensors: Mapping[str, Tensor], *, rounded: Collection[str] = (), over: str | None = None
    ) -> HostCopy:
        """Begin to copy.

        Args:
            tensors: by name.
            rounded: names of those that are copied in bf16.
            over: what to call the memory that they are copied into, and which keeps what it is: the copy before that
                was called so is lost. None: memory of their own.
        """
        side: torch.cuda.Stream | None = None
        if any(value.is_cuda for value in tensors.values()):
            side = torch.cuda.Stream()  # type: ignore[no-untyped-call]
            side.wait_stream(torch.cuda.current_stream())
        image = FileImage() if over is None else self._kept[over]
        copy = HostCopy(image, self._threads.submit(_copied, dict(tensors), set(rounded), image, side))
        self._under_way.append(copy)
        return copy

    def _before_step(self, *_: object) -> None:
        for copy in self._under_way:
            copy.hold()
        self._under_way.clear()


@torch.no_grad()
def _copied(
    tensors: Copies, rounded: Collection[str], image: FileImage, side: torch.cuda.Stream | None
) -> tuple[Copies, torch.cuda.Event | None]:
    dtypes = {name: torch.bfloat16 if name in rounded else value.dtype for name, value in tensors.items()}
    shapes = {name: (dtypes[name], value.shape) for name, value in tensors.items()}
    copies, done = image.lay_out(shapes, pinned=side is not None), None
    with torch.cuda.stream(side):  # nothing where there is none
        for name, value in tensors.items():
            if value.is_cuda:
                assert side is not None
                value.record_stream(side)
                value = value.to(dtypes[name])  # rounded before it travels
            copies[name].copy_(value, non_blocking=value.is_cuda)
        if side is not None:
            done = torch.cuda.Event(blocking=True)  # type: ignore[no-untyped-call]
            done.record()
    return copies, done
