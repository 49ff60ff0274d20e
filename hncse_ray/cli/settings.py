"""``hncse settings``, ``hncse recipes``, ``hncse spaces``: what there is to choose from."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from hncse_ray.cli.app import JsonOption, SettingArgument, app, command
from hncse_ray.errors import SettingsError
from hncse_ray.recipe import read_yaml, shipped_folder

if TYPE_CHECKING:
    from hncse_ray.config.reference import SectionFacts, SettingFacts


@app.command()
def settings(
    name: SettingArgument = None,
    markdown: Annotated[bool, typer.Option("--markdown", help="Print docs/settings.md.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Look settings up: type, range, default, meaning, and which recipes set them; all, a section or one."""

    def run(console: Console) -> dict[str, Any]:
        from hncse_ray.config.reference import reference, reference_page

        if markdown:
            if name is not None or as_json:
                raise SettingsError("prints all settings, for people", "--markdown", "Give it alone")
            typer.echo(reference_page(), nl=False)
            return {}
        sections, one = _find(name) if name is not None else (list(reference()), False)
        for section in sections:
            _print_one(console, section.settings[0]) if one else _print_section(console, section)
        if not one:
            console.print("hncse settings KEY says which recipes set one", style="dim", highlight=False)
        return {"settings": [_facts(setting) for section in sections for setting in section.settings]}

    command(run, as_json)


@app.command()
def recipes(as_json: JsonOption = False) -> None:
    """List the recipes that come with hncse_ray."""

    def run(console: Console) -> dict[str, Any]:
        found = [{"name": file.name, "what": file.title, **_choices(file.tree)} for file in _shipped("recipes")]
        _print_files(console, "recipe", found, lambda file: "{objective}; {model}; {text}".format_map(file))
        console.print("hncse train RECIPE [KEY=VALUE]...", style="dim", highlight=False)
        return {"recipes": found}

    command(run, as_json)


@app.command()
def spaces(as_json: JsonOption = False) -> None:
    """List the search spaces that come with hncse_ray, for hncse tune."""

    def run(console: Console) -> dict[str, Any]:
        found = [{"name": file.name, "what": file.title, "varies": list(file.tree["parameters"])}
                 for file in _shipped("search_spaces")]  # fmt: skip
        _print_files(console, "space", found, lambda file: ", ".join(file["varies"]))
        console.print("hncse tune RECIPE --space SPACE", style="dim", highlight=False)
        return {"spaces": found}

    command(run, as_json)


@dataclass(frozen=True)
class _File:
    """A file that comes with the package: its name, the first sentence of its comment, what it holds."""

    name: str
    title: str
    tree: dict[str, Any]


@cache
def _shipped(kind: str) -> tuple[_File, ...]:
    def read(path: Path) -> _File:
        first = path.read_text(encoding="utf-8").partition("\n")[0]
        return _File(path.stem, first.removeprefix("#").strip(), read_yaml(path))

    return tuple(map(read, sorted(shipped_folder(kind).glob("*.yaml"))))


def _choices(tree: dict[str, Any]) -> dict[str, str]:
    from hncse_ray.config import load_settings

    chosen = load_settings(tree)
    return {"objective": chosen.objective.name, "model": chosen.encoder.model, "text": chosen.corpus.place}


def _find(name: str) -> tuple[list[SectionFacts], bool]:
    """Return the sections that a name means, and whether it means one setting, which is then alone in its section.

    Raises:
        SettingsError: it means none.
    """
    from hncse_ray.config.explain import meant
    from hncse_ray.config.reference import reference

    def named(path: str) -> list[SectionFacts]:
        if whole := [section for section in reference() if section.key == path or section.key.startswith(f"{path}.")]:
            return whole
        alone = [(section, setting) for section in reference() for setting in section.settings if setting.key == path]
        return [replace(section, settings=(setting,)) for section, setting in alone]

    found = named(name) or [section for path in meant(name) for section in named(path)]
    if not found:
        sections = ", ".join(section.key for section in reference())
        raise SettingsError("is neither a section nor a setting", name or repr(name), f"Sections are {sections}")
    return found, all(len(section.settings) == 1 for section in found)


def _print_section(console: Console, section: SectionFacts) -> None:
    from hncse_ray.config.reference import objective_papers

    table = Table(title=escape(section.key), caption=escape(section.meaning), title_justify="left",
                  caption_justify="left", show_lines=False, expand=True)  # fmt: skip
    table.add_column("setting", no_wrap=True)
    table.add_column("takes", ratio=2)
    table.add_column("default")
    table.add_column("meaning", ratio=4)
    for setting in section.settings:
        takes = f"{setting.type}; {setting.range}" if setting.range else setting.type
        table.add_row(
            *map(escape, (setting.key.removeprefix(f"{section.key}."), takes, setting.default, setting.meaning))
        )
    console.print(table)
    if section.key == "objective":
        for name, what in objective_papers().items():
            console.print(f"  {name}: {what}", markup=False, highlight=False)


def _print_one(console: Console, setting: SettingFacts) -> None:
    facts = _facts(setting)
    table = Table(title=escape(setting.key), show_header=False, title_justify="left")
    for label in ("meaning", "type", "range", "default"):
        if facts[label]:
            table.add_row(label, escape(facts[label]))
    if setting.objectives:
        table.add_row("known to", escape(", ".join(setting.objectives)))
    if called := facts["also_called"]:
        table.add_row("elsewhere", escape(", ".join(called)))
    for value in dict.fromkeys(facts["recipes"].values()):
        names = [recipe for recipe, its in facts["recipes"].items() if its == value]
        table.add_row(f"{escape(value)} in", escape(", ".join(names)))
    console.print(table)


def _facts(setting: SettingFacts) -> dict[str, Any]:
    """All that is known of a setting, with the recipes that set it."""
    from hncse_ray.config import read_setting
    from hncse_ray.config.reference import shown_value
    from hncse_ray.config.synonyms import SYNONYMS

    set_by = {}
    for file in _shipped("recipes"):
        node: Any = file.tree
        for part in setting.key.split("."):
            node = node.get(part) if isinstance(node, dict) else None
        if node is not None:
            set_by[file.name] = shown_value(read_setting(setting.key, node))
    return {**asdict(setting), "also_called": list(SYNONYMS.get(setting.key, ())), "recipes": set_by}


def _print_files(
    console: Console, kind: str, files: list[dict[str, Any]], details: Callable[[dict[str, Any]], str]
) -> None:
    table = Table()
    table.add_column(kind, no_wrap=True)
    table.add_column("what", overflow="fold")
    for file in files:
        table.add_row(file["name"], Text.assemble(file["what"], "\n", (details(file), "dim")))
    console.print(table)
