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


def check_views(z1_BD: Tensor, *, fewest: int = 2, **others: Tensor) -> None:
    """Raise ValueError unless z1 and the other views are floating point [B, D] with one B >= `fewest` and D."""
    if z1_BD.ndim != 2 or z1_BD.shape[0] < fewest or z1_BD.shape[1] < 1:
        raise ValueError(f"z1 has shape {tuple(z1_BD.shape)}; it must be [B, D] with B >= {fewest} and D >= 1")
    for name, z_BD in others.items():
        if z_BD.shape != z1_BD.shape:
            raise ValueError(f"{name} has shape {tuple(z_BD.shape)}; it must be that of z1, {tuple(z1_BD.shape)}")
    for name, z_BD in {"z1": z1_BD, **others}.items():
        check_floating(name, z_BD)


def check_negatives(z1_BD: Tensor, g_BmD: Tensor | None, usable_Bm: Tensor | None) -> None:
    """Raise ValueError unless negatives are [B, m, D] and their mask, if any, is bool [B, m]."""
    _check_rows_of_anchors("negatives", "m", z1_BD, g_BmD, usable_Bm)


def check_neighbours(z1_BD: Tensor, neighbours_BgD: Tensor | None, usable_Bg: Tensor | None) -> None:
    """Raise ValueError unless neighbours are [B, g, D] and their mask, if any, is bool [B, g]."""
    _check_rows_of_anchors("neighbours", "g", z1_BD, neighbours_BgD, usable_Bg)


def check_columns(columns: str, g_bmD: Tensor | None, columns_mask_bN: Tensor | None, *, batch_size: int) -> None:
    """Raise ValueError unless columns is a known word and their mask, if any, is bool [b, B * m] of "all"."""
    if columns not in ("own", "all", "none"):
        raise ValueError(f"columns is {columns!r}; it must be 'own', 'all' or 'none'")
    if columns_mask_bN is None:
        return
    shape = tuple(columns_mask_bN.shape)
    if columns != "all":
        raise ValueError(f"columns_mask has shape {shape} but columns is {columns!r}; it is allowed only with 'all'")
    if g_bmD is None:
        raise ValueError(f"columns_mask has shape {shape} but negatives is None; it is allowed only with negatives")
    expected = (g_bmD.shape[0], batch_size * g_bmD.shape[1])
    if shape != expected:
        raise ValueError(f"columns_mask has shape {shape}; it must be [B, B * m] = {expected}")
    _check_bool("columns_mask", columns_mask_bN)


def check_batch_mask(z1_bD: Tensor, batch_mask_bB: Tensor | None, *, batch_size: int) -> None:
    """Raise ValueError unless the mask of the batch's columns, if any, is bool [b, B]."""
    if batch_mask_bB is None:
        return
    expected = (z1_bD.shape[0], batch_size)
    if tuple(batch_mask_bB.shape) != expected:
        raise ValueError(f"batch_mask has shape {tuple(batch_mask_bB.shape)}; it must be [B, B] = {expected}")
    _check_bool("batch_mask", batch_mask_bB)


def check_negatives_are_columns(columns: str) -> None:
    """Raise ValueError for the word that leaves negatives without a use where nothing is mixed."""
    if columns == "none":
        raise ValueError(
            "columns is 'none'; it must be 'own' or 'all', for without mixing the negatives would have no use"
        )


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


def _check_rows_of_anchors(
    name: str, letter: str, z1_BD: Tensor, rows_BnD: Tensor | None, usable_Bn: Tensor | None
) -> None:
    """Raise ValueError unless rows are [B, n, D] and their mask, if any, is bool [B, n]; `letter` stands for n."""
    if rows_BnD is None:
        if usable_Bn is not None:
            raise ValueError(
                f"{name}_mask has shape {tuple(usable_Bn.shape)} but {name} is None; a mask is allowed only with {name}"
            )
        return
    B, D = z1_BD.shape
    if rows_BnD.ndim != 3 or rows_BnD.shape[0] != B or rows_BnD.shape[2] != D:
        raise ValueError(
            f"{name} has shape {tuple(rows_BnD.shape)}; it must be [B, {letter}, D] with B = {B} and D = {D}"
        )
    check_floating(name, rows_BnD)
    if usable_Bn is None:
        return
    if usable_Bn.shape != rows_BnD.shape[:2]:
        raise ValueError(
            f"{name}_mask has shape {tuple(usable_Bn.shape)}; it must be [B, {letter}] = {tuple(rows_BnD.shape[:2])}"
        )
    _check_bool(f"{name}_mask", usable_Bn)


def _check_bool(name: str, tensor: Tensor) -> None:
    if tensor.dtype != torch.bool:
        raise ValueError(f"{name} has dtype {tensor.dtype}; it must be torch.bool")


def check_floating(name: str, tensor: Tensor) -> None:
    """Raise ValueError unless the tensor is of a floating point dtype."""
    if not tensor.is_floating_point():
        raise ValueError(f"{name} has dtype {tensor.dtype}; it must be a floating point dtype")


def check_teacher(teacher_BL: Tensor, scores_BL: Tensor) -> None:
    """Raise ValueError unless a teacher has a floating point score for each column, batch and negatives."""
    if teacher_BL.shape != scores_BL.shape:
        raise ValueError(
            f"teacher has shape {tuple(teacher_BL.shape)}; it must be [B, columns] = {tuple(scores_BL.shape)}"
        )
    check_floating("teacher", teacher_BL)
