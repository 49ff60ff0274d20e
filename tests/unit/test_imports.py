"""What commands and processes of a run import: what only some of them need must not slow the others."""

from __future__ import annotations

import gc
import importlib
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from waits import seconds

import hncse_ray.encoder

# Slow to import, and each needed by some commands only. What sentence-transformers itself brings is not among them:
# torch, transformers, scikit-learn, datasets.
HEAVY = (
    "faiss", "matplotlib", "mlflow", "mteb", "optuna", "plotly", "ray", "ray.train", "ray.tune",
    "sentence_transformers", "tensorboardX", "torch", "wandb",
)  # fmt: skip

REPORT = f"import json, sys; print(json.dumps([name for name in {HEAVY!r} if name in sys.modules]))"
COMMAND = """
import sys
from hncse_ray.cli import app
try:
    app(sys.argv[1:])
except SystemExit as left:
    assert not left.code, left.code
"""

INTERRUPTED = """
import signal, sys
class Interrupt:
    def find_spec(name, *others):
        if name == "hncse_ray.cli.submit":
            signal.raise_signal(signal.SIGINT)
sys.meta_path.insert(0, Interrupt)
import hncse_ray.cli
"""


def imported(code: str, *arguments: object) -> set[str]:
    done = subprocess.run(
        [sys.executable, "-c", f"{code}\n{REPORT}", *map(str, arguments)],
        capture_output=True, text=True, timeout=seconds(120), env=os.environ | {"HF_HUB_OFFLINE": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return set(json.loads(done.stdout.splitlines()[-1]))


@pytest.mark.parametrize("arguments", [["--help"], ["train", "--help"], ["--version"]])
def test_help_imports_nothing_heavy(arguments: list[str]) -> None:
    assert imported(COMMAND, *arguments) == set()


def test_ctrl_c_while_the_commands_are_imported_shows_no_traceback() -> None:
    done = subprocess.run([sys.executable, "-c", INTERRUPTED], capture_output=True, text=True, timeout=seconds(60))
    assert (done.returncode, done.stdout, done.stderr) == (-signal.SIGINT, "", "")


def test_what_the_package_offers_is_listed_before_it_is_imported() -> None:
    code = "import hncse_ray, sys; print(set(hncse_ray.__all__) <= set(dir(hncse_ray)), 'pydantic' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=seconds(60))
    assert done.stdout == "True False\n", done.stderr


def test_encode_imports_the_encoder_alone(tiny_model: Path, corpus_file: Path, tmp_path: Path) -> None:
    found = imported(COMMAND, "encode", tiny_model, corpus_file, "--out", tmp_path / "v.npy")
    assert found == {"sentence_transformers", "torch"}


def test_one_worker_on_one_machine_imports_no_ray_and_no_faiss(small_run: dict[str, object], tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(small_run))
    found = imported(COMMAND, "train", tmp_path / "recipe.yaml")
    assert found == {"plotly", "sentence_transformers", "tensorboardX", "torch"}  # the first for its page


@pytest.mark.parametrize("engine", ["ray", "local"])
def test_a_run_is_claimed_and_refused_before_anything_heavy_is_imported(
    small_run: dict[str, object], tmp_path: Path, engine: str
) -> None:
    small_run["cluster"] = {"engine": engine}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(small_run))
    taken = tmp_path / "runs" / "small"
    taken.mkdir(parents=True)
    (taken / "something").touch()
    code = COMMAND.replace("not left.code", "left.code == 2")
    assert imported(code, "train", tmp_path / "recipe.yaml") == set()


@pytest.mark.parametrize(
    ("process", "allowed"),
    [
        ("hncse_ray.cluster.worker", {"ray", "ray.train", "sentence_transformers", "torch"}),
        ("hncse_ray.cluster.shard_actor", set()),  # the coordinator imports it, to look its actors up by name
        ("hncse_ray.cluster.coordinator", {"ray"}),
        ("hncse_ray.cluster.channel", {"ray"}),
    ],
)
def test_a_process_of_a_run_imports_what_it_uses(process: str, allowed: set[str]) -> None:
    assert imported(f"import {process}") == allowed


@pytest.mark.parametrize("collects", [True, False])
def test_the_encoder_leaves_the_collection_of_garbage_as_it_was(collects: bool) -> None:
    try:
        if not collects:
            gc.disable()
        importlib.reload(hncse_ray.encoder)
        assert gc.isenabled() is collects
        assert gc.get_freeze_count() == 0  # what was garbage before can still be collected
    finally:
        gc.enable()
