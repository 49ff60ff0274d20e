"""The one contract of this package: a callable from sentences to vectors, checked on every use."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hncse_ray.config import Side
from hncse_ray.errors import DataError, counted

logger = logging.getLogger(__name__)

Encode = Callable[[list[str]], np.ndarray]
"""Sentences in, one vector a sentence out ``[N, D]``; rows need not be unit-norm."""

FloatArray = NDArray[np.floating[Any]]


def encode_checked(encode: Encode, texts: Sequence[str]) -> FloatArray:
    """Encode every distinct sentence once, in one call, and return the encoder's own rows in the order of ``texts``.

    Args:
        encode: the encoder; it does its own batching.
        texts: N sentences, repeated or not.

    Returns:
        Rows ``[N, D]``, of any norm; float64 if the encoder returned float64, else float32.

    Raises:
        DataError: no texts, or the encoder returned another number of rows, another shape, something that is
            not a number, or zeros only.
    """
    rows_UD, index_N = _encode_distinct(encode, texts)
    return rows_UD[index_N]


def encode_unit(encode: Encode, texts: Sequence[str]) -> FloatArray:
    """:func:`encode_checked` for all that compares by cosine: rows ``[N, D]`` of norm 1."""
    rows_UD, index_N = _encode_distinct(encode, texts)
    return unit_rows(rows_UD)[index_N]


def on_side(encode: Encode, side: Side) -> Encode:
    """The encoder of queries, or of documents, where it tells them apart: it has a method ``on_side`` that returns it.

    Models with prompts do (:class:`~hncse_ray.training.distributed.ShardedEncode` and what ``hncse evaluate`` scores
    with); any other callable encodes both alike.
    """
    choose: Callable[[Side], Encode] | None = getattr(encode, "on_side", None)
    return encode if choose is None else choose(side)


def unit_rows(rows_ND: FloatArray) -> FloatArray:
    """Divide every row by its norm. A row of zeros has no direction and stays: its cosine with anything is 0."""
    # By the largest entry first: the squares of very large or very small rows stay in range.
    largest_N1 = np.abs(rows_ND).max(axis=1, keepdims=True)
    scaled_ND = rows_ND / np.where(largest_N1 == 0, 1, largest_N1)
    norm_N1 = np.linalg.norm(scaled_ND, axis=1, keepdims=True)
    unit_ND: FloatArray = scaled_ND / np.where(norm_N1 == 0, 1, norm_N1)
    return unit_ND


def _encode_distinct(encode: Encode, texts: Sequence[str]) -> tuple[FloatArray, list[int]]:
    """The checked rows of the distinct texts, and which of them each text has."""
    if not texts:
        raise DataError("there is no text to encode")
    position = {text: i for i, text in enumerate(dict.fromkeys(texts))}
    rows_UD = _as_matrix(encode(list(position)), rows=len(position))
    _check_values(rows_UD, list(position))
    return rows_UD, [position[text] for text in texts]


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


def _check_values(rows_ND: FloatArray, texts: list[str]) -> None:
    finite_N = np.isfinite(rows_ND).all(axis=1)
    if not finite_N.all():
        first = texts[int(np.argmin(finite_N))]
        raise DataError(
            f"the encoder returned NaN or infinity for {int((~finite_N).sum())} of {len(texts)} sentences,"
            f" the first being {_shorten(first)!r}",
            hint="Its weights or its precision are broken: training has diverged, or 16 bits overflow",
        )
    some_N = rows_ND.any(axis=1)
    if not some_N.any():
        raise DataError("the encoder returned zeros only", hint="Is its pooling right?")
    if zeros := int((~some_N).sum()):
        first = texts[int(np.argmin(some_N))]
        logger.warning("a zero vector for %d of %d sentences, e.g. %r", zeros, len(texts), _shorten(first))


def _unusable(found: str, rows: int) -> DataError:
    return DataError(
        f"the encoder returned {found} for {counted(rows, 'sentence')}",
        hint=f"It must return one vector a sentence: a float array of shape [{rows}, D]",
    )


def _shorten(text: str, width: int = 60) -> str:
    return text if len(text) <= width else text[: width - 3] + "..."
