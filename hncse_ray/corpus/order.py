"""A random order of any number of rows that is computed where it is looked at, and never stored."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

Int64 = npt.NDArray[np.int64]
UInt64 = npt.NDArray[np.uint64]

_ROUNDS = 8


class Shuffled:
    """A permutation of the numbers 0..size-1 by a key: the generalised Feistel network of Black & Rogaway.

    "Ciphers with Arbitrary Finite Domains", CT-RSA 2002: a place is a pair of numbers, of which each in turn is moved
    by a hash of the other. The pairs are a few more than the numbers; what falls outside goes round once more.

    Args:
        size: how many numbers.
        key: numbers from 0 on; another key, another order.
    """

    def __init__(self, size: int, key: Sequence[int]) -> None:
        """See the class."""
        self.size = size
        self._left = math.isqrt(max(0, size - 1)) + 1
        self._right = -(-size // self._left)
        self._keys = np.random.SeedSequence(key).generate_state(_ROUNDS, np.uint64)

    def __call__(self, positions: Int64) -> Int64:
        """Return the numbers at positions of the order, `[n]`."""
        numbers = self._moved(positions.astype(np.uint64))
        while (outside := numbers >= self.size).any():
            numbers[outside] = self._moved(numbers[outside])
        return numbers.astype(np.int64)

    def _moved(self, positions: UInt64) -> UInt64:
        right, left = np.divmod(positions, np.uint64(self._left))
        for turn, key in enumerate(self._keys):
            if turn % 2:
                right = (right + _hash(left, key)) % np.uint64(self._right)
            else:
                left = (left + _hash(right, key)) % np.uint64(self._left)
        return left + right * np.uint64(self._left)


def _hash(numbers: UInt64, key: np.uint64) -> UInt64:
    """SplitMix64 (Steele et al. 2014), 32 bits of it, so that no sum overflows."""
    mixed = numbers + key
    mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return (mixed ^ (mixed >> np.uint64(31))) >> np.uint64(32)
