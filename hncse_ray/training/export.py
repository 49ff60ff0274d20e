"""Writing the model of a finished run: weights, settings and model card."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import yaml
from sentence_transformers.sentence_transformer.modules import Pooling
from transformers import MODEL_MAPPING, PreTrainedModel

from hncse_ray.config import EncoderSettings, Settings
from hncse_ray.corpus import Corpus
from hncse_ray.encoder import SentenceEncoder, hub_name, resolve_model
from hncse_ray.encoder.head import TrainingHead
from hncse_ray.errors import ModelError
from hncse_ray.reporting.events import Verdict
from hncse_ray.reporting.model_card import CardFacts, Usage, model_card
from hncse_ray.training.checkpoint import TrainState

logger = logging.getLogger(__name__)

_PLAIN_POOLING = ("cls", "mean", "lasttoken")  # those that the card shows in plain transformers code


def write_model(
    folder: Path,
    encoder: SentenceEncoder,
    *,
    settings: Settings,
    corpus: Corpus,
    state: TrainState,
    after: Mapping[str, Mapping[str, float]],
    verdict: Verdict,
) -> None:
    """Fill the folder of an exported model.

    Args:
        folder: existing and empty; the caller makes the write atomic.
        encoder: with the best weights.
        settings: of the run.
        corpus: that it was trained on.
        state: at the end of the run.
        after: scores of the encoder by split.
        verdict: what the encoder is, and how it was judged.
    """
    card = model_card(
        CardFacts(
            settings=settings.model_dump(mode="json"),
            usage=usage(encoder),
            base=base_front_matter(settings.encoder),
            corpus=asdict(corpus.report),
            state=asdict(state),
            after=after,
            verdict=verdict,
        )
    )
    encoder.save(folder, readme=card)
    (folder / "settings.yaml").write_text(settings.to_yaml(), encoding="utf-8")


def usage(encoder: SentenceEncoder) -> Usage:
    """Return how an encoder is used once it is saved."""
    model = encoder.model
    backbone = next(part for part in encoder.backbone.modules() if isinstance(part, PreTrainedModel))  # within adapters
    saved: list[Any] = [stage for stage in model if not isinstance(stage, TrainingHead)]
    transformer, *stages = saved
    automatic: object = MODEL_MAPPING.get(type(backbone.config), None)  # what AutoModel would make
    kinds = [type(stage).__name__ for stage in stages]
    pooling = next((stage for stage in stages if isinstance(stage, Pooling)), None)
    sides = (encoder.prompt("query"), encoder.prompt("document"), encoder.prompt(None))
    is_plain = (
        kinds in (["Pooling"], ["Pooling", "Normalize"])
        and pooling is not None
        and pooling.pooling_mode in _PLAIN_POOLING
        and (pooling.include_prompt or not any(sides))
        and model.truncate_dim is None
        and "message" not in transformer.modality_config
        and automatic is type(backbone)
    )
    if pooling is not None:
        modes = pooling.pooling_mode
        kinds[stages.index(pooling)] = f"Pooling ({modes if isinstance(modes, str) else ' + '.join(modes)})"
    return Usage(
        dimension=encoder.dimension,
        max_length=encoder.max_length,
        stages=tuple(kinds),
        plain_pooling=pooling.pooling_mode if is_plain and pooling is not None else None,
        prompts={name: prompt for name, prompt in model.prompts.items() if prompt},
        sides=sides,
        own_code=type(backbone).__module__.startswith("transformers_modules"),
    )


def base_front_matter(settings: EncoderSettings) -> dict[str, Any]:
    """Return what a card tells of a base model, in the hub's fields; no more than is known.

    A model on the hub has its name and its commit there. Of its card, licence and language are passed on; one that is
    missing or cannot be read is no error.
    """
    from huggingface_hub import metadata_load

    name, revision, card = hub_name(settings.model), settings.revision, None
    try:
        folder = resolve_model(settings.model, revision=settings.revision)
        revision = folder.name  # of what comes from the hub, the folder is called by its commit
        card = metadata_load(folder / "README.md")
    except (OSError, ValueError, yaml.YAMLError, ModelError) as error:
        logger.debug("the card of %s is not known: %s", settings.model, error)
    front: dict[str, Any] = {} if name is None else {"base_model": name}
    if name is not None and revision is not None:
        front["base_model_revision"] = revision
    told = {key: value for key, value in (card or {}).items() if _is_text(value)}
    if "license" in told:
        front |= {key: told[key] for key in ("license", "license_name", "license_link") if key in told}
    if "language" in told:
        front["language"] = [told["language"]] if isinstance(told["language"], str) else told["language"]
    return front


def _is_text(value: object) -> bool:
    """A card names one, or a list."""
    values = value if isinstance(value, list) else [value]
    return bool(values) and all(isinstance(text, str) and text for text in values)
