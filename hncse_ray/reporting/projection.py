"""How a sample of sentences is laid out on a map."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from hncse_ray.errors import SettingsError

Projection = Literal["pca", "umap"]


def turned(new_n2: NDArray[np.floating[Any]], old_n2: NDArray[np.floating[Any]]) -> NDArray[np.floating[Any]]:
    """Turn one layout onto another, and move both middles into one."""
    middle_2 = old_n2.mean(axis=0)
    new_n2 = new_n2 - new_n2.mean(axis=0)
    left, _, right = np.linalg.svd(new_n2.T @ (old_n2 - middle_2))
    return np.asarray(new_n2 @ left @ right + middle_2)


def by_umap(near: Sequence[Sequence[tuple[int, float]]], start_n2: NDArray[np.floating[Any]]) -> NDArray[np.float64]:
    """Lay out sentences by their nearest ones, as the run kept them (UMAP, arXiv 1802.03426).

    It needs no vectors, so the page of any finished run can have it. The layout begins with the principal components:
    the same file gives the same map.

    Args:
        near: of each of n sentences the ``[position, cosine]`` of its nearest, as many for each.
        start_n2: where they begin.

    Raises:
        SettingsError: UMAP is not installed.
    """
    try:
        from umap import UMAP  # compiles itself: seconds
    except ImportError as error:
        raise SettingsError(
            "UMAP is not installed", "--map umap", "Try: pip install 'hncse-ray[umap]', or leave --map out"
        ) from error
    n, k = len(near), len(near[0])
    ids_nk = np.column_stack([np.arange(n), [[i for i, _ in own] for own in near]])  # each is its own nearest
    cosines_nk = np.array([[cosine for _, cosine in own] for own in near])
    distances_nk = np.column_stack([np.zeros(n), np.maximum(1 - cosines_nk, 0)]).astype(np.float32)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that new sentences could not be added, and that a seed means one thread
        umap = UMAP(n_neighbors=k + 1, precomputed_knn=(ids_nk, distances_nk), init=start_n2, random_state=0)
        return np.asarray(umap.fit_transform(start_n2), dtype=np.float64)
