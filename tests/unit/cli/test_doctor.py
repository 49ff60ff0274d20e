"""`hncse doctor`: a line for each thing that is needed, what mends it, and a status that a script can use."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from invoke import hncse

from hncse_ray.recipe import shipped_folder


def examined(result: Any) -> dict[str, dict[str, Any]]:
    return {check["name"]: check for check in json.loads(result.stdout.splitlines()[-1])["checks"]}


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HNCSE_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("RAY_ADDRESS", raising=False)


def test_a_machine_that_has_all_is_said_to(offline: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    result = hncse("doctor", "--json")
    found = examined(result)
    assert result.exit_code == 0 and json.loads(result.stdout)["ok"] is True
    import faiss
    import ray
    import torch

    assert found["torch"]["found"].startswith(torch.__version__)
    assert found["faiss"]["found"].startswith(faiss.__version__)
    assert found["Ray"]["found"] == ray.__version__
    assert found["runs"]["found"].startswith(str(tmp_path / "runs"))
    assert found["cache"]["found"].startswith(str(tmp_path / "cache"))
    for name in ("Python", "GPU", "precision", "cores", "memory", "hub", "Ray cluster", "packages", "extra demo"):
        assert found[name]["status"] in ("ok", "warning", "missing")
    assert found["hub"]["status"] == "warning" and "HF_HUB_OFFLINE" in found["hub"]["mend"]
    for check in found.values():
        assert check["found"] and bool(check["mend"]) == (check["status"] != "ok"), check
    assert not list(tmp_path.iterdir())  # it only looks


def test_what_cannot_be_used_is_missing_with_what_mends_it(
    offline: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("HNCSE_CACHE", str(tmp_path / "file" / "cache"))
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:9")
    result = hncse("doctor", "--json")
    found = examined(result)
    assert result.exit_code == 1 and json.loads(result.stdout.splitlines()[-1])["ok"] is False
    assert found["cache"]["status"] == "missing" and "HNCSE_CACHE" in found["cache"]["mend"]
    assert found["Ray cluster"]["status"] == "missing" and "RAY_ADDRESS" in found["Ray cluster"]["mend"]
    shown = hncse("doctor")
    assert shown.exit_code == 1 and "Traceback" not in shown.output + shown.stderr


@pytest.mark.parametrize(("package", "essential"), [("faiss", False), ("ray", False), ("torch", True)])
def test_a_package_that_does_not_load_is_missing(offline: None, tmp_path: Path, package: str, essential: bool) -> None:
    (tmp_path / f"{package}.py").write_text("raise ImportError('libgomp.so.1: cannot open shared object file')\n")
    path = os.pathsep.join([str(tmp_path), str(shipped_folder("recipes").parent)])
    result = subprocess.run([sys.executable, "-m", "hncse_ray.cli", "doctor", "--json"], capture_output=True, text=True,
                            env=os.environ | {"PYTHONPATH": path}, cwd=tmp_path)  # fmt: skip
    assert result.returncode == int(essential), result.stderr
    check = examined(result)["Ray" if package == "ray" else package]
    assert (check["status"], check["essential"]) == ("missing", essential)
    assert "libgomp" in check["found"] and "pip install" in check["mend"]
