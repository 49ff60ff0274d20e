"""The encoding actor as a plain class: the vectors of the encoder, whatever was asked before."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny import make_model, make_sentences

from hncse_ray.cluster.encoding import EncodingActor, EncodingPool
from hncse_ray.config import EncoderSettings
from hncse_ray.encoder import load_encoder
from hncse_ray.errors import ModelError

MEAN, CLS = (EncoderSettings(model="x", pooling=pooling) for pooling in ("mean", "cls"))


@pytest.fixture(autouse=True)
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def test_it_holds_the_model_that_was_asked_for_last(tiny_model: Path, tmp_path: Path) -> None:
    other = make_model(tmp_path / "other", width=16)
    rows = load_encoder(tiny_model, MEAN).tokenize(make_sentences(7))
    actor = EncodingActor(threads=2)
    assert actor.ready() and torch.get_num_threads() == 2
    for model, settings in ((tiny_model, MEAN), (other, MEAN), (tiny_model, MEAN), (tiny_model, CLS)):
        expected = load_encoder(model, settings).encode_rows(rows)
        np.testing.assert_array_equal(actor.encode(str(model), settings, rows, None), expected)


def test_a_missing_model_is_said_before_ray_is_started(tmp_path: Path) -> None:
    with EncodingPool(2) as pool, pytest.raises(ModelError, match="no such model folder"):
        pool.open(str(tmp_path / "none"), MEAN)
