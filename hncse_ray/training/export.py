"""Writing the model of a finished run: weights, settings and model card."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from hncse_ray.config import Settings
from hncse_ray.corpus import Corpus
from hncse_ray.encoder import SentenceEncoder, hub_name
from hncse_ray.reporting.model_card import CardFacts, model_card
from hncse_ray.training.checkpoint import TrainState


def write_model(
    folder: Path,
    encoder: SentenceEncoder,
    *,
    settings: Settings,
    corpus: Corpus,
    state: TrainState,
    after: Mapping[str, Mapping[str, float]],
) -> None:
    """Fill the folder of an exported model.

    Args:
        folder: existing and empty; the caller makes the write atomic.
        encoder: with the best weights.
        settings: of the run.
        corpus: that it was trained on.
        state: at the end of the run.
        after: scores of the encoder by split.
    """
    card = model_card(
        CardFacts(
            name=settings.run.name,
            settings=settings.model_dump(mode="json"),
            usage="",
            base_model=hub_name(settings.encoder.model),
            corpus_digest=corpus.digest,
            corpus_rows=corpus.report.rows,
            corpus_read=corpus.report.read,
            steps=state.step,
            best_step=state.best_step,
            before=state.before,
            after=after,
            index_step=None if state.index_version is None else int(state.index_version["step"]),
        )
    )
    encoder.save(folder, readme=card)
    (folder / "settings.yaml").write_text(settings.to_yaml(), encoding="utf-8")
