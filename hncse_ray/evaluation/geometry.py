"""The shape of an embedding space, after Wang & Isola 2020 (arXiv 2005.10242) and Ethayarajh 2019.

All take unit-norm rows ``[N, D]`` and compute in float64.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.special import logsumexp

from hncse_ray.errors import DataError

# Rows that were normalised in bf16 (8 bits of precision) still pass.
NORM_TOLERANCE = 1e-2

Float64Array = NDArray[np.float64]


def alignment(z1: ArrayLike, z2: ArrayLike, *, alpha: float = 2.0) -> float:
    """Mean distance of positive pairs, ``mean_i ||z1_i - z2_i||^alpha``: with alpha 2 from 0 (same) to 4.

    Args:
        z1: unit-norm rows ``[N, D]``.
        z2: unit-norm rows ``[N, D]``; row i is the positive of row i of ``z1``.
        alpha: the power, 2 in the paper.

    Raises:
        DataError: the shapes differ, or rows are not finite and unit-norm.
    """
    z1_ND, z2_ND = _unit_matrix(z1, min_rows=1), _unit_matrix(z2, min_rows=1)
    if z1_ND.shape != z2_ND.shape:
        raise DataError(f"alignment needs rows in pairs, not {list(z1_ND.shape)} and {list(z2_ND.shape)}")
    return float(np.mean(np.linalg.norm(z1_ND - z2_ND, axis=1) ** alpha))


def uniformity(z: ArrayLike, *, t: float = 2.0, chunk_rows: int = 512) -> float:
    """Log of the mean Gaussian potential of all distinct pairs, ``log mean_{i<j} exp(-t ||z_i - z_j||^2)``.

    0 if all rows are the same; the more negative, the more evenly they cover the sphere.

    Args:
        z: unit-norm rows ``[N, D]``, N >= 2.
        t: the sharpness, 2 in the paper.
        chunk_rows: rows compared with all others at a time.

    Raises:
        DataError: fewer than two rows, or rows that are not finite and unit-norm.
    """
    z_ND = _unit_matrix(z, min_rows=2)
    n = len(z_ND)
    square_N = np.einsum("nd,nd->n", z_ND, z_ND)
    log_sums = []
    for start in range(0, n - 1, chunk_rows):
        rows = slice(start, start + chunk_rows)
        distance_CR = square_N[rows, None] + square_N[None, start:] - 2 * z_ND[rows] @ z_ND[start:].T
        later_CR = np.triu(np.ones(distance_CR.shape, dtype=bool), k=1)  # each pair once, no row with itself
        log_sums.append(logsumexp(-t * np.maximum(distance_CR[later_CR], 0)))
    return float(logsumexp(log_sums) - np.log(n * (n - 1) / 2))


def anisotropy(z: ArrayLike) -> float:
    """Mean cosine of all distinct pairs: about 0 if directions are spread, 1 if they have collapsed.

    Computed as ``(||sum_i z_i||^2 - sum_i ||z_i||^2) / (N (N - 1))``, without the N x N cosines.

    Args:
        z: unit-norm rows ``[N, D]``, N >= 2.

    Raises:
        DataError: fewer than two rows, or rows that are not finite and unit-norm.
    """
    z_ND = _unit_matrix(z, min_rows=2)
    n, total_D = len(z_ND), z_ND.sum(axis=0)
    return float((total_D @ total_D - np.sum(z_ND**2)) / (n * (n - 1)))


def _unit_matrix(z: ArrayLike, *, min_rows: int) -> Float64Array:
    z_ND = np.asarray(z, dtype=np.float64)
    if z_ND.ndim != 2 or len(z_ND) < min_rows:
        raise DataError(f"vectors of shape {list(z_ND.shape)} where [N, D] with N >= {min_rows} is needed")
    norm_N = np.linalg.norm(z_ND, axis=1)
    wrong = int(np.count_nonzero(~(np.abs(norm_N - 1) <= NORM_TOLERANCE)))  # NaN is wrong too
    if wrong:
        raise DataError(f"{wrong} of {len(z_ND)} rows are not unit-norm", hint="Divide each by its norm")
    return z_ND
