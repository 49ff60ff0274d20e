"""What pydantic finds wrong with settings, in words that name the setting."""

from __future__ import annotations

import difflib
import reprlib
from collections.abc import Iterable

from pydantic_core import ErrorDetails

from hncse_ray.config.objective import OBJECTIVES
from hncse_ray.config.sections import Settings
from hncse_ray.config.values import is_section, kinds_of

_CHOICE = f"choose from {', '.join(OBJECTIVES)}, or name a function of your own as MODULE:FUNCTION"
_shown = reprlib.Repr()
_shown.maxstring, _shown.maxother = 200, 200


def explain(error: ErrorDetails) -> str:
    """Say which setting is wrong, what is wrong with it, and where there is one the setting that was meant."""
    path = ".".join(_location(error))
    match error["type"]:
        case "extra_forbidden":
            return f"unknown setting {path!r}{_nearest(error)}"
        case "missing":
            return f"setting {path!r} is missing"
        case "value_error":
            return f"{path}: {error['ctx']['error']}" if path else str(error["ctx"]["error"])
        case "union_tag_invalid":
            near = difflib.get_close_matches(str(error["ctx"]["tag"]), OBJECTIVES, n=1, cutoff=0.4)
            hint = f" (did you mean {near[0]!r}?)" if near else ""
            return f"unknown objective.name {error['ctx']['tag']!r}{hint}; {_CHOICE}"
        case "union_tag_not_found":
            return f"objective.name is missing; {_CHOICE}"
        case "model_type" | "model_attributes_type":
            return f"{path} = {_shown.repr(error['input'])}: it is a section with settings of its own, not a value"
        case _:
            message = error["msg"][0].lower() + error["msg"][1:]
            return f"{path} = {_shown.repr(error['input'])}: {message}"


def _location(error: ErrorDetails) -> list[str]:
    """The path of a setting without what unions put into it: whose the objective is, its name, the type of a value."""
    loc = [str(part) for part in error["loc"]]
    if loc[:1] != ["objective"]:
        return loc
    if loc[1:2] == ["own"]:
        return ["objective", *loc[2:4]]
    return ["objective", *loc[2 + (len(loc) > 2 and loc[2] in OBJECTIVES) :]]


def _nearest(error: ErrorDetails) -> str:
    """Name the valid setting nearest to an unknown one: in its own section first, then anywhere."""
    *sections, key = _location(error)  # of a recipe, where a key may have dots of its own
    section = ".".join(sections)
    if section == "objective":
        if error["loc"][1] == "own":
            return "; an objective of your own has its settings in objective.settings"
        name = str(error["loc"][2])
        own, owner = list(OBJECTIVES[name].model_fields), f"objective {name!r}"
    else:
        own = [p.rpartition(".")[2] for p in _setting_paths() if p.rpartition(".")[0] == section]
        owner = section or "the top level"
    if near := difflib.get_close_matches(key, own, n=1, cutoff=0.7):
        return f" (did you mean {f'{section}.{near[0]}'.lstrip('.')!r}?)"
    elsewhere = [p for p in _setting_paths() if p.rpartition(".")[2] == key]
    if elsewhere and section != "objective":
        return f" (did you mean {elsewhere[0]!r}?)"
    return f"; {owner} knows {', '.join(own)}"


def _setting_paths() -> Iterable[str]:
    for section, field in Settings.model_fields.items():
        yield section
        classes = OBJECTIVES.values() if section == "objective" else [field.annotation]
        for cls in classes:
            yield from _paths_below(section, cls)


def _paths_below(section: str, kind: object) -> Iterable[str]:
    for cls in filter(is_section, kinds_of(kind)):
        for name, field in cls.model_fields.items():
            yield f"{section}.{name}"
            yield from _paths_below(f"{section}.{name}", field.annotation)
