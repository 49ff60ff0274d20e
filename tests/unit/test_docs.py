"""What the documents say: every command in them parses, every setting exists, and so does every picture."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer

from hncse_ray.cli import app
from hncse_ray.config import load_settings
from hncse_ray.config.explain import setting_paths
from hncse_ray.tuning import load_sweep

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "benchmarks/README.md"]
PAGES += [*sorted((ROOT / "docs").glob("*.md")), *sorted((ROOT / "examples").rglob("*.md"))]
FENCED, INLINE = re.compile(r"^```\w*\n(.*?)^```", re.S | re.M), re.compile(r"`([^`\n]+)`")
COMMANDS = typer.main.get_command(app)


def commands(text: str) -> Iterator[list[str]]:
    """Yield the words behind ``hncse`` of each command in fenced blocks and in code within lines."""
    blocks = FENCED.findall(text)
    inline = [code for code in INLINE.findall(FENCED.sub("", text)) if code.startswith("hncse ")]
    for line in [*"\n".join(blocks).replace("\\\n", " ").splitlines(), *inline]:
        found = re.match(r"(?:!|\.venv/bin/)?hncse (.*)", line.strip())
        if found:
            words = shlex.split(re.sub(r"\s[|>].*", "", found[1]), comments=True)
            if words[1:2] == ["..."]:  # some recipe
                words[1] = "RECIPE"
            yield [word for word in words if word not in ("...", "[KEY=VALUE]...")]


ALL = [
    (page, words)
    for page in PAGES
    for words in commands(page.read_text(encoding="utf-8"))
    if "COMMAND" not in words  # told of in general
]


def parsed(words: list[str]) -> tuple[str, dict[str, Any]]:
    """Return the command's name and its arguments; of a name alone, that there is such a command."""
    command: Any = COMMANDS
    path: list[str] = []
    while hasattr(command, "commands") and words and not words[0].startswith("-"):
        command, path, words = command.commands[words[0]], [*path, words[0]], words[1:]
    if not words and len(path) == 1 or words in (["--help"], ["--version"]):
        return " ".join(path), {}
    return " ".join(path), command.make_context(path[-1], words).params


@pytest.mark.parametrize(("page", "words"), ALL, ids=[f"{page.name}-{' '.join(words)[:40]}" for page, words in ALL])
def test_a_command_parses(page: Path, words: list[str]) -> None:
    name, facts = parsed(["2" if word == "N" else word for word in words])
    if name == "submit" and facts:
        name, facts = parsed([facts["job"], *facts["args"]])
    if name not in ("train", "prepare", "tune") or not facts or facts.get("resume") is not None:
        return
    overrides = [each for each in facts["overrides"] or () if each != "KEY=VALUE"]
    recipe, own = facts["recipe"], any(each.startswith("corpus.path=FOLDER") for each in overrides)
    if recipe.isupper() or recipe.endswith(".yaml"):  # some recipe: one of documents, if the command names any
        recipe = "adapt" if own else "quickstart"
    if name == "tune":
        space = facts["space"]
        load_sweep(recipe, "hncse_full" if space.isupper() else space, overrides, trials=2)
    else:
        load_settings(recipe, overrides)


def test_the_commands_of_the_notebook_and_many_more_were_looked_at() -> None:
    assert len(ALL) > 80
    with pytest.raises(Exception, match="No such option"):
        parsed(["train", "adapt", "--fast"])


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_a_setting_that_is_named_exists(page: Path) -> None:
    known = set(setting_paths())
    sections = {path.partition(".")[0] for path in known}
    codes = INLINE.findall(FENCED.sub("", page.read_text(encoding="utf-8")))
    named = {found[1] for code in codes for found in re.finditer(r"(?:^|\s)([a-z_]+\.[a-z_.]+?)(?==|$|\s)", code)}
    own = {path for path in named if path.partition(".")[0] in sections and not path.startswith("objective.settings.")}
    free = ("cluster.trainer_labels.", "cluster.pool_labels.", "encoder.prompts.")
    endings = (".py", ".yaml", ".md", ".json", ".jsonl", ".txt")
    missing = [p for p in own - known if not p.startswith(free) and not p.endswith(endings)]
    assert missing == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_a_picture_that_is_shown_exists_and_is_small(page: Path) -> None:
    for path in re.findall(r"!\[[^\]]+\]\(([^)]+)\)", page.read_text(encoding="utf-8")):
        assert (page.parent / path).stat().st_size < 200_000, path


def test_the_site_has_every_page() -> None:
    named = set(re.findall(r"[\w-]+\.md", (ROOT / "mkdocs.yml").read_text(encoding="utf-8")))
    assert named == {page.name for page in (ROOT / "docs").glob("*.md")} | {"measured.md"}


def test_the_messages_of_the_troubleshooting_page_are_said() -> None:
    source = "\n".join(path.read_text(encoding="utf-8") for path in (ROOT / "hncse_ray").rglob("*.py"))
    source = re.sub(r'"\s*f?"', "", source)  # a text that goes on in the next line
    page = (ROOT / "docs/troubleshooting.md").read_text(encoding="utf-8")
    told = [code for row in re.findall(r"^\|([^|]*`[^|]*)\|", page, re.M) for code in INLINE.findall(row)]
    assert len(told) > 25
    assert [text for text in told if text not in source and text not in set(setting_paths())] == []
