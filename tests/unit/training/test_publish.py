"""Weights are handed to a source beside training, as they were, and no larger than they must be."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from families import make_family
from negative_runs import FolderStore, carry_out, negatives_settings, prepared
from safetensors.torch import load_file

from hncse_ray.config import EncoderSettings
from hncse_ray.encoder import SentenceEncoder, load_encoder
from hncse_ray.negatives import SourceUnavailable
from hncse_ray.reporting import Event
from hncse_ray.reporting.events import StepsLogged
from hncse_ray.training.host_copy import HostCopier
from hncse_ray.training.publish import Publisher, from_arrays, to_arrays

Tree = dict[str, Any]
TEXTS = [f"The {n} cats of the house sleep {'long ' * n}." for n in range(6)]


class Elsewhere:
    """A source that makes its versions elsewhere, and answers a publication when it is let."""

    builds_elsewhere = True

    def __init__(self, *answers: bool | Exception) -> None:
        self.answers, self.let = list(answers), threading.Event()
        self.got: list[tuple[int, str, dict[str, np.ndarray]]] = []

    def publish(self, weights: dict[str, np.ndarray], *, step: int, key: str) -> bool:
        assert self.let.wait(60)
        self.got.append((step, key, weights))
        answer = self.answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return answer


def test_steps_are_taken_while_weights_of_one_before_are_on_their_way(tree: Tree, tmp_path: Path) -> None:
    settings = negatives_settings(
        tree, "negatives.refresh=async", "negatives.refresh_every_steps=4", "train.checkpoint_every_steps=4"
    )
    run, three_later = prepared(settings), threading.Event()
    run.source.builds_elsewhere = True
    in_time: list[bool] = []

    def before(method: str, number: int) -> None:
        if method == "publish" and number == 1:
            in_time.append(three_later.wait(60))

    def also(event: Event) -> None:
        if isinstance(event, StepsLogged) and event.step == 7:
            three_later.set()

    run.source.before = before
    carry_out(settings, tmp_path, run=run, also=also)
    assert run.finished is not None and in_time == [True]
    kept = load_file(FolderStore(tmp_path).checkpoint(4) / "encoder.safetensors")
    published = run.source.published[4]
    assert all(np.array_equal(published[name], kept[name].numpy()) for name in kept)


def test_a_publication_is_heard_of_once_and_a_refused_or_failed_one_does_not_count() -> None:
    source = Elsewhere(True, False, SourceUnavailable("away"), True)
    publisher, weights = Publisher(source), {"a": torch.arange(3.0)}  # type: ignore[arg-type]
    publisher.begin(lambda: weights, step=0)
    assert publisher.hear(wait=False) is None and publisher.under_way and publisher.step == 0
    source.let.set()
    assert publisher.hear(wait=True) is True and publisher.hear(wait=True) is None
    publisher.begin(lambda: weights, step=5)
    assert publisher.step == 5 and publisher.hear(wait=True) is False and publisher.step == 0
    publisher.begin(lambda: weights, step=6)
    with pytest.raises(SourceUnavailable, match="away"):
        publisher.hear(wait=True)
    assert publisher.step == 0 and not publisher.under_way
    publisher.begin(lambda: weights, step=7, key="seven")
    assert publisher.hear(wait=True) and publisher.step == 7
    keys = [key for _, key, _ in source.got]
    assert keys[-1] == "seven" and len(set(keys)) == 4
    publisher.close()


@pytest.mark.parametrize(("family", "lora"), [("bert", None), ("qwen3", {"r": 2, "alpha": 8})])
def test_what_is_rounded_changes_no_vector_of_a_run_in_bf16(tmp_path: Path, family: str, lora: Any) -> None:
    folder = make_family(family, tmp_path / "base")

    def build(precision: Any) -> SentenceEncoder:
        settings = EncoderSettings(model=str(folder), precision=precision, head="tanh", lora=lora)
        encoder = load_encoder(folder, settings, seed=0)
        encoder.keep_head()
        encoder.inference_autocast = encoder.autocast
        return encoder

    encoder, copier = build("bf16"), HostCopier(torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))]))
    with torch.no_grad():
        for value in encoder.trained().values():
            value += 0.02 * torch.randn(value.shape, generator=torch.Generator().manual_seed(1))
    rounded = encoder.seen_rounded()
    copies = copier.copy(encoder.trained(), rounded=rounded).wait()
    whole = encoder.weights()
    assert {name for name in whole if not torch.equal(copies[name].float(), whole[name])} == rounded & whole.keys()
    assert rounded & whole.keys() and not any("head" in name or "norm" in name.lower() for name in rounded)
    shard = build("bf16")
    shard.load_weights(from_arrays(to_arrays(copies)))
    np.testing.assert_array_equal(shard.encode(TEXTS), encoder.encode(TEXTS))
    assert build("fp32").seen_rounded() == set()


def test_a_copy_is_of_before_the_step_that_follows_it() -> None:
    """Large enough that the step would overtake it."""
    weight = torch.nn.Parameter(torch.zeros(20_000_000))
    optimizer = torch.optim.SGD([weight], lr=1.0)
    copier = HostCopier(optimizer)
    weight.grad = torch.full_like(weight, -1.0)
    for step in range(3):
        copy = copier.copy({"weight": weight.detach()})
        optimizer.step()
        assert torch.stack(torch.aminmax(copy.wait()["weight"])).tolist() == [step, step]
