"""The label-free dev set of a run, made of its corpus; see :mod:`hncse_ray.evaluation.cloze`."""

from __future__ import annotations

from hncse_ray.config import Settings
from hncse_ray.corpus import Corpus, Shuffled, sentences_or_runs
from hncse_ray.errors import DataError
from hncse_ray.evaluation import Gaps, RetrievalSet, cloze_set, draw_gaps


def hold_out(settings: Settings, corpus: Corpus) -> Gaps | None:
    """Return which rows are not trained on, and what is asked about them; None without the suite ``cloze``.

    It follows from the settings and the corpus, so that every rank, and a run that is gone on with, has the same.

    Raises:
        DataError: the corpus is not one of documents, or has too few.
    """
    if "cloze" not in settings.evaluation.suites:
        return None
    where = f"corpus {settings.corpus.place}"
    if not corpus.has_passages or corpus.documents is None:
        raise DataError(
            "has no documents, so that suite 'cloze' cannot ask which one a sentence is of",
            where,
            "Set corpus.source=documents, or other evaluation.suites",
        )
    queries, seed = settings.evaluation.cloze_queries, settings.run.seed
    return draw_gaps(
        corpus.documents,
        corpus.bodies,
        sentences_or_runs,
        order=Shuffled(len(corpus), (seed,)),
        count=queries,
        seed=seed,
        where=where,
    )


def cloze_dev(settings: Settings, corpus: Corpus, gaps: Gaps) -> RetrievalSet:
    """Return the set that asks for what :func:`hold_out` has taken out."""
    return cloze_set(
        corpus.texts,
        gaps,
        rows=len(corpus),
        most_candidates=settings.evaluation.cloze_candidates,
        seed=settings.run.seed,
    )
