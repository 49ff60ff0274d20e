"""What may be encoded: texts in an order."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from collections.abc import Set as AbstractSet


def list_of_texts(given: Iterable[str]) -> list[str]:
    """Return texts as a list.

    Raises:
        TypeError: it is one text or none, something else is in it, or it is in no order.
    """
    if isinstance(given, str | Mapping | AbstractSet) or not isinstance(given, Iterable):
        raise TypeError(f"texts is of type {type(given).__name__}; give a list of texts")
    texts = list(given)
    if odd := [text for text in texts if not isinstance(text, str)]:
        raise TypeError(f"one of the texts is of type {type(odd[0]).__name__}; give a list of texts")
    return texts
