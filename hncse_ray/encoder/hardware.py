"""Where an encoder computes, and in what precision: by what the hardware does natively."""

from __future__ import annotations

import ctypes
import re
from contextlib import suppress
from typing import Any

import torch
from numpy.typing import NDArray
from torch import Tensor

from hncse_ray.config import Precision
from hncse_ray.errors import ModelError, counted

_MMAP_THRESHOLD, _TRIM_THRESHOLD = -3, -1  # as malloc.h numbers them
_LARGEST_KEPT = 2**30


def choose_device(wanted: str | torch.device) -> torch.device:
    """Return the device that is meant.

    Args:
        wanted: ``cpu``, ``cuda``, ``cuda:N``, or ``auto``: a GPU where there is one; or a device, which it stays.

    Raises:
        ModelError: there is no such device.
    """
    if isinstance(wanted, torch.device):
        return wanted
    count = torch.cuda.device_count()
    if wanted == "auto":
        return torch.device("cuda" if count else "cpu")
    if not re.fullmatch("cpu|cuda(:[0-9]+)?", str(wanted)):
        raise ModelError("is no device", repr(wanted), "Choose auto, cpu, cuda or cuda:N")
    if wanted != "cpu" and int(wanted.partition(":")[2] or 0) >= count:
        raise ModelError(f"PyTorch sees {counted(count, 'GPU')} here", repr(wanted), "Choose auto or cpu")
    return torch.device(wanted)


def keep_large_blocks() -> None:
    """Have the C library keep large blocks of memory that were freed, for the next ones; on Linux.

    The activations of long rows are larger than what glibc keeps by itself (32 MiB). Each would be mapped anew, and the
    system would fill its pages with zeros: a quarter of the time of encoding (benchmarks/LOG.md).
    """
    with suppress(OSError, AttributeError):  # another C library
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(_MMAP_THRESHOLD, _LARGEST_KEPT)
        mallopt(_TRIM_THRESHOLD, _LARGEST_KEPT)


def to_device(array: NDArray[Any] | Tensor, device: torch.device) -> Tensor:
    """Copy an array to a device; from pinned memory to a GPU, or the host would wait for all that it has to do."""
    return ready_for(array, device).to(device, non_blocking=True)


def ready_for(array: NDArray[Any] | Tensor, device: torch.device) -> Tensor:
    """Return an array as a tensor that :func:`to_device` copies at once: pinned, if the device is a GPU."""
    tensor = array if isinstance(array, Tensor) else torch.from_numpy(array)
    return tensor if device.type == "cpu" or tensor.is_pinned() else tensor.pin_memory()


def autocast_dtype(precision: Precision, device: torch.device) -> tuple[torch.dtype | None, str]:
    """Decide whether the encoder computes under bf16 autocast.

    On a CPU without bf16 instructions PyTorch emulates bf16 and is many times slower than fp32, so ``auto``
    turns it on only where the processor or the GPU computes in it.

    Args:
        precision: the setting ``encoder.precision``.
        device: where the encoder runs.

    Returns:
        The autocast dtype, None for fp32, and the reason, to be shown once.

    Raises:
        ModelError: bf16 was asked for on a GPU that cannot do it.
    """
    if precision == "fp32":
        return None, "fp32 (as set)"
    if device.type == "cuda":
        native = torch.cuda.is_bf16_supported(including_emulation=False)
        if precision == "bf16" and not native:
            raise ModelError("this GPU has no bf16", "encoder.precision", "Set encoder.precision=fp32")
        source = torch.cuda.get_device_name(device)
    else:
        flags = torch.cpu.get_capabilities()
        native = any(flags.get(name, False) for name in ("avx512_bf16", "amx_bf16", "bf16"))
        source = "this CPU"
    if precision == "bf16":
        return torch.bfloat16, "bf16 (as set)" if native else f"bf16 (as set, emulated: {source} has no bf16, slow)"
    return (torch.bfloat16, f"bf16 ({source} has it)") if native else (None, f"fp32 ({source} has no bf16)")
