"""What the card of a base model says that a model made from it must pass on."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from hncse_ray.encoder.resolve import PACKAGE_PREFIX, resolve_model
from hncse_ray.errors import ModelError

logger = logging.getLogger(__name__)

_LICENCE_KEYS = ("license", "license_name", "license_link")


@dataclass(frozen=True)
class SourceCard:
    """Licence and languages of a base model; empty where its card does not tell.

    Attributes:
        licence: ``license`` of the card's front matter, and its name and link where the hub has no short name for it.
        languages: codes such as ``en``.
    """

    licence: Mapping[str, Any] = field(default_factory=dict)
    languages: tuple[str, ...] = ()


def read_source_card(model: str) -> SourceCard:
    """Read the card of a base model, if there is one that can be read; a missing card is no error.

    Args:
        model: see :func:`hncse_ray.encoder.resolve.resolve_model`.
    """
    try:
        front = front_matter(resolve_model(model) / "README.md")
    except (OSError, ValueError, yaml.YAMLError, ModelError) as error:
        logger.debug("the card of %s is not known: %s", model, error)
        return SourceCard()
    licence = {key: front[key] for key in _LICENCE_KEYS if _is_text(front.get(key))}
    if "license" not in licence:
        licence = {}
    return SourceCard(licence, tuple(_texts(front.get("language"))))


def hub_name(model: str) -> str | None:
    """Return the name of a model on the hub; None for a folder or a package."""
    if model.startswith((PACKAGE_PREFIX, "/", ".", "~")) or model.count("/") > 1 or Path(model).exists():
        return None
    return model


def front_matter(path: Path) -> dict[str, Any]:
    """Return the fields at the head of a model card.

    Raises:
        OSError: it cannot be read.
        ValueError: it has no such fields.
        yaml.YAMLError: they are not valid YAML.
    """
    lines = path.read_text(encoding="utf-8").splitlines()
    if not lines or lines[0].strip() != "---" or "---" not in (later := [line.rstrip() for line in lines[1:]]):
        raise ValueError("it has no front matter")
    front = yaml.safe_load("\n".join(later[: later.index("---")]))
    if not isinstance(front, dict):
        raise ValueError("its front matter holds no fields")
    return front


def _is_text(value: object) -> bool:
    return bool(_texts(value))


def _texts(value: object) -> list[str]:
    """The value, or values, if they are text: a card names one or a list."""
    values = value if isinstance(value, list) else [value]
    return [text for text in values if isinstance(text, str) and text] if all(values) else []
