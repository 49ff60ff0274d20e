"""How long token rows may be for a model, and which of them share a batch."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from numbers import Integral

import numpy as np
from numpy.typing import NDArray
from sentence_transformers import SentenceTransformer
from torch import nn
from transformers import PreTrainedModel

TokenRows = Sequence[NDArray[np.integer]]

_ANY_LENGTH = 8192  # the limit of a model that has none
_MOST_TOKENS = 8192  # of one forward pass without gradient: more are hardly faster, and take as much more memory


def length_batches(rows: TokenRows, batch_size: int) -> Iterator[NDArray[np.int64]]:
    """Yield the indices of batches of rows sorted by length, longest first.

    The batches depend on the rows alone: however they are shared out over processes, each batch, and so each
    vector, comes out the same.
    """
    if not isinstance(batch_size, Integral) or batch_size < 1:
        raise ValueError(f"batch_size is {batch_size!r}; give a whole number, 1 or more")
    order = np.argsort([-len(row) for row in rows], kind="stable")
    for start in range(0, len(order), batch_size):
        yield order[start : start + batch_size]


def passes(rows: TokenRows) -> Iterator[slice]:
    """Divide a batch into runs of rows that one forward pass takes: of at most so many tokens, padding included."""
    start = longest = 0
    for end, row in enumerate(rows):
        longest = max(longest, len(row))
        if end > start and longest * (end + 1 - start) > _MOST_TOKENS:
            yield slice(start, end)
            start, longest = end, len(row)
    yield slice(start, len(rows))


def first_position(backbone: nn.Module) -> int:
    """Return the position of a row's first token: RoBERTa and its kin count from behind the padding's id."""
    for module in backbone.modules():
        padding = getattr(module, "padding_idx", None)
        if isinstance(padding, int) and isinstance(getattr(module, "position_embeddings", None), nn.Embedding):
            return padding + 1
    return 0


def length_limit(model: SentenceTransformer, first: int) -> int:
    """Return how many tokens a row may have: by its folder, its tokenizer, and positions that count from ``first``."""
    limits = [int(model.max_seq_length or _ANY_LENGTH), _ANY_LENGTH]  # the library's is the tokenizer's too
    positions = getattr(model[0].config, "max_position_embeddings", None)
    if isinstance(positions, int) and positions > 0:
        limits.append(positions - first)
    return min(limits)


def attention_reach(backbone: PreTrainedModel) -> float:
    """Return how long a row may be for every token to reach every other, or all before it."""
    windows = [getattr(module, "sliding_window", None) for module in (*backbone.modules(), backbone.config)]
    return min((window for window in windows if isinstance(window, int)), default=float("inf"))
