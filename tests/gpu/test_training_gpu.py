"""Training on a GPU: losses, gradients and index of the CPU, and a whole run with trainer and pool on one GPU."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import faiss
import numpy as np
import pytest
import ray
import torch
from pool_faults import nothing_is_left
from tiny import make_model, make_sentences

from hncse_ray.cluster import train
from hncse_ray.config import OBJECTIVES, Settings, load_settings
from hncse_ray.encoder import load_encoder
from hncse_ray.negatives import IndexVersion, plan_index
from hncse_ray.reporting import Reporters
from hncse_ray.training.checks import prepare
from hncse_ray.training.host_copy import HostCopier
from hncse_ray.training.model_flops import peak_of
from hncse_ray.training.objective import Objective
from hncse_ray.training.shard import build_shard
from hncse_ray.training.step import LocalBatch, StepContext, StepNegatives, train_step

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
SENTENCES = make_sentences(48, seed=11)
CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)


@pytest.fixture(scope="module")
def still_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Without dropout, whose masks differ from device to device."""
    return make_model(tmp_path_factory.mktemp("still"), dropout=0.0)


def one_step(
    model: Path, device: torch.device, *, objective: str, use: str = "none", precision: str = "fp32", chunk: int | None
) -> tuple[float, torch.Tensor]:
    """The loss of one step and the gradient of all weights."""
    tree = {
        "corpus": {"source": "python-docs"},
        "encoder": {"model": str(model), "pooling": "mean", "precision": precision},
        "objective": {"name": objective} | ({"buffer_size": 16, "group_size": 4} if "smoothing" in objective else {}),
    }
    settings = load_settings(tree)
    encoder = load_encoder(model, settings.encoder, device=device)
    loss = Objective(settings.objective, dimension=encoder.dimension, device=device)
    rows = encoder.tokenize(SENTENCES)
    mask_Bm = np.ones((16, 2), dtype=bool)
    mask_Bm[3] = False
    generator = np.random.default_rng(0)
    stored_BmD = generator.standard_normal((16, 2, encoder.dimension)).astype(np.float32)
    stored_BmD /= np.linalg.norm(stored_BmD, axis=-1, keepdims=True)
    fresh = [[rows[16 + 2 * i] if mask_Bm[i, 0] else None, rows[17 + 2 * i] if i != 3 else None] for i in range(16)]
    negatives = {
        "none": None,
        "stored": StepNegatives(mask_Bm, stored_BmD, None),
        "fresh": StepNegatives(mask_Bm, None, fresh),
    }[use]
    optimizer = torch.optim.SGD([p for p in encoder.parameters() if p.requires_grad], lr=0.0)
    context = StepContext(objective=loss, seed=1, step=0, total_steps=10, chunk_size=chunk)
    batch = LocalBatch(0, rows[:16], (16,), negatives)
    metrics, _ = train_step(encoder, optimizer, [batch], context, max_grad_norm=1e9)
    gradient = torch.cat([p.grad.flatten().float().cpu() for p in encoder.parameters() if p.grad is not None])
    return float(metrics["loss"]), gradient


@pytest.mark.parametrize("chunk", [None, 5])
@pytest.mark.parametrize("use", ["none", "stored", "fresh"])
@pytest.mark.parametrize("objective", sorted(set(OBJECTIVES) - {"hard_negative_mixing", "hybrid"}))
def test_a_step_has_the_loss_and_the_gradient_of_the_cpu(
    still_model: Path, objective: str, use: str, chunk: int | None
) -> None:
    if objective == "instance_smoothing" and use == "fresh":
        pytest.skip("its groups are stored vectors")
    (loss, gradient), (loss_cpu, gradient_cpu) = (
        one_step(still_model, device, objective=objective, use=use, chunk=chunk) for device in (GPU, CPU)
    )
    assert loss == pytest.approx(loss_cpu, rel=1e-4)
    assert float((gradient - gradient_cpu).norm() / gradient_cpu.norm()) < 1e-3


@pytest.mark.parametrize("objective", ["hard_negative_mixing", "hybrid"])
def test_mixes_of_other_pairs_cost_about_the_same(still_model: Path, objective: str) -> None:
    """Pairs are drawn by the device's own generator, so only the size of the loss can be compared."""
    losses = [one_step(still_model, device, objective=objective, use="stored", chunk=None)[0] for device in (GPU, CPU)]
    assert losses[0] == pytest.approx(losses[1], rel=0.05)


def test_a_copy_to_the_host_is_of_before_the_step_that_follows_it() -> None:
    """As large as the weights of a model of 400 million; the host goes on at once, the step of the device waits."""
    weight = torch.nn.Parameter(torch.zeros(400_000_000, device=GPU))
    optimizer = torch.optim.SGD([weight], lr=1.0)
    copier = HostCopier(optimizer)
    weight.grad = torch.full_like(weight, -1.0)
    for step in range(4):
        copies = [copier.copy({"weight": weight.detach()}, rounded=rounded) for rounded in ((), ("weight",))]
        optimizer.step()
        for copy in copies:
            found = copy.wait()["weight"]
            assert found.is_pinned() and torch.stack(torch.aminmax(found)).tolist() == [step, step]


def test_bf16_is_close_to_fp32(still_model: Path) -> None:
    (half, half_gradient), (whole, gradient) = (
        one_step(still_model, GPU, objective="info_nce", use="stored", precision=precision, chunk=None)
        for precision in ("bf16", "fp32")
    )
    assert half == pytest.approx(whole, rel=0.05)
    assert torch.nn.functional.cosine_similarity(half_gradient, gradient, dim=0) > 0.9


def run_settings(small_run: dict[str, Any], **sections: dict[str, Any]) -> Settings:
    tree = {name: dict(section) for name, section in small_run.items()}
    tree["corpus"]["min_words"] = 1
    for name, section in sections.items():
        tree[name] = tree.get(name, {}) | section
    return Settings.model_validate(tree)


@pytest.mark.parametrize("kind", ["flat", "exact_torch"])
def test_a_shard_on_a_gpu_finds_what_one_on_the_cpu_finds(small_run: dict[str, Any], kind: str) -> None:
    if kind == "flat" and not hasattr(faiss, "StandardGpuResources"):
        pytest.skip("this faiss has no GPU support")
    settings = run_settings(small_run, negatives={"source": "pool", "encode_batch_size": 64})
    encoder = load_encoder(settings.encoder.model, settings.encoder)
    corpus = prepare(settings, encoder, Reporters([]))
    version, answers = IndexVersion(0, "weights", corpus.digest, len(corpus)), []
    for device in (GPU, CPU):
        on_gpu = device.type == "cuda"
        plan = plan_index(kind, rows=len(corpus), dimension=encoder.dimension, memory_bytes=None, on_gpu=on_gpu)
        shard = build_shard(settings.negatives, settings.encoder, corpus, plan=plan, device=device)
        shard.build(version, {name: tensor.numpy() for name, tensor in encoder.weights().items()})
        queries = shard.vectors(version, np.arange(40))
        answers.append(shard.search(version, queries, k=8))
    (scores, ids), (scores_cpu, ids_cpu) = answers
    np.testing.assert_allclose(scores, scores_cpu, atol=2e-3)  # kept in float16
    shared = [len(set(a) & set(b)) for a, b in zip(ids, ids_cpu, strict=True)]
    assert np.mean(shared) > 7 and (ids[:, 0] == np.arange(40)).mean() > 0.9


class TestOneGpuForBoth:
    @pytest.fixture(scope="class", autouse=True)
    def session(self) -> Iterator[None]:
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.2")
            patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
            ray.init(address="local", num_gpus=1, include_dashboard=False, logging_level=logging.ERROR)
            yield
            ray.shutdown()

    @pytest.mark.parametrize("use", ["stored", "fresh"])
    @pytest.mark.parametrize("index", ["flat", "exact_torch"])
    def test_a_run_trains_beside_its_pool(self, small_run: dict[str, Any], index: str, use: str) -> None:
        if index == "flat" and not hasattr(faiss, "StandardGpuResources"):
            pytest.skip("this faiss has no GPU support")
        settings = run_settings(
            small_run,
            encoder={"precision": "auto"},
            negatives={"source": "pool", "use": use, "index": index, "num_shards": 2, "gpus_per_shard": 0.2,
                       "candidates": 16, "max_score": None, "refresh": "sync", "refresh_every_steps": 6},
            cluster={"use_gpu": True, "gpus_per_worker": 0.6},
        )  # fmt: skip
        result = train(settings)
        assert result.steps == 12
        lines = [json.loads(line) for line in (Path(settings.run_dir) / "metrics.jsonl").read_text().splitlines()]
        steps = [line for line in lines if "loss" in line]
        assert all(np.isfinite(line["loss"]) for line in steps)
        if peak_of(torch.cuda.get_device_name()) is not None:
            assert all(0 < line["model_flops_utilisation"] < 1 for line in steps)
        assert all(line["negatives/shards_alive"] == 2 and line["negatives/missing"] == 0 for line in steps)
        assert "cuda" in (Path(settings.run_dir) / "log.txt").read_text()
        vectors = load_encoder(result.model).encode(SENTENCES)
        assert np.isfinite(vectors).all()
        assert nothing_is_left()
        assert ray.available_resources().get("GPU") == pytest.approx(1.0)
