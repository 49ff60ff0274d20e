"""Everything that can be checked of a run before it begins: model, data, corpus, and settings that must fit them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import torch

from hncse_ray.config import InstanceSmoothing, Settings, Side
from hncse_ray.corpus import Corpus, WriteRows, prepare_corpus, row_hash
from hncse_ray.encoder import SentenceEncoder, has_dropout, load_encoder
from hncse_ray.errors import DataError, ModelError, counted
from hncse_ray.evaluation import RetrievalSet
from hncse_ray.reporting.events import Notice, StageProgress
from hncse_ray.reporting.reporters import Reporter
from hncse_ray.training.evaluator import EvaluationSets, load_evaluation_sets
from hncse_ray.training.label_free import hold_out
from hncse_ray.training.negatives import check_candidates
from hncse_ray.training.objective_check import check_objective
from hncse_ray.training.schedule import count_steps, plan_batches
from hncse_ray.training.views import check_views

_BLOCK = 1 << 20  # rows looked at at a time


def prepare(
    settings: Settings,
    encoder: SentenceEncoder,
    reporter: Reporter,
    *,
    sentences: Sequence[str] | None = None,
    write_rows: WriteRows | None = None,
    digests: bool = False,
) -> Corpus:
    """Prepare a run's corpus for its encoder, or find it prepared; progress goes to ``reporter``.

    Args:
        settings: of the run.
        encoder: whose tokenizer.
        reporter: receives how far it is.
        sentences: of a run whose ``corpus.source`` is ``memory``.
        write_rows: who does it; default: this process.
        digests: whether one that is found is compared with its digests, which reads all of it.

    Raises:
        DataError: the source cannot be read, or nothing of it is left.
    """
    return prepare_corpus(
        settings.corpus,
        tokenize=encoder.token_rows,
        tokenizer_digest=encoder.tokenizer_digest(),
        max_length=settings.encoder.max_length,
        seed=settings.run.seed,
        sentences=sentences,
        write_rows=write_rows,
        digests=digests,
        progress=lambda stage, done, total: reporter.on(StageProgress(stage, done, total)),
    )


def check_run(
    settings: Settings,
    reporter: Reporter,
    *,
    device: torch.device | str = "cpu",
    sentences: Sequence[str] | None = None,
) -> tuple[SentenceEncoder, EvaluationSets, Corpus]:
    """Load what a run needs and check all that can be checked before it begins.

    Args:
        settings: of the run.
        reporter: receives the progress of preparing the corpus.
        device: of the encoder.
        sentences: of a run whose ``corpus.source`` is ``memory``.

    Raises:
        HncseError: bad data or model, or settings that do not fit them.
    """
    model = settings.encoder.model
    encoder = load_encoder(model, settings.encoder, device=device, seed=settings.run.seed)
    if not settings.corpus.has_pairs:
        _check_dropout(encoder)
    if settings.encoder.max_length > (limit := encoder.length_limit):
        raise ModelError(f"it takes {limit} tokens at most", model, "Lower encoder.max_length")
    batch_size = settings.train.batch_size
    check_objective(settings, dimension=encoder.dimension, batch_size=batch_size)
    sets = load_evaluation_sets(settings.evaluation, settings.corpus)
    corpus = prepare(settings, encoder, reporter, sentences=sentences)
    sides: tuple[Side | None, ...] = ("query" if corpus.has_pairs or settings.views.active else None, "document")
    if corpus.target_side is not None and len({encoder.unpooled_prompt(side) for side in sides}) > 1:
        raise ModelError(
            "it leaves prompts out of its pooling, which cannot be done where those of queries and documents differ"
            " in length",
            model,
            "Set encoder.prompts, such as encoder.prompts={query: '', document: ''}",
        )
    if corpus.report.without_positive:
        without = f"{counted(corpus.report.without_positive, 'row')} without a positive"
        _check_dropout(encoder, f"{without}, and ")
        reporter.on(Notice(f"{without}: they are trained on in two dropout views"))
    for text in _trained_on(settings, encoder, sets, corpus):
        reporter.on(Notice(text))
    gaps = hold_out(settings, corpus)
    left_out = None if gaps is None else gaps.rows
    if (rows := len(corpus) - (0 if left_out is None else len(left_out))) < batch_size:
        held = "" if left_out is None else f" beside {len(left_out):,} held out"
        raise DataError(
            f"has {counted(rows, corpus.rows_are.removesuffix('s'))}{held}, fewer than train.batch_size = {batch_size}",
            f"corpus {settings.corpus.place}",
            "Lower train.batch_size or give a larger corpus",
        )
    plan = plan_batches(settings, corpus.view_lengths, left_out=left_out)
    steps = count_steps(settings.train, plan)  # refuses a warm-up that does not end
    for text in _too_late(settings, steps):
        reporter.on(Notice(text))
    check_candidates(settings, corpus)
    if settings.negatives.source != "none" and (candidates := settings.negatives.candidates) >= len(corpus):
        others = counted(len(corpus) - 1, f"other {corpus.rows_are.removesuffix('s')}")
        reporter.on(Notice(f"negatives.candidates = {candidates}: an anchor has {others}, so all are candidates"))
    check_views(settings, corpus, lambda text: reporter.on(Notice(text)))
    if (last_batch := plan.rows % batch_size) >= settings.smallest_batch:
        check_objective(settings, dimension=encoder.dimension, batch_size=last_batch)
    return encoder, sets, corpus


def _trained_on(settings: Settings, encoder: SentenceEncoder, sets: EvaluationSets, corpus: Corpus) -> Iterator[str]:
    """Say how many queries of a file of pairs are anchors of the corpus too."""
    for (name, split), data in sets.sets.items():
        if not corpus.has_pairs or name != "pairs" or not isinstance(data, RetrievalSet):
            continue
        rows = encoder.token_rows(data.queries, settings.encoder.max_length, side="query")
        asked = np.unique([row_hash(row) for row in rows])
        seen = np.zeros(len(asked), np.bool_)
        for first in range(0, len(corpus), _BLOCK):  # of hashes that are mapped, not read
            block = corpus.hashes[first : first + _BLOCK]
            places = np.searchsorted(asked, block).clip(max=len(asked) - 1)
            seen[places[asked[places] == block]] = True
        if count := int(seen.sum()):
            yield (f"queries of evaluation.pairs_{split} that are trained on too: {count:,} of {len(asked):,};"
                   " its score flatters the trained model")  # fmt: skip


def _too_late(settings: Settings, steps: int) -> Iterator[str]:
    """Say which settings take effect only after the end of a run of so many steps."""
    objective, views = settings.objective, settings.views
    rows = steps * settings.train.accumulation_steps * settings.train.batch_size
    if (
        isinstance(objective, InstanceSmoothing)
        and settings.negatives.source == "none"
        and objective.buffer_size > rows
    ):
        yield (f"objective.buffer_size = {objective.buffer_size} is more than the {counted(rows, 'anchor')} of this"
               " run: nothing is smoothed")  # fmt: skip
    if views.active and views.agreement is not None and views.agreement_after_steps >= steps:
        yield (f"views.agreement_after_steps = {views.agreement_after_steps} is not less than the"
               f" {counted(steps, 'step')} of this run: the index is never asked")  # fmt: skip


def _check_dropout(encoder: SentenceEncoder, why: str = "") -> None:
    """See that two views of a sentence would differ."""
    if not has_dropout(encoder):
        raise ModelError(f"{why}it has no dropout, so both views of a sentence would be the same", encoder.name,
                         "Set encoder.dropout=0.1")  # fmt: skip
