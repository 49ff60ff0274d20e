"""Building the settings of a run: a recipe, then ``section.key=value`` overrides, then the check of the whole."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from hncse_ray.config.explain import explain
from hncse_ray.config.sections import OBJECTIVES, InfoNCE, Settings
from hncse_ray.errors import SettingsError
from hncse_ray.recipe import find_recipe, read_yaml


def load_settings(
    recipe: str | Path | Mapping[str, Any], overrides: Iterable[str] | Mapping[str, Any] = ()
) -> Settings:
    """Read a recipe, apply overrides and check the result.

    Args:
        recipe: a YAML file, the bare name of a recipe that comes with the package, or a mapping.
        overrides: ``section.key=value`` strings, whose values are read as YAML; or values by ``section.key``.

    Raises:
        SettingsError: the recipe cannot be read, a key is unknown or a value is out of range.
    """
    if isinstance(recipe, Mapping):
        where, tree = "settings", {k: dict(v) if isinstance(v, Mapping) else v for k, v in recipe.items()}
    else:
        where, tree = str(recipe), read_yaml(find_recipe(recipe))
    for key, value in overrides.items() if isinstance(overrides, Mapping) else map(_parse_override, overrides):
        _set(tree, key, value)
    if isinstance(objective := tree.get("objective"), dict):
        objective.setdefault("name", InfoNCE.model_fields["name"].default)
    try:
        return Settings.model_validate(tree)
    except ValidationError as error:
        raise SettingsError("; ".join(explain(e) for e in error.errors()), where) from None


def _parse_override(override: str) -> tuple[str, Any]:
    key, equals, text = override.partition("=")
    if not equals or not all(key.strip().split(".")):
        raise SettingsError("is not an override", override, "Write section.key=value, such as train.batch_size=128")
    try:
        return key.strip(), yaml.safe_load(text) if text.strip() else None
    except yaml.YAMLError:
        raise SettingsError("has a value that is not valid YAML", override, "Quote it") from None


def _set(tree: dict[str, Any], key: str, value: Any) -> None:
    *sections, name = key.split(".")
    node = tree
    for section in sections:
        child = node.setdefault(section, {})
        if not isinstance(child, dict):
            raise SettingsError(f"{section!r} is a value, not a section", key)
        node = child
    if key == "objective.name" and isinstance(value, str) and value in OBJECTIVES:
        # Another objective keeps of the recipe's section only what it knows itself.
        for unknown in set(node) - set(OBJECTIVES[value].model_fields):
            del node[unknown]
    node[name] = value
