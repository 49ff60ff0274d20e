"""Imports run downward only; the contracts are in pyproject.toml."""

from __future__ import annotations

import ast
import importlib
import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
from waits import seconds

ROOT = Path(__file__).parents[2]


@pytest.mark.skipif(not (ROOT / "pyproject.toml").is_file(), reason="not a checkout")
def test_the_contracts_of_the_house_are_kept() -> None:
    command = "import sys; from importlinter.cli import lint_imports_command; sys.exit(lint_imports_command())"
    done = subprocess.run(
        [sys.executable, "-c", command, "--no-cache"], cwd=ROOT, capture_output=True, text=True, timeout=seconds(120)
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "kept, 0 broken" in done.stdout


@pytest.mark.skipif(not (ROOT / "docs").is_dir(), reason="not a checkout")
def test_what_is_not_public_of_ray_is_listed() -> None:
    """A new Ray may move any of it: the list in docs/cluster.md says what each is for and what was looked for first."""
    private = re.compile(r"(^|\.)_|\.core\.generated|\.autoscaler\.|\.experimental\.internal")
    used = set()
    for path in (ROOT / "hncse_ray").rglob("*.py"):
        for found in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(found, ast.ImportFrom) and (found.module or "").startswith("ray."):
                used |= {found.module} if private.search(found.module or "") else set()
    text = (ROOT / "docs" / "cluster.md").read_text(encoding="utf-8")
    section = text[text.index("## What is not public of Ray") :]
    listed = set(
        re.findall(r"`(ray\.[\w.]+)`", re.sub(r"(\w+)\(_grpc\)`", r"\1` `ray.core.generated.\1_grpc`", section))
    )
    assert used <= listed
    assert {name for name in listed if private.search(name)} <= used


@pytest.mark.skipif(not (ROOT / "benchmarks").is_dir(), reason="not a checkout")
def test_what_benchmarks_import_of_the_package_is_there() -> None:
    missing = []
    for path in sorted((ROOT / "benchmarks").glob("*.py")):
        for found in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(found, ast.ImportFrom) and (found.module or "").partition(".")[0] == "hncse_ray":
                module = importlib.import_module(str(found.module))
                missing += [
                    f"{path.name}: {found.module}.{name.name}"
                    for name in found.names
                    if not hasattr(module, name.name) and find_spec(f"{found.module}.{name.name}") is None
                ]
    assert not missing
