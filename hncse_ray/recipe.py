"""Finding recipes and search spaces, by path or by the name of one that comes with the package; reading them."""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import yaml

from hncse_ray.errors import SettingsError


def shipped_folder(kind: str) -> Path:
    """The folder with the ``recipes`` or ``search_spaces`` that come with hncse_ray (a wheel carries them inside)."""
    package = Path(__file__).parent
    return package / kind if (package / kind).is_dir() else package.parent / kind


def find_recipe(recipe: str | Path) -> Path:
    """Resolve a recipe given as a path or by the bare name of one that comes with the package.

    Raises:
        SettingsError: neither exists; the message names the nearest known recipe.
    """
    return _find(recipe, "recipes", "recipe")


def find_space(space: str | Path) -> Path:
    """Resolve a search space in the same way.

    Raises:
        SettingsError: there is none; the message names the nearest known one.
    """
    return _find(space, "search_spaces", "search space")


def _find(name: str | Path, kind: str, noun: str) -> Path:
    if not isinstance(name, str | Path):
        raise SettingsError(f"is no {noun}, but of type {type(name).__name__}", repr(name), "Name one, or a YAML file")
    path = Path(name)
    if path.is_file():
        return path
    if path.is_dir() and str(name):
        raise SettingsError(f"is a directory, not a {noun}", str(name), "Name a YAML file")
    names = sorted(p.stem for p in shipped_folder(kind).glob("*.yaml"))
    if path.name in names and len(path.parts) == 1:
        return shipped_folder(kind) / f"{path.name}.yaml"
    near = difflib.get_close_matches(path.stem, names, n=1, cutoff=0.6)
    hint = f"Did you mean {near[0]!r}? " if near else ""
    raise SettingsError(f"no such {noun}", str(name) or repr(name), f"{hint}Known by name: {', '.join(names)}")


YAML_NULLS = ("", "~", "null", "Null", "NULL")
NOTHING = (*YAML_NULLS, "none", "None")


class Plain(str):
    """A text that was written without quotes; what it means depends on what it was written for."""

    @property
    def is_nothing(self) -> bool:
        """Whether it is one of the words for no value, where there may be none."""
        return self in NOTHING


_NULL = "tag:yaml.org,2002:null"
_TEXT = "tag:yaml.org,2002:str"
_TAGS = ("tag:yaml.org,2002:seq", "tag:yaml.org,2002:map", None)  # None: any other is refused


class _Loader(yaml.SafeLoader):
    """YAML whose scalars stay the text that was written; what they mean depends on what they are written for.

    Refused are a key given twice, where plain YAML would silently keep the last, and aliases, with which a short file
    makes an endless tree.
    """

    yaml_implicit_resolvers: dict[str, list[tuple[str, re.Pattern[str]]]] = {}
    yaml_constructors: ClassVar[dict[str | None, Any]] = {tag: yaml.SafeLoader.yaml_constructors[tag] for tag in _TAGS}

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        if self.check_event(yaml.AliasEvent):
            raise yaml.MarkedYAMLError(problem="an alias is not understood here; write its value out",
                                       problem_mark=self.peek_event().start_mark)  # type: ignore[no-untyped-call]  # fmt: skip
        return super().compose_node(parent, index)

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        for key in keys:
            if keys.count(key) > 1:
                raise yaml.MarkedYAMLError(problem=f"key {key!r} is given twice", problem_mark=node.start_mark)
        return super().construct_mapping(node, deep)


class _Dumper(yaml.SafeDumper):
    """YAML that puts every text into quotes that the loader above, or PyYAML's own, would not take for text."""


def _construct_text(_loader: yaml.Loader, node: yaml.ScalarNode) -> str:
    return str(node.value) if node.style else Plain(node.value)


_Loader.add_constructor(_TEXT, _construct_text)
_Dumper.add_implicit_resolver(_NULL, re.compile("|".join(f"{word}$" for word in NOTHING)), ["~", "n", "N", ""])


def parse_yaml(text: str, where: str) -> Any:
    """Read YAML as lists and mappings of texts.

    Args:
        text: what to read.
        where: the file or setting it is from, named in errors.

    Raises:
        SettingsError: it is not valid YAML, gives a key twice or uses an alias.
    """
    try:
        return yaml.load(text, Loader=_Loader)
    except yaml.MarkedYAMLError as error:
        at = f" in line {error.problem_mark.line + 1}" if error.problem_mark else ""
        why = ": ".join(" ".join(part.split()) for part in (error.context, error.problem) if part)
        raise SettingsError(f"is not valid YAML{at} ({why})", where) from None
    except (yaml.YAMLError, ValueError, OverflowError) as error:  # the last two: escapes of no character
        raise SettingsError(f"is not valid YAML ({' '.join(str(error).split())})", where) from None
    except RecursionError:
        raise SettingsError("is not valid YAML (nested too deeply)", where) from None


def write_yaml(tree: Mapping[str, Any]) -> str:
    """Return a tree as YAML whose texts :func:`parse_yaml` reads back as they are."""
    return yaml.dump(tree, Dumper=_Dumper, sort_keys=False)


def read_yaml(path: Path) -> dict[str, Any]:
    """Read a recipe or a search space; see :func:`parse_yaml`.

    Raises:
        SettingsError: it cannot be read, is not valid YAML or holds no mapping.
    """
    try:
        tree = parse_yaml(path.read_text(encoding="utf-8"), str(path))
    except (OSError, UnicodeDecodeError) as error:
        raise SettingsError(f"cannot be read ({getattr(error, 'strerror', error)})", str(path)) from None
    if not isinstance(tree, dict):
        raise SettingsError(
            "holds no mapping",
            str(path),
            "A recipe has sections such as corpus and encoder, a search space has parameters",
        )
    return tree
