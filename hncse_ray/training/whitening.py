"""Whitening of finished vectors: a last stage that levels the directions in which a corpus is spread unequally.

Vectors are centred and multiplied by ``U diag(variance ** -power) U^T``, the variances and directions U being those of
the corpus's own vectors: power 0 only centres, 0.5 makes all variances equal (Su et al. 2021, arXiv 2103.15316; Huang
et al. 2021, arXiv 2104.01767), and less whitens in part. The product with U^T turns the vectors back, which no cosine
notices, so that each coordinate stays about what it was and vectors may still be cut.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from sentence_transformers import SentenceTransformer
from sentence_transformers.base.modules import Dense, Normalize
from torch import nn

from hncse_ray.config import Side
from hncse_ray.corpus import Corpus
from hncse_ray.errors import DataError
from hncse_ray.training.distributed import from_first
from hncse_ray.training.encoding import KnownEncode, ShardedEncode

_DRAW = (0, 3)  # a stream of random numbers beside those of the run
_LEAST_VARIANCE = 1e-6  # of the largest: smaller ones are noise of the precision, and no more is made of them


@dataclass(frozen=True)
class Spread:
    """How vectors are spread: ``mean_D``, and their principal directions ``[D, D]`` (columns) with their variances."""

    mean_D: NDArray[np.float64]
    variances_D: NDArray[np.float64]
    directions_DD: NDArray[np.float64]

    @classmethod
    def of(cls, vectors_ND: NDArray[np.floating]) -> Spread:
        """Measure vectors.

        Raises:
            DataError: they are all the same, or there is only one.
        """
        if len(vectors_ND) < 2:
            raise DataError("one row alone has no spread to be whitened by", hint="Set export.whiten=none")
        mean_D = vectors_ND.mean(axis=0, dtype=np.float64)
        covariance_DD = np.cov((vectors_ND - mean_D).T)
        variances_D, directions_DD = np.linalg.eigh(np.atleast_2d(covariance_DD))
        if not variances_D[-1] > 0:
            raise DataError("all rows of the corpus have the same vector, which cannot be whitened",
                            hint="Set export.whiten=none")  # fmt: skip
        return cls(mean_D, variances_D, directions_DD)

    def matrix(self, power: float) -> NDArray[np.float64]:
        """Return the symmetric matrix ``[D, D]`` that centred vectors are multiplied by."""
        relative_D = np.maximum(self.variances_D / self.variances_D[-1], _LEAST_VARIANCE)
        matrix_DD: NDArray[np.float64] = (self.directions_DD * relative_D**-power) @ self.directions_DD.T
        return matrix_DD

    def whitened(self, vectors_ND: NDArray[np.floating], power: float) -> NDArray[np.float64]:
        """Return vectors whitened; their norms are not made one."""
        return np.asarray((vectors_ND - self.mean_D) @ self.matrix(power))


def corpus_spread(encode: ShardedEncode | KnownEncode, corpus: Corpus, *, rows: int, seed: int) -> Spread:
    """Measure what the corpus's rows are searched by; the same on all ranks.

    Args:
        encode: the encoder.
        corpus: of the run.
        rows: of a larger corpus, so many are drawn.
        seed: of the draw.

    Raises:
        DataError: all vectors are the same.
    """
    count = min(len(corpus), rows)
    drawn = np.sort(np.random.default_rng([seed, *_DRAW]).choice(len(corpus), count, replace=False))
    side = corpus.target_side
    vectors_ND = (encode if side is None else encode.on_side(side))(corpus.target_texts(drawn))
    return from_first(lambda: Spread.of(vectors_ND))  # the last bits differ from processor to processor


class Whitened:
    """An encoder behind the stage that whitens its vectors."""

    def __init__(self, known: KnownEncode, spread: Spread, power: float) -> None:
        self._known, self._spread, self._power = known, spread, power

    def __call__(self, texts: list[str]) -> NDArray[np.float32]:
        """Embed N texts; ``[N, D]``."""
        vectors_ND = torch.from_numpy(self._known(texts))
        stage = whitening_stage(self._spread, self._power, width=vectors_ND.shape[1])
        whitened_ND: NDArray[np.float32] = stage({"sentence_embedding": vectors_ND})["sentence_embedding"].numpy()
        return whitened_ND

    def on_side(self, side: Side) -> Whitened:
        """Return the same with the prompt of queries, or of documents."""
        return Whitened(self._known.on_side(side), self._spread, self._power)


def whitening_stage(spread: Spread, power: float, *, width: int) -> Dense:
    """Return whitening as a stage of sentence-transformers.

    Args:
        spread: of the corpus's vectors.
        power: 0 to 0.5.
        width: of the vectors that the stage gets; what a model cuts off, so that it is not in ``spread``, is dropped.
    """
    matrix_DD = torch.from_numpy(spread.matrix(power))
    weight = torch.zeros(len(matrix_DD), width)
    weight[:, : len(matrix_DD)] = matrix_DD
    bias = -matrix_DD @ torch.from_numpy(spread.mean_D)
    identity = nn.Identity()
    return Dense(
        width, len(matrix_DD), activation_function=identity, init_weight=weight.float(), init_bias=bias.float()
    ).requires_grad_(False)


def add_whitening(model: SentenceTransformer, spread: Spread, power: float) -> None:
    """Put the stage at the end of a model, and a Normalize behind it."""
    with model.truncate_embeddings(None):
        width = int(model.get_embedding_dimension() or 0)
    model.append(whitening_stage(spread, power, width=width).to(model.device))
    model.append(Normalize())
