"""Every setting as facts for a reader: its type, range, default and meaning, read off the models themselves."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cache
from types import NoneType
from typing import Any, Literal, get_args, get_origin

from annotated_types import Ge, Gt, Le, Lt, MaxLen, MinLen
from pydantic import BaseModel, JsonValue
from pydantic.fields import FieldInfo

from hncse_ray.config.objective import OBJECTIVES, OwnObjective
from hncse_ray.config.sections import Settings
from hncse_ray.config.values import is_section, kinds_of

OWN_OBJECTIVE = "MODULE:FUNCTION"
_CLASSES: dict[str, type[BaseModel]] = {**OBJECTIVES, OWN_OBJECTIVE: OwnObjective}
_TYPES = {bool: "true or false", int: "whole number", float: "number", str: "text"}


@dataclass(frozen=True)
class SettingFacts:
    """One setting.

    Attributes:
        key: its path, such as ``train.batch_size``.
        type: what it takes, in words.
        range: the bounds of a number or a text; empty where there are none.
        default: as a recipe would write it; ``required`` where there is none.
        meaning: what it does.
        objectives: of a setting of ``objective``, the names of those that know it; else empty.
    """

    key: str
    type: str
    range: str
    default: str
    meaning: str
    objectives: tuple[str, ...] = ()


@dataclass(frozen=True)
class SectionFacts:
    """A section: its path, what it is for and where its defaults come from, its settings."""

    key: str
    meaning: str
    settings: tuple[SettingFacts, ...]


@cache
def reference() -> tuple[SectionFacts, ...]:
    """Return all sections in the order of the tree."""
    return tuple(section for name, field in Settings.model_fields.items() for section in _sections(name, field))


def objective_papers() -> dict[str, str]:
    """Return what each objective is, with its paper, by name."""
    return {name: _documentation(cls) for name, cls in _CLASSES.items()}


def shown_value(value: object, *, digits: int = 6) -> str:
    """Return a value as a recipe writes it, numbers that are not whole to so many digits."""
    match value:
        case None:
            return "null"
        case bool():
            return str(value).lower()
        case float():
            return f"{value:.{digits}g}"
        case BaseModel():
            return shown_value(value.model_dump(), digits=digits)
        case list() | tuple():
            return f"[{', '.join(shown_value(item, digits=digits) for item in value)}]"
        case Mapping():
            return f"{{{', '.join(f'{key}: {shown_value(item, digits=digits)}' for key, item in value.items())}}}"
    return str(value)


def _sections(key: str, field: FieldInfo) -> Iterator[SectionFacts]:
    if key == "objective":
        yield _objective()
        return
    annotation: Any = field.annotation
    (cls,) = filter(is_section, kinds_of(annotation))
    settings = [_setting(f"{key}.{name}", inner) for name, inner in cls.model_fields.items()]
    yield SectionFacts(key, _documentation(cls), tuple(settings))
    for name, inner in cls.model_fields.items():
        if "a section" in _type(inner.annotation):
            yield from _sections(f"{key}.{name}", inner)


def _objective() -> SectionFacts:
    """Return the settings of all objectives; those that several know alike are one."""
    found: dict[SettingFacts, list[str]] = {}
    for objective, cls in _CLASSES.items():
        for key, field in cls.model_fields.items():
            if key != "name":
                found.setdefault(_setting(f"objective.{key}", field), []).append(objective)
    name = SettingFacts("objective.name", ", ".join(_CLASSES), "", "info_nce", "the loss; see the list of objectives")
    settings = [replace(facts, objectives=tuple(names)) for facts, names in found.items()]
    return SectionFacts("objective", "The loss and its own settings.", (name, *settings))


def _documentation(cls: type[BaseModel]) -> str:
    return (inspect.getdoc(cls) or "").replace("``", "`").replace("\n", " ").replace("  ", "\n\n")


def _setting(key: str, field: FieldInfo) -> SettingFacts:
    default = "required" if field.is_required() else shown_value(field.get_default(call_default_factory=True))
    bounds = [*field.metadata, *_inner_bounds(field.annotation)]
    return SettingFacts(key, _type(field.annotation), _range(bounds), default, field.description or "")


def _type(annotation: Any) -> str:
    kinds = kinds_of(annotation)
    words = [shown_value(word) for word in _literals(annotation)]
    parts = [", ".join(words)] if words else []
    for kind in kinds - set(_literals(annotation)) - {NoneType}:
        origin, inner = get_origin(kind), get_args(kind)
        if origin is tuple:
            parts.append(f"list of {_type(inner[0])}")
        elif origin is dict:
            parts.append(f"{'values' if inner[1] is JsonValue else _type(inner[1])} by name")
        elif is_section(kind):
            parts.append("a section")
        else:
            parts.append(_TYPES.get(kind, "any value"))
    return " or ".join([*sorted(parts), *(["null"] if NoneType in kinds else [])])


def _literals(annotation: Any) -> list[Any]:
    """The words of a type in the order in which they are written."""
    if get_origin(annotation) is Literal:
        return list(get_args(annotation))
    return [word for part in get_args(annotation) if get_origin(annotation) is not tuple for word in _literals(part)]


def _inner_bounds(annotation: Any) -> Iterator[object]:
    """The bounds of what a list holds."""
    for part in get_args(annotation):
        if isinstance(part, FieldInfo):
            yield from part.metadata
        elif part is not Ellipsis:
            yield from _inner_bounds(part)


def _range(bounds: list[object]) -> str:
    low = high = other = ""
    for bound in bounds:
        match bound:
            case Ge(ge=value):
                low = f"at least {_number(value)}"
            case Gt(gt=value):
                low = f"above {_number(value)}"
            case Le(le=value):
                high = f"at most {_number(value)}"
            case Lt(lt=value):
                high = f"below {_number(value)}"
            case MinLen(min_length=1):
                other = "not empty"
            case MaxLen(max_length=value):
                other = f"at most {value} characters"
    return ", ".join(part for part in (low, high, other) if part)


def _number(value: Any) -> str:
    return "-" + _number(-value) if value < 0 else f"{value:,}" if isinstance(value, int) else f"{value:g}"


def reference_page() -> str:
    """Return ``docs/settings.md``."""
    lines = [
        "# Settings",
        "",
        "Every setting of a run, made by `hncse settings --markdown` from the settings themselves.",
        "`hncse settings KEY` shows one in the terminal, with the recipes that set it.",
    ]
    for section in reference():
        lines += ["", f"## {section.key}", "", section.meaning, ""]
        if section.key == "objective":
            lines += [f"- `{name}`: {what}" for name, what in objective_papers().items()] + [""]
        lines += ["| setting | meaning | takes | default |", "|---|---|---|---|"]
        lines += map(_row, section.settings)
    return "\n".join(lines) + "\n"


def _row(setting: SettingFacts) -> str:
    takes = f"{setting.type}; {setting.range}" if setting.range else setting.type
    known_by_all = len(setting.objectives) >= len(OBJECTIVES)
    known = "" if known_by_all or not setting.objectives else f" ({', '.join(setting.objectives)})"
    cells = (f"`{setting.key}`", setting.meaning + known, takes, f"`{setting.default}`")
    return f"| {' | '.join(map(_cell, cells))} |"


def _cell(text: str) -> str:
    plain = text.replace("|", "\\|")
    return plain if plain.startswith("`") else plain.replace("<", "&lt;")
