"""What scores embed their texts with: all ranks together, or this process alone; and each text once."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any, Protocol

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray

from hncse_ray.config import Side
from hncse_ray.encoder import Progress, SentenceEncoder, length_batches
from hncse_ray.errors import HncseError
from hncse_ray.training.distributed import raise_together, rank, world_size


class ShardedEncode:
    """An ``encode(list[str]) -> ndarray`` whose batches are shared out over the ranks.

    All ranks must call it with the same texts and all get all vectors. A batch is the same whatever the number of
    ranks, so the vectors are too.
    """

    def __init__(self, encoder: SentenceEncoder, batch_size: int, side: Side | None = None) -> None:
        self._encoder = encoder
        self._batch_size = batch_size
        self._side = side

    def __call__(self, texts: list[str]) -> NDArray[np.float32]:
        """Embed N texts; ``[N, D]`` float32 on every rank.

        Raises:
            HncseError: a rank's vectors cannot be used; every rank raises it.
        """
        rows = self._encoder.tokenize(texts, side=self._side)
        out_ND = np.zeros((len(rows), self._encoder.dimension), dtype=np.float32)
        error: HncseError | None = None
        try:
            for number, index in enumerate(length_batches(rows, self._batch_size)):
                if number % world_size() == rank():
                    out_ND[index] = self._encoder.encode_rows([rows[i] for i in index], side=self._side)
        except HncseError as caught:  # of this rank's batches alone: the others are on their way to the sum below
            error = caught
        raise_together(error)
        if world_size() > 1:
            total = torch.from_numpy(out_ND).to(self._encoder.device)
            dist.all_reduce(total)  # each row was written by one rank, the others hold zeros: the sum is exact
            out_ND = total.cpu().numpy()
        return out_ND

    def on_side(self, side: Side) -> ShardedEncode:
        """Return the same with the prompt of queries, or of documents."""
        return ShardedEncode(self._encoder, self._batch_size, side)


class BulkEncoder(Protocol):
    """What embeds many texts: an encoder, or actors that share its work."""

    def encode(
        self, texts: Sequence[str], *, side: Side | None = None, batch_size: int = 128, progress: Progress | None = None
    ) -> NDArray[np.float32]:
        """Embed N texts; ``[N, D]``."""
        ...


class Alone:
    """The same of this process alone; ``how`` are keywords of the encoder's own ``encode``."""

    def __init__(self, encoder: BulkEncoder, side: Side | None = None, **how: Any) -> None:
        self._encoder, self._side, self._how = encoder, side, how

    def __call__(self, texts: list[str]) -> NDArray[np.float32]:
        return self._encoder.encode(texts, side=self._side, **self._how)

    def on_side(self, side: Side) -> Alone:
        """Return the same with the prompt of queries, or of documents."""
        return Alone(self._encoder, side, **self._how)


class KnownEncode:
    """Either of them, each text embedded once: for as long as the weights stay as they are."""

    def __init__(self, encode: ShardedEncode | Alone) -> None:
        self._encode = encode
        self._vectors: dict[str, NDArray[np.float32]] = {}
        self.on_side = cache(lambda side: KnownEncode(encode.on_side(side)))

    def __call__(self, texts: list[str]) -> NDArray[np.float32]:
        if new := [text for text in dict.fromkeys(texts) if text not in self._vectors]:
            self._vectors.update(zip(new, self._encode(new), strict=True))
        return np.stack([self._vectors[text] for text in texts])
