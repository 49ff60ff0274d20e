"""What pydantic finds wrong with settings, in words that name the setting."""

from __future__ import annotations

import difflib
import reprlib
from collections.abc import Iterable

from pydantic_core import ErrorDetails

from hncse_ray.config.sections import OBJECTIVES, Settings
from hncse_ray.config.values import is_section, kinds_of

_shown = reprlib.Repr()
_shown.maxstring, _shown.maxother = 200, 200


def explain(error: ErrorDetails) -> str:
    """Say which setting is wrong, what is wrong with it, and where there is one the setting that was meant."""
    # A discriminated union puts the chosen name into the location; the user never wrote it there.
    loc = [str(part) for part in error["loc"]]
    if len(loc) > 1 and loc[0] == "objective" and loc[1] in OBJECTIVES:
        del loc[1]
    path = ".".join(loc)
    match error["type"]:
        case "extra_forbidden":
            return f"unknown setting {path!r}{_nearest(path, error)}"
        case "missing":
            return f"setting {path!r} is missing"
        case "value_error":
            return f"{path}: {error['ctx']['error']}" if path else str(error["ctx"]["error"])
        case "union_tag_invalid":
            near = difflib.get_close_matches(str(error["ctx"]["tag"]), OBJECTIVES, n=1, cutoff=0.4)
            hint = f" (did you mean {near[0]!r}?)" if near else ""
            return f"unknown objective.name {error['ctx']['tag']!r}{hint}; choose from {', '.join(OBJECTIVES)}"
        case "union_tag_not_found":
            return f"objective.name is missing; choose from {', '.join(OBJECTIVES)}"
        case "model_type" | "model_attributes_type":
            return f"{path} = {_shown.repr(error['input'])}: it is a section with settings of its own, not a value"
        case _:
            message = error["msg"][0].lower() + error["msg"][1:]
            return f"{path} = {_shown.repr(error['input'])}: {message}"


def _nearest(path: str, error: ErrorDetails) -> str:
    """Name the valid setting nearest to an unknown one: in its own section first, then anywhere."""
    section, _, key = path.rpartition(".")
    if section == "objective":
        name = str(error["loc"][1])
        own, owner = list(OBJECTIVES[name].model_fields), f"objective {name!r}"
    else:
        own = [p.rpartition(".")[2] for p in _setting_paths() if p.rpartition(".")[0] == section]
        owner = section or "the top level"
    if near := difflib.get_close_matches(key, own, n=1, cutoff=0.7):
        return f" (did you mean {f'{section}.{near[0]}'.lstrip('.')!r}?)"
    elsewhere = [p for p in _setting_paths() if p.rpartition(".")[2] == key and p != path]
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
