"""The one contract of this room: a callable from sentences to vectors, checked on every use."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hncse_ray.errors import DataError

logger = logging.getLogger(__name__)

Encode = Callable[[list[str]], np.ndarray]
"""Sentences in, one vector a sentence out ``[N, D]``; rows need not be unit-norm."""

FloatArray = NDArray[np.floating[Any]]


def encode_checked(encode: Encode, texts: Sequence[str]) -> FloatArray:
    """Encode every distinct sentence once, in one call, and return unit-norm rows in the order of ``texts``.

    A row of zeros has no direction. It stays zero, so that its cosine with anything is 0 as in SentEval, and
    is counted in a warning.

    Args:
        encode: the encoder; it does its own batching.
        texts: N sentences, repeated or not.

    Returns:
        Rows ``[N, D]`` of norm 1, float64 if the encoder returned float64, else float32.

    Raises:
        DataError: no texts, or the encoder returned another number of rows, another shape, something that is
            not a number, or zeros only.
    """
    if not texts:
        raise DataError("there is no text to encode")
    position = {text: i for i, text in enumerate(dict.fromkeys(texts))}
    z_UD = _unit_rows(_as_matrix(encode(list(position)), rows=len(position)), list(position))
    return z_UD[[position[text] for text in texts]]


def _as_matrix(returned: object, *, rows: int) -> FloatArray:
    try:
        matrix = np.asarray(returned)
    except (TypeError, ValueError, RuntimeError) as error:
        raise _unusable(f"{type(returned).__name__} that is not an array ({error})", rows) from None
    if matrix.ndim != 2 or matrix.shape[0] != rows or matrix.shape[1] == 0:
        raise _unusable(f"shape {list(matrix.shape)}", rows)
    if matrix.dtype.kind not in "fiu":
        raise _unusable(f"values of type {matrix.dtype}", rows)
    return matrix.astype(np.float64 if matrix.dtype == np.float64 else np.float32, copy=False)


def _unit_rows(rows_ND: FloatArray, texts: list[str]) -> FloatArray:
    finite_N = np.isfinite(rows_ND).all(axis=1)
    if not finite_N.all():
        first = texts[int(np.argmin(finite_N))]
        raise DataError(
            f"the encoder returned NaN or infinity for {int((~finite_N).sum())} of {len(texts)} sentences,"
            f" the first being {_shorten(first)!r}",
            hint="Its weights or its precision are broken: training has diverged, or 16 bits overflow",
        )
    # Divided by the largest entry first: the squares of very large or very small rows stay in range.
    largest_N1 = np.abs(rows_ND).max(axis=1, keepdims=True)
    zeros = int((largest_N1 == 0).sum())
    if zeros == len(texts):
        raise DataError("the encoder returned zeros only", hint="Is its pooling right?")
    if zeros:
        first = texts[int(np.argmin(largest_N1))]
        logger.warning("%d of %d sentences have a zero vector, e.g. %r", zeros, len(texts), _shorten(first))
    scaled_ND = rows_ND / np.where(largest_N1 == 0, 1, largest_N1)
    norm_N1 = np.linalg.norm(scaled_ND, axis=1, keepdims=True)
    unit_ND: FloatArray = scaled_ND / np.where(norm_N1 == 0, 1, norm_N1)
    return unit_ND


def _unusable(found: str, rows: int) -> DataError:
    return DataError(
        f"the encoder returned {found} for {rows} sentences",
        hint=f"It must return one vector a sentence: a float array of shape [{rows}, D]",
    )


def _shorten(text: str, width: int = 60) -> str:
    return text if len(text) <= width else text[: width - 3] + "..."
