"""What counts as the same sentence: normalisation and content hash."""

from __future__ import annotations

import hashlib
import unicodedata


def normalise(line: str) -> str:
    """Return the line in Unicode NFC with every run of white space as one space and none at the ends."""
    return " ".join(unicodedata.normalize("NFC", line).split())


# Letters and signs that are drawn as nothing: Hangul fillers and the empty pattern of Braille.
_BLANK = frozenset("\u115f\u1160\u3164\uffa0\u2800")


def is_blank(text: str) -> bool:
    """Return whether there is nothing to see: no letter, digit, punctuation or symbol.

    White space, zero-width and control characters, private use, unassigned ones and marks without a base are nothing.
    """
    return not any(unicodedata.category(c)[0] in "LNPS" and c not in _BLANK for c in text)


def content_hash(text: str) -> int:
    """Return the first 8 bytes of BLAKE2b of the normalised text as a signed 64-bit integer."""
    digest = hashlib.blake2b(normalise(text).encode("utf-8", "surrogatepass"), digest_size=64).digest()
    return int.from_bytes(digest[:8], "little", signed=True)
