"""Argument checks of the objectives: what is wrong, its value, what is allowed.

Only shapes, dtypes and Python numbers are looked at, so a check never waits for the accelerator. The one
exception is `check_pair_ranks`, which reads the values of pairs that a caller passed in.
"""

import math

import torch
from torch import Tensor


def check_at_least(name: str, value: float, minimum: float) -> None:
    """Raise ValueError unless `value` is finite and at least `minimum`."""
    if not minimum <= value < math.inf:
        raise ValueError(f"{name} is {value}; it must be finite and at least {minimum}")


def check_positive(name: str, value: float) -> None:
    """Raise ValueError unless `value` is finite and above 0."""
    if not 0 < value < math.inf:
        raise ValueError(f"{name} is {value}; it must be finite and above 0")


def check_fraction(name: str, value: float) -> None:
    """Raise ValueError unless `value` lies in [0, 1]."""
    if not 0 <= value <= 1:
        raise ValueError(f"{name} is {value}; it must lie in [0, 1]")


def check_views(z1_BD: Tensor, **others: Tensor) -> None:
    """Raise ValueError unless z1 and the other views are floating point [B, D] with one B >= 2 and D."""
    if z1_BD.ndim != 2 or z1_BD.shape[0] < 2 or z1_BD.shape[1] < 1:
        raise ValueError(f"z1 has shape {tuple(z1_BD.shape)}; it must be [B, D] with B >= 2 and D >= 1")
    for name, z_BD in others.items():
        if z_BD.shape != z1_BD.shape:
            raise ValueError(f"{name} has shape {tuple(z_BD.shape)}; it must be that of z1, {tuple(z1_BD.shape)}")
    for name, z_BD in {"z1": z1_BD, **others}.items():
        check_floating(name, z_BD)


def check_negatives(z1_BD: Tensor, g_BmD: Tensor | None, usable_Bm: Tensor | None) -> None:
    """Raise ValueError unless negatives are [B, m, D] and their mask, if any, is bool [B, m]."""
    if g_BmD is None:
        if usable_Bm is not None:
            raise ValueError(
                f"negatives_mask has shape {tuple(usable_Bm.shape)} but negatives is None; "
                "a mask is allowed only with negatives"
            )
        return
    B, D = z1_BD.shape
    if g_BmD.ndim != 3 or g_BmD.shape[0] != B or g_BmD.shape[2] != D:
        raise ValueError(f"negatives has shape {tuple(g_BmD.shape)}; it must be [B, m, D] with B = {B} and D = {D}")
    check_floating("negatives", g_BmD)
    if usable_Bm is None:
        return
    if usable_Bm.shape != g_BmD.shape[:2]:
        raise ValueError(
            f"negatives_mask has shape {tuple(usable_Bm.shape)}; it must be [B, m] = {tuple(g_BmD.shape[:2])}"
        )
    if usable_Bm.dtype != torch.bool:
        raise ValueError(f"negatives_mask has dtype {usable_Bm.dtype}; it must be torch.bool")


def check_pairs(pairs_Bs2: Tensor, *, batch_size: int, n_mixes: int) -> None:
    """Raise ValueError unless pairs are int64 [B, n_mixes, 2]."""
    expected = (batch_size, n_mixes, 2)
    if tuple(pairs_Bs2.shape) != expected:
        raise ValueError(f"pairs has shape {tuple(pairs_Bs2.shape)}; it must be [B, n_mixes, 2] = {expected}")
    if pairs_Bs2.dtype != torch.int64:
        raise ValueError(f"pairs has dtype {pairs_Bs2.dtype}; it must be torch.int64")


def check_pair_ranks(pairs_Bs2: Tensor, *, upper: int) -> None:
    """Raise ValueError unless every rank in the pairs lies in [0, upper)."""
    if pairs_Bs2.numel() == 0:
        return
    low, high = (int(bound) for bound in torch.aminmax(pairs_Bs2))
    if low < 0 or high >= upper:
        raise ValueError(
            f"pairs has ranks from {low} to {high}; they must lie in [0, {upper}), "
            "the smaller of k and the number of candidates of a row"
        )


def check_floating(name: str, tensor: Tensor) -> None:
    """Raise ValueError unless the tensor is of a floating point dtype."""
    if not tensor.is_floating_point():
        raise ValueError(f"{name} has dtype {tensor.dtype}; it must be a floating point dtype")
