"""The control beside every gain: the base, whitened on the same corpus, which takes no training."""

from __future__ import annotations

from collections.abc import Callable

from hncse_ray.config import Settings
from hncse_ray.config.export import WHITENINGS
from hncse_ray.corpus import Corpus
from hncse_ray.errors import DataError
from hncse_ray.evaluation import Encode
from hncse_ray.training.encoding import KnownEncode
from hncse_ray.training.evaluator import Measured, Scores, Split
from hncse_ray.training.whitening import Whitened, corpus_spread

_ROWS_PER_DIMENSION = 2  # of the corpus: with ten the scores are no better (benchmarks/LOG.md)


def whitened_base(
    untouched: KnownEncode,
    corpus: Corpus,
    settings: Settings,
    *,
    dimension: int,
    measure: Callable[[Encode, Split], Measured],
) -> tuple[float, dict[str, Scores]]:
    """Score the base with the whitening that ``export.whiten=auto`` would choose for it on dev.

    Args:
        untouched: the encoder before training.
        corpus: whose spread is levelled.
        settings: of the run.
        dimension: of the vectors.
        measure: scores an encoder on a split, on all ranks, with one outcome.

    Returns:
        The power, and scores by split; 0 and nothing where the rows are too few, or all alike, to have a spread.
    """
    try:
        spread = corpus_spread(untouched, corpus, rows=_ROWS_PER_DIMENSION * dimension, seed=settings.run.seed)
    except DataError:
        return 0.0, {}
    scored = {power: measure(Whitened(untouched, spread, power), "dev").scores for power in WHITENINGS if power}
    power = max(scored, key=lambda power: scored[power].get(settings.evaluation.metric, 0.0))  # of equal ones the first
    return power, {"dev": scored[power], "test": measure(Whitened(untouched, spread, power), "test").scores}
