"""The index on a GPU: the same answers as on the CPU, up to the fp16 in which it is kept."""

from __future__ import annotations

import faiss
import numpy as np
import pytest
import torch

from hncse_ray.negatives import plan_index
from hncse_ray.negatives.index import new_index

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
ROWS, DIMENSION, K = 5000, 128, 20


def unit(rows: int, seed: int) -> np.ndarray:
    vectors = np.random.default_rng(seed).standard_normal((rows, DIMENSION), dtype=np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    return vectors.astype(np.float16).astype(np.float32)  # what fp16 can hold, so that answers can be compared


def search(kind: str, device: str, *, nprobe: int = 10_000) -> tuple[np.ndarray, np.ndarray]:
    on_gpu = device == "cuda"
    plan = plan_index(kind, rows=ROWS, dimension=DIMENSION, memory_bytes=None, nprobe=nprobe, on_gpu=on_gpu)
    index = new_index(plan, device=torch.device(device))
    order, vectors = np.random.default_rng(1).permutation(ROWS), unit(ROWS, 0)
    for start in range(0, ROWS, 777):
        rows = order[start : start + 777]
        index.put(rows, vectors[rows])
    index.finish()
    np.testing.assert_allclose(index.vectors(order[:5]), vectors[order[:5]], atol=1e-3)
    return index.search(unit(300, 2), K, threads=2)


@pytest.mark.parametrize("kind", ["flat", "exact_torch"])
def test_the_exact_kinds_answer_as_on_the_cpu(kind: str) -> None:
    if kind == "flat" and not hasattr(faiss, "StandardGpuResources"):
        pytest.skip("this faiss has no GPU support")
    scores, rows = search(kind, "cuda")
    on_cpu_scores, on_cpu_rows = search("flat", "cpu")
    np.testing.assert_array_equal(rows, on_cpu_rows)
    np.testing.assert_allclose(scores, on_cpu_scores, atol=1e-6)


def test_ivf_flat_over_all_lists_finds_nearly_all() -> None:
    _, rows = search("ivf_flat", "cuda")
    _, exact = search("flat", "cpu")
    found = np.mean([len(set(a) & set(b)) / K for a, b in zip(rows, exact, strict=True)])
    assert found > 0.98
