"""What counts as a sentence, and which are the same: what the model sees of them is."""

from __future__ import annotations

import hashlib
import unicodedata

import numpy as np
import numpy.typing as npt

from hncse_ray.reading import is_unicode


def normalise(line: str) -> str:
    """Return the line in Unicode NFC with every run of white space as one space and none at the ends."""
    return " ".join(unicodedata.normalize("NFC", line).split())


def document_name(value: object) -> str | None:
    """Return what a document is called: a text or a number; None if it is none.

    Raises:
        ValueError: it is something else.
    """
    if value is None or value != value:  # not a number: what some tables have for none
        return None
    if isinstance(value, str) and is_unicode(value):
        return normalise(value) or None
    if isinstance(value, int | float) and not isinstance(value, bool):
        return str(int(value)) if value == value // 1 else str(value)
    raise ValueError


def name_hash(name: str) -> int:
    """Return what a document is known by: the first 8 bytes of its name's BLAKE2b as a signed 64-bit integer."""
    return int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest(), "little", signed=True)


def row_hash(ids: npt.NDArray[np.int32]) -> int:
    """Return what a token row is known by: the first 8 bytes of its BLAKE2b as a signed 64-bit integer.

    Texts with one token row are one sentence to the model: case and accent twins of an uncased tokenizer, and those
    that differ behind the last token kept.
    """
    digest = hashlib.blake2b(ids.astype("<i4", copy=False).tobytes(), digest_size=64).digest()
    return int.from_bytes(digest[:8], "little", signed=True)
