"""Encoding by actors on a real Ray: the scores of one process, and nothing left, however it ends."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import ray
import torch
from pool_faults import actors, kill
from tiny import make_model, make_sentences
from typer.testing import CliRunner
from waits import soon

from hncse_ray.cli import app
from hncse_ray.cluster.encoding import EncodingPool
from hncse_ray.config import EncoderSettings, load_settings
from hncse_ray.encoder import load_encoder
from hncse_ray.errors import ClusterError, ModelError
from hncse_ray.training.scoring import score_models

pytestmark = pytest.mark.timeout(600)
MEAN = EncoderSettings(model="x", pooling="mean")
TEXTS = make_sentences(50, seed=2)


@pytest.fixture(scope="module", autouse=True)
def session() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        ray.init(address="local", num_cpus=4, include_dashboard=False, logging_level=logging.ERROR, log_to_driver=False)
        yield
        ray.shutdown()


def nothing_is_left() -> bool:
    soon(lambda: not actors("EncodingActor"), within_s=20, what="end of the workers")
    return True


def test_scores_equal_those_of_one_process(tiny_model: Path, pairs_file: Path, tmp_path: Path) -> None:
    """Three actors of one thread against a process of two; a second model after the first."""
    other = make_model(tmp_path / "other", width=16)
    tree = {
        "corpus": {"source": "python-docs"},
        "encoder": {"pooling": "mean"},
        "evaluation": {"suites": ["pairs"], "metric": "pairs/mrr", "pairs_dev": str(pairs_file)},
    }
    settings = load_settings(tree)
    groups, told = [str(tiny_model), str(other)], []
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    alone = score_models(groups, ["pairs"], settings, settings.encoder, tell=lambda *facts: None)
    torch.set_num_threads(before)
    with EncodingPool(3) as pool:
        shared = score_models(
            groups,
            ["pairs"],
            settings,
            settings.encoder,
            tell=lambda *facts: told.append(facts),
            open_encoder=pool.open,
        )
        assert len(actors("EncodingActor")) == 3
        encoder = pool.open(str(tiny_model), MEAN)
        np.testing.assert_array_equal(
            encoder.encode(TEXTS, batch_size=4), load_encoder(tiny_model, MEAN).encode(TEXTS, batch_size=4)
        )
        assert encoder.encode([]).shape == (0, 32)
    for one, two in zip(alone.groups, shared.groups, strict=True):
        assert two.runs[0]["dev"] == pytest.approx(one.runs[0]["dev"], rel=0, abs=1e-9)
    assert alone.groups[0].runs != alone.groups[1].runs
    assert any(done == total for _, done, total in told)
    assert nothing_is_left()


@pytest.mark.slow
def test_the_command_with_workers_prints_what_it_prints_without(tiny_model: Path, pairs_file: Path) -> None:
    command = [
        "evaluate",
        str(tiny_model),
        "--suite",
        "pairs",
        "--pairs",
        str(pairs_file),
        "--pooling",
        "mean",
        "--json",
    ]
    printed = []
    for workers in ([], ["--workers", "2"]):
        done = CliRunner().invoke(app, [*command, *workers])
        assert done.exit_code == 0, done.stderr
        printed.append(json.loads(done.stdout.splitlines()[-1]))
    assert printed[0]["dev"] == pytest.approx(printed[1]["dev"], rel=0, abs=1e-9)
    assert nothing_is_left()


@pytest.mark.slow
def test_nothing_is_left_of_what_is_interrupted(tiny_model: Path) -> None:
    with pytest.raises(KeyboardInterrupt), EncodingPool(2) as pool:
        encoder = pool.open(str(tiny_model), MEAN)

        def interrupt(done: int, total: int) -> None:
            raise KeyboardInterrupt

        encoder.encode(TEXTS, batch_size=4, progress=interrupt)
    assert nothing_is_left() and ray.is_initialized()


def test_a_model_that_the_actors_do_not_find(tmp_path: Path) -> None:
    model = make_model(tmp_path / "model")
    with EncodingPool(1) as pool:
        encoder = pool.open(str(model), MEAN)
        model.rename(tmp_path / "elsewhere")
        with pytest.raises(ModelError, match="no such model folder"):
            encoder.encode(TEXTS)
    assert nothing_is_left()


@pytest.mark.slow
def test_a_lost_actor_ends_it_with_one_message(tiny_model: Path) -> None:
    with EncodingPool(2) as pool:
        encoder = pool.open(str(tiny_model), MEAN)
        kill(pool._actors[0])
        soon(lambda: len(actors("EncodingActor")) == 1, within_s=10, what="its end")
        with pytest.raises(ClusterError, match="a worker was lost"):
            encoder.encode(TEXTS, batch_size=4)
    assert nothing_is_left()


def test_more_workers_than_cpus(tiny_model: Path) -> None:
    with EncodingPool(5) as pool, pytest.raises(ClusterError, match="5 workers x 1 CPU = 5, but the cluster has 4"):
        pool.open(str(tiny_model), MEAN)
    assert nothing_is_left()
