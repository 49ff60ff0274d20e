"""Examples to the rows of a corpus: tokenised, and each with what it is unique by."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from hncse_ray.config import Side
from hncse_ray.corpus.sources import Example, Shape
from hncse_ray.corpus.text import name_hash, row_hash
from hncse_ray.errors import DataError

TokenRow = npt.NDArray[np.int32]
Row = tuple[Any, ...]  # one value for each column of the schema


class Tokenize(Protocol):
    """Turns texts into token rows, those of a text without tokens empty; see ``SentenceEncoder.token_rows``."""

    def __call__(self, texts: Sequence[str], max_length: int, *, side: Side | None) -> list[TokenRow]:
        """Return a row of each text, of at most ``max_length`` tokens, with the prompt of its side."""
        ...


class OwnTokens:
    """Tokenises texts, and tells which have no token of their own, beside prompt and special tokens.

    Args:
        tokenize: makes token rows.
        max_length: tokens of one at most.
    """

    def __init__(self, tokenize: Tokenize, max_length: int) -> None:
        self._tokenize, self._max_length = tokenize, max_length
        self._nothing: dict[Side | None, TokenRow] = {}

    def __call__(self, texts: Sequence[str], side: Side | None) -> list[TokenRow | None]:
        """Return the token rows of texts of a side, None for those without a token of their own.

        Raises:
            DataError: the prompt leaves no token for the text.
        """
        if not texts:
            return []
        if side not in self._nothing:
            (self._nothing[side],) = self._tokenize([""], self._max_length, side=side)
            if len(self._nothing[side]) >= self._max_length:
                raise DataError("the prompt leaves no token for the text", f"encoder.max_length = {self._max_length}",
                                "Raise it, or see encoder.prompts")  # fmt: skip
        rows = self._tokenize(texts, self._max_length, side=side)
        return [None if np.array_equal(row, self._nothing[side]) else row for row in rows]


class RowMaker:
    """Makes rows of examples, a batch at a time; how they are cut into batches makes no difference.

    Args:
        shape: of the rows.
        tokenize: makes token rows.
        max_length: tokens of one at most.
    """

    def __init__(self, shape: Shape, tokenize: Tokenize, max_length: int) -> None:
        self._shape, self._own = shape, OwnTokens(tokenize, max_length)

    def __call__(self, batch: Sequence[Example], counts: Counter[str]) -> Iterator[tuple[int, Row]]:
        """Yield the rows that have a token of their own, each after what it is unique by: what the model sees of it.

        Raises:
            DataError: the prompt leaves no token for the text.
        """
        side: Side | None = "query" if self._shape.pairs else "document" if self._shape.passages else None
        rows = self._own([example.text for example in batch], side)
        texts = [text for example in batch for text in (example.positive, *example.negatives) if text is not None]
        others = iter(self._own(texts, "document"))
        for example, ids in zip(batch, rows, strict=True):
            positive_ids = None if example.positive is None else next(others)
            negatives = [row for row in itertools.islice(others, len(example.negatives)) if row is not None]
            if ids is None:
                counts["no_token"] += 1
            else:
                yield self._keyed(example, ids, positive_ids, negatives)

    def _keyed(
        self, example: Example, ids: TokenRow, positive_ids: TokenRow | None, negative_ids: list[TokenRow]
    ) -> tuple[int, Row]:
        shape = self._shape
        anchor = row_hash(ids)
        target = anchor if positive_ids is None else row_hash(positive_ids)
        key, negatives = anchor, [row_hash(negative) for negative in negative_ids]
        if shape.pairs:
            key = hash((anchor, target, *negatives))
        row: Row = (example.text, anchor, ids)
        if shape.pairs:
            # A positive of the same tokens is none: there are only the sentence's own two views.
            row += (example.positive, positive_ids, target) if target != anchor else (None, None, anchor)
        if shape.negatives:
            row += (negative_ids, negatives)
        if shape.documents:
            row += (name_hash(example.document or f"\0{key}"),)  # a document of its own
        if shape.passages:
            row += (example.title, example.body)
        return key, row
