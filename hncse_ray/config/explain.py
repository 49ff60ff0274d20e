"""What pydantic finds wrong with settings, in words that name the setting."""

from __future__ import annotations

import difflib
import re
import reprlib
from collections.abc import Iterator, Mapping, Sequence

from pydantic_core import ErrorDetails

from hncse_ray.config.objective import OBJECTIVES
from hncse_ray.config.reference import reference
from hncse_ray.config.synonyms import SYNONYMS

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
    """Name the valid setting that an unknown one probably means; see :func:`meant`."""
    *sections, key = _location(error)  # of a recipe, where a key may have dots of its own
    section = ".".join(sections)
    if section == "objective":
        if error["loc"][1] == "own":
            return "; an objective of your own has its settings in objective.settings"
        name = str(error["loc"][2])
        own, owner = list(OBJECTIVES[name].model_fields), f"objective {name!r}"
    else:
        own = [p.rpartition(".")[2] for p in setting_paths() if p.rpartition(".")[0] == section]
        owner = section or "the top level"
    found = meant(f"{section}.{key}".lstrip("."), own)
    if not found and not section and isinstance(error["input"], Mapping):  # a section that there is not: of other tools
        found = next(filter(None, (meant(str(inner), ()) for inner in error["input"])), ())
    if found:
        return f" (did you mean {' or '.join(map(repr, found))}?)"
    return f"; {owner} knows {', '.join(own)}"


def meant(path: str, own: Sequence[str] | None = None) -> tuple[str, ...]:
    """Return the settings that an unknown one probably means: at most three, none if nothing is like it.

    What others call a setting (:mod:`~hncse_ray.config.synonyms`) comes first, then a like name in its own section, the
    same name in another, a like name anywhere, and last a name or a meaning with the same word.

    Args:
        path: what was written, such as ``train.lr``.
        own: the names that its section has; None = those of the tree.
    """
    section, _, key = path.rpartition(".")
    paths = list(dict.fromkeys(setting_paths()))
    if own is None:
        own = [p.rpartition(".")[2] for p in paths if p.rpartition(".")[0] == section]
    if section == "objective":  # a setting of another objective is not meant, however like it is
        if path in paths:
            return ()
        paths = [p for p in paths if p.rpartition(".")[0] != section or p.rpartition(".")[2] in own]
    word = re.sub(r"\W", "_", key).lower()
    joined = word.replace("_", "")
    if called := [p for p in paths if joined in (name.replace("_", "") for name in SYNONYMS.get(p, ()))]:
        return tuple(called)
    if near := difflib.get_close_matches(key, own, n=1, cutoff=0.7):
        return (f"{section}.{near[0]}".lstrip("."),)
    if same := [p for p in paths if p.rpartition(".")[2] == key]:
        return tuple(same[:3])
    leaves = {p.rpartition(".")[2]: p for p in reversed(paths)}
    if near := difflib.get_close_matches(word, leaves, n=1, cutoff=0.8):
        return (leaves[near[0]],)
    if len(word) < 4:
        return ()
    named = [p for p in paths if word in p.rpartition(".")[2].split("_")]
    told = [s.key for part in reference() for s in part.settings if word in re.findall(r"\w+", s.meaning.lower())]
    return tuple(dict.fromkeys(p for p in (*named, *told) if p in paths))[:3]


def setting_paths() -> Iterator[str]:
    """All sections and settings; a setting that several objectives know comes several times."""
    for section in reference():
        yield section.key
        yield from (setting.key for setting in section.settings)
