"""Dev sets without labels, made of a run's corpus: what is not trained on, and what is asked of it.

``cloze`` asks a sentence for the document that it was taken out of (:mod:`hncse_ray.evaluation.cloze`).
``pseudo-relevance`` asks such sentences for the ten rows that a fixed ranking puts first. That ranking is
better on judged queries than the encoders that are scored by it (``benchmarks/adaptation_study.py teachers``), so who
comes nearer to it searches better: benchmarks/README.md has its correlation with judged gains.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from hncse_ray.config import COLLECTION_METRICS, Settings
from hncse_ray.corpus import Corpus, Shuffled, sentences_or_runs
from hncse_ray.errors import DataError
from hncse_ray.evaluation import (
    Encode,
    Gaps,
    RetrievalSet,
    cloze_set,
    draw_candidates,
    draw_gaps,
    encode_unit,
    on_side,
    unit_rows,
)
from hncse_ray.negatives.lexical import LexicalIndex

SUITES = ("cloze", "pseudo-relevance")

_NEIGHBOURS, _SMOOTHING = 10, 0.5  # a row's vector goes half way to the mean of its nearest
_LEXICAL, _FEEDBACK, _ROWS_ASKED = 0.3, 0.3, 3  # weights beside the cosine; rows whose words ask again
_RELEVANT = 10
_BLOCK = 1024

Floats = NDArray[np.float64]


def hold_out(settings: Settings, corpus: Corpus) -> Gaps | None:
    """Return which rows are not trained on, and what is asked about them; None where no suite needs it.

    It follows from the settings and the corpus, so that every rank, and a run that is gone on with, has the same.

    Raises:
        DataError: the corpus is not one of documents, or has too few.
    """
    asked = [suite for suite in SUITES if suite in settings.evaluation.suites]
    if not asked:
        return None
    where = f"corpus {settings.corpus.place}"
    if not corpus.has_passages or corpus.documents is None:
        raise DataError(
            f"has no documents, and suite {asked[0]!r} asks about them",
            where,
            "Set corpus.source=documents, or other evaluation.suites",
        )
    queries, seed = settings.evaluation.held_out_queries, settings.run.seed
    return draw_gaps(
        corpus.documents,
        corpus.bodies,
        sentences_or_runs,
        order=Shuffled(len(corpus), (seed,)),
        count=queries,
        seed=seed,
        where=where,
    )


def label_free_sets(settings: Settings, corpus: Corpus, gaps: Gaps, base: Encode) -> dict[str, RetrievalSet]:
    """Return the sets that ask for what :func:`hold_out` has taken out, by suite.

    Args:
        settings: of the run.
        corpus: of the run.
        gaps: what is held out.
        base: the encoder before training; every rank must get the same vectors.
    """
    asked, most, seed = settings.evaluation.suites, settings.evaluation.held_out_candidates, settings.run.seed
    found = {}
    if "cloze" in asked:
        found["cloze"] = cloze_set(corpus.texts, gaps, rows=len(corpus), most_candidates=most, seed=seed)
    if "pseudo-relevance" in asked:
        candidates = draw_candidates(gaps, rows=len(corpus), most=most, seed=seed)
        place = {int(row): at for at, row in enumerate(candidates)}
        sentences = {place[row]: sentence for row, sentence in gaps.sentences.items()}
        found["pseudo-relevance"] = pseudo_relevance_set(corpus.texts(candidates), sentences, base)
    return found


def pseudo_relevance_set(candidates: Sequence[str], sentences: dict[int, str], base: Encode) -> RetrievalSet:
    """Return the set whose right candidates are the ten that a fixed ranking puts first; the own one is not ranked.

    The ranking is the cosine under the base, of candidates moved half way to the mean of their ten nearest, plus 0.3
    BM25 over its maximum, plus 0.3 BM25 asked by the words of the three best by then (pseudo-relevance feedback;
    Lavrenko & Croft 2001, Relevance-based language models, is the idea's source).

    Args:
        candidates: what is searched.
        sentences: what asks, by the candidate that holds it.
        base: the encoder before training.
    """
    queries, own_Q = list(sentences.values()), np.fromiter(sentences, np.int_)
    smooth_AD = _smoothed(encode_unit(on_side(base, "document"), candidates))
    index = LexicalIndex(candidates, keys_nc=np.arange(len(candidates))[:, None])
    score_QA = encode_unit(on_side(base, "query"), queries) @ smooth_AD.T
    score_QA = score_QA + _LEXICAL * _shares(index, queries, own_Q)
    best_QK = _best(score_QA, own_Q, _ROWS_ASKED)
    again = [" ".join(candidates[at] for at in best_K) for best_K in best_QK]
    right_QK = _best(score_QA + _FEEDBACK * _shares(index, again, own_Q), own_Q, _RELEVANT)
    return RetrievalSet(
        queries=tuple(queries),
        candidates=tuple(candidates),
        grades=tuple({int(at): 1 for at in right_K} for right_K in right_QK),
        metrics=COLLECTION_METRICS,
        own=tuple(int(at) for at in own_Q),
    )


def _smoothed(vectors_AD: NDArray[np.floating]) -> Floats:
    mean_AD = np.empty(vectors_AD.shape)
    count = min(_NEIGHBOURS, len(vectors_AD) - 1)
    for start in range(0, len(vectors_AD), _BLOCK):
        score_bA = vectors_AD[start : start + _BLOCK] @ vectors_AD.T
        nearest_bK = _best(score_bA, np.arange(start, start + len(score_bA)), count)
        mean_AD[start : start + _BLOCK] = vectors_AD[nearest_bK].mean(axis=1)
    return np.asarray(unit_rows((1 - _SMOOTHING) * vectors_AD + _SMOOTHING * mean_AD), np.float64)


def _shares(index: LexicalIndex, queries: Sequence[str], own_Q: NDArray[np.int_]) -> Floats:
    """BM25 of each query with each candidate but its own, over the query's best."""
    score_QA = np.array([index.scores(query) for query in queries], np.float64)
    score_QA[np.arange(len(queries)), own_Q] = 0
    shares_QA: Floats = score_QA / np.maximum(score_QA.max(axis=1, keepdims=True), 1e-9)
    return shares_QA


def _best(score_QA: NDArray[np.floating], own_Q: NDArray[np.int_], k: int) -> NDArray[np.int_]:
    """The k best candidates of each query but its own, best first, ties by the smaller number."""
    others_QA = score_QA.copy()
    others_QA[np.arange(len(others_QA)), own_Q] = -np.inf
    return np.argsort(-others_QA, axis=1, kind="stable")[:, : min(k, others_QA.shape[1] - 1)]
