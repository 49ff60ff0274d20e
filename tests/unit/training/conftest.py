"""Runs of the tiny model on one thread, and the corpus of a module's runs."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch

Tree = dict[str, Any]


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """The model is too small for threads to help, and on a busy machine they hinder."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def cache_dir(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(tmp_path_factory.mktemp("cache"))


@pytest.fixture
def tree(small_run: Tree, cache_dir: str) -> Tree:
    """The small run, its corpus prepared once for the whole module."""
    small_run["corpus"]["cache_dir"] = cache_dir
    return small_run
