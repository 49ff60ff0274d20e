"""The shape of an embedding space, after Wang & Isola 2020 (arXiv 2005.10242) and Ethayarajh 2019.

The measures take unit-norm rows ``[N, D]`` and compute in float64.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.special import logsumexp

from hncse_ray.errors import DataError, counted
from hncse_ray.evaluation.sts import read_sts
from hncse_ray.evaluation.vectors import Encode, encode_unit

# STS-B pairs that count as positives, as in SimCSE (arXiv 2104.08821, fig. 2).
POSITIVE_GOLD = 4.0
NEGATIVE_PAIRS, NEGATIVE_SEED = 10_000, 0
_BINS = 40
# Vectors that differ by less are the same but for the rounding of 32 bits.
_MIN_SPREAD = 1e-6

# Rows that were normalised in bf16 (8 bits of precision) still pass.
NORM_TOLERANCE = 1e-2

Float64Array = NDArray[np.float64]


@dataclass(frozen=True)
class SimilarityHistogram:
    """How many pairs have which cosine.

    Attributes:
        bins: the edges of the bins, from -1 to 1, one more than there are counts; the last bin holds 1 too.
        positive: pairs of like meaning in each bin.
        negative: random pairs of different sentences in each.
    """

    bins: tuple[float, ...]
    positive: tuple[int, ...]
    negative: tuple[int, ...]


def evaluate_geometry(
    encode: Encode, data_dir: str | Path, *, seed: int = NEGATIVE_SEED
) -> tuple[dict[str, float], SimilarityHistogram]:
    """Measure the space of an encoder on the dev split of STS-Benchmark, as SimCSE does.

    Positives are the pairs with a gold score of 4 or more, negatives random pairs of different sentences. Uniformity
    and anisotropy are those of the distinct sentences.

    Args:
        encode: the encoder.
        data_dir: SentEval's ``data/downstream`` folder.
        seed: of the negatives.

    Returns:
        ``alignment``, ``uniformity`` and ``anisotropy``; and the cosines of positives and negatives.

    Raises:
        DataError: the data are missing, or the vectors cannot be used or are all the same.
    """
    pairs = read_sts("STSBenchmark", "dev", data_dir).pairs
    position = {text: i for i, text in enumerate(dict.fromkeys(t for p in pairs for t in (p.sentence1, p.sentence2)))}
    z_UD = encode_unit(encode, list(position))
    if np.ptp(z_UD, axis=0).max() < _MIN_SPREAD:
        raise DataError(
            f"the encoder gives all {len(z_UD)} sentences the same vector",
            "geometry",
            "Its embeddings have collapsed to one direction, or it ignores its input",
        )
    positive = [(position[p.sentence1], position[p.sentence2]) for p in pairs if p.gold >= POSITIVE_GOLD]
    if not positive:
        raise DataError(f"has no pair with a score of {POSITIVE_GOLD:g} or more", "STSBenchmark dev")
    first_P, second_P = np.array(positive).T
    rng = np.random.default_rng(seed)
    first_N = rng.integers(len(z_UD), size=NEGATIVE_PAIRS)
    second_N = (first_N + rng.integers(1, len(z_UD), size=NEGATIVE_PAIRS)) % len(z_UD)  # any other one
    scores = {
        "alignment": alignment(z_UD[first_P], z_UD[second_P]),
        "uniformity": uniformity(z_UD),
        "anisotropy": anisotropy(z_UD),
    }
    cosines = [np.einsum("nd,nd->n", z_UD[a], z_UD[b]) for a, b in ((first_P, second_P), (first_N, second_N))]
    return scores, similarity_histogram(*cosines)


def similarity_histogram(positive_P: ArrayLike, negative_N: ArrayLike, *, bins: int = _BINS) -> SimilarityHistogram:
    """Count cosines in bins of equal width from -1 to 1; a cosine a rounding beyond them counts in the outermost."""
    edges = np.linspace(-1, 1, bins + 1)
    counts = [np.histogram(np.clip(np.asarray(c, np.float64), -1, 1), edges)[0] for c in (positive_P, negative_N)]
    return SimilarityHistogram(tuple(edges.round(6).tolist()), *(tuple(count.tolist()) for count in counts))


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
        raise DataError(f"not unit-norm: {wrong} of {counted(len(z_ND), 'row')}", hint="Divide each by its norm")
    return z_ND
