"""Building the settings of a run: a recipe, then ``section.key=value`` overrides, then the check of the whole."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, get_args, get_origin

from pydantic import JsonValue, ValidationError
from pydantic_core import PydanticCustomError

from hncse_ray.config.explain import explain
from hncse_ray.config.objective import InfoNCE, objective_class
from hncse_ray.config.sections import Settings
from hncse_ray.config.values import Typed, is_section, kinds_of, read_kinds
from hncse_ray.errors import SettingsError
from hncse_ray.recipe import Plain, find_recipe, parse_yaml, read_yaml


def load_settings(
    recipe: str | Path | Mapping[str, Any], overrides: Iterable[str] | Mapping[str, Any] = ()
) -> Settings:
    """Read a recipe, apply overrides and check the result.

    Args:
        recipe: a YAML file, the bare name of a recipe that comes with the package, or a mapping.
        overrides: ``section.key=value`` strings, or one, whose values are text, numbers or YAML as the setting says;
            or values by ``section.key``. Of one that is given twice the last counts.

    Raises:
        SettingsError: the recipe cannot be read, a key is unknown or a value is out of range.
    """
    if isinstance(recipe, Mapping):
        where, tree = "settings", dict(recipe)
    else:
        where, tree = str(recipe), read_yaml(find_recipe(recipe))
    given: Iterable[tuple[str, Any]]
    if isinstance(overrides, Mapping):
        given = overrides.items()
    else:
        given = map(_parse_override, [overrides] if isinstance(overrides, str) else overrides)
    last: dict[str, Any] = {}
    for key, value in given:
        last.pop(key, None)
        last[key] = value
    # The name first: another objective keeps of the section only what it knows, and then refuses the rest.
    for key, value in sorted(last.items(), key=lambda item: item[0] != "objective.name"):
        _set(tree, str(key), value)
    objective = _mapping(tree.get("objective"), "objective", where)
    tree["objective"] = {"name": InfoNCE.model_fields["name"].default} | objective
    try:
        return Settings.model_validate(tree)
    except ValidationError as error:
        raise SettingsError("; ".join(explain(e) for e in error.errors()), where) from None


def setting_kinds(path: str) -> frozenset[Any]:
    """Return what a setting may be, as :func:`~hncse_ray.config.values.kinds_of`; nothing if there is no such setting.

    Args:
        path: such as ``train.batch_size``; one of ``objective`` is a setting of any objective.
    """
    kinds: frozenset[Any] = frozenset([Settings])
    for part in path.split("."):
        below: frozenset[Any] = frozenset()
        for kind in kinds:
            if is_section(kind) and part in kind.model_fields:
                annotation: Any = kind.model_fields[part].annotation
                below |= kinds_of(annotation)
            elif get_origin(kind) is dict:
                below |= kinds_of(get_args(kind)[1])
            elif kind is JsonValue:
                below |= {JsonValue}
        kinds = below
    return kinds


def read_setting(path: str, value: Any) -> Any:
    """Return a value from YAML as a setting takes it; see :func:`~hncse_ray.config.values.read_value`.

    Raises:
        SettingsError: it is no value of that setting.
    """
    try:
        return read_kinds(value, setting_kinds(path) or frozenset([JsonValue]))
    except PydanticCustomError as error:
        raise SettingsError(f"{value!r}: {error.message()}", path) from None


def _parse_override(override: str) -> tuple[str, Typed]:
    key, equals, text = str(override).partition("=")
    if not equals or not all(key.strip().split(".")):
        raise SettingsError(
            "is not an override",
            str(override) or repr(override),
            "Write section.key=value, such as train.batch_size=128",
        )
    return key.strip(), Typed(text.strip())


def _set(tree: dict[str, Any], key: str, value: Any) -> None:
    *sections, name = key.split(".")
    node = tree
    for section in sections:
        child = _mapping(node.get(section), section, key)
        node[section] = child  # a copy: the recipe may be someone's own mapping
        node = child
    if key == "objective.name":
        value = read_setting(key, value)
        if node.get("name") != value and (section_of := objective_class(value)):
            # What is in `settings` another objective of the user's knows only by chance.
            for foreign in set(node) - (set(section_of.model_fields) - {"settings"}):
                del node[foreign]
    node[name] = value


def _mapping(value: Any, section: str, where: str) -> dict[str, Any]:
    """Return a copy of a section; one with nothing in it is empty."""
    if isinstance(value, Typed):
        value = parse_yaml(value, where)
    if value is None or isinstance(value, Plain) and value.is_nothing:
        return {}
    if not isinstance(value, Mapping):
        raise SettingsError(f"{section!r} is a value, not a section", where)
    return dict(value)
