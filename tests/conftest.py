"""Fixtures that several packages share: a tiny real encoder, sentences, and the settings of a small run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from tiny import make_model, make_sentences, small_settings
from waits import seconds, slowness
from xdist.scheduler import LoadScopeScheduling


def pytest_configure() -> None:
    slowness()  # before anything else runs, and for xdist's workers too


class TurnsScheduling(LoadScopeScheduling):
    """With several workers, those of tests/ray take turns on one, and so do those of tests/e2e; other files stay whole.

    Not xdist's groups: xdist 3.8 writes them into an attribute that pytest 9.2 does not read.
    """

    def _split_scope(self, nodeid: str) -> str:
        path = nodeid.partition("::")[0]
        return next((kind for kind in ("tests/ray/", "tests/e2e/") if path.startswith(kind)), path)


def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> TurnsScheduling:
    return TurnsScheduling(config, log)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Stretch the time limit of every test."""
    for item in items:
        marked = item.get_closest_marker("timeout")
        limit = marked.args[0] if marked else config.getoption("timeout") or config.getini("timeout")
        item.add_marker(pytest.mark.timeout(seconds(float(limit))), append=False)


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="session")
def corpus_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "sentences.txt"
    path.write_text("\n".join(make_sentences(300)) + "\n", encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def pairs_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Pairs of a sentence and every third of its words: neither trivial nor hopeless for the tiny model."""
    path = tmp_path_factory.mktemp("pairs") / "pairs.tsv"
    sentences = make_sentences(40, seed=7)
    path.write_text("".join(f"{s}\t{' '.join(s.split()[::3])}\n" for s in sentences), encoding="utf-8")
    return path


@pytest.fixture
def small_run(tiny_model: Path, corpus_file: Path, pairs_file: Path, tmp_path: Path) -> dict[str, object]:
    """Settings of a run that takes a second, for a test to change."""
    return small_settings(tiny_model, corpus_file, pairs_file, tmp_path) | {"cluster": {"cpus_per_worker": 1}}
