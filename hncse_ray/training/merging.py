"""Weights between those of the base and the trained ones (WiSE-FT, Wortsman et al. 2021, arXiv 2109.01903)."""

from __future__ import annotations

from hncse_ray.training.checkpoint import Weights


def merged(base: Weights, trained: Weights, share: float) -> Weights:
    """Return ``share`` of the trained weights and the rest of the base's; at 0 and 1 these themselves.

    Of adapters the difference that they make to a weight is B A, and one of the two is 0 in the base: B of linear
    layers, A of embeddings. The share of that one is the share of the difference, and the other stays as trained.
    """
    if share in (0.0, 1.0):
        return trained if share else base
    found = dict(trained)
    for name, value in trained.items():
        if value.is_floating_point() and "lora_A" not in name and "lora_embedding_B" not in name:
            found[name] = base[name].lerp(value, share)
    return found
