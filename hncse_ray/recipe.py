"""Finding recipes and search spaces, by path or by the name of one that comes with the package; reading them."""

from __future__ import annotations

import difflib
from pathlib import Path
from typing import Any

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
    path = Path(name)
    if path.is_file():
        return path
    if path.is_dir():
        raise SettingsError(f"is a directory, not a {noun}", str(name), "Name a YAML file")
    names = sorted(p.stem for p in shipped_folder(kind).glob("*.yaml"))
    if path.name in names and len(path.parts) == 1:
        return shipped_folder(kind) / f"{path.name}.yaml"
    near = difflib.get_close_matches(path.stem, names, n=1, cutoff=0.4)
    hint = f"Did you mean {near[0]!r}? " if near else ""
    raise SettingsError(f"no such {noun}", str(name), f"{hint}Known by name: {', '.join(names)}")


class _UniqueKeyLoader(yaml.SafeLoader):
    """YAML that refuses a key given twice, where plain YAML would silently keep the last."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        for key in keys:
            if keys.count(key) > 1:
                raise yaml.MarkedYAMLError(problem=f"key {key!r} is given twice", problem_mark=node.start_mark)
        return super().construct_mapping(node, deep)


def read_yaml(path: Path) -> dict[str, Any]:
    """Read a recipe or a search space as a tree of plain values.

    Raises:
        SettingsError: it cannot be read, is not valid YAML, gives a key twice or holds no mapping.
    """
    try:
        tree = yaml.load(path.read_text(encoding="utf-8"), Loader=_UniqueKeyLoader)
    except (OSError, UnicodeDecodeError) as error:
        raise SettingsError(f"cannot be read ({error})", str(path)) from None
    except yaml.YAMLError as error:
        raise SettingsError(f"is not valid YAML ({' '.join(str(error).split())})", str(path)) from None
    if not isinstance(tree, dict):
        raise SettingsError("holds no mapping", str(path), "A recipe has sections: corpus, encoder, ...")
    return tree
