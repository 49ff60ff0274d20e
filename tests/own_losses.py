"""Objectives as users write them; imported by name in tests and in the processes that these start."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from hncse_ray.objectives import Share, info_nce

Result = tuple[Tensor, dict[str, Any]]


def noisy(
    z1: Tensor,
    z2: Tensor,
    negatives: Tensor | None = None,
    *,
    negatives_mask: Tensor | None = None,
    columns: str = "own",
    columns_mask: Tensor | None = None,
    batch_mask: Tensor | None = None,
    step: int,
    noise: float,
    temperature: float = 0.05,
) -> Result:
    """InfoNCE of positives with some noise, of which there is less at every step."""
    moved = torch.nn.functional.normalize(z2 + noise / (1 + step) * torch.randn_like(z2), dim=1)
    return info_nce(
        z1, moved, negatives, temperature=temperature, negatives_mask=negatives_mask, columns=columns,
        columns_mask=columns_mask, batch_mask=batch_mask,
    )  # fmt: skip


GIVEN: list[dict[str, Any]] = []


def remembers_what_it_is_given(
    z1: Tensor,
    z2: Tensor,
    negatives: Tensor,
    *,
    generator: torch.Generator,
    total_steps: int,
    x: int = 1,
    **others: Any,
) -> Result:
    """Keep the keywords of each call in :data:`GIVEN`."""
    found = {"negatives": negatives, "seed": generator.initial_seed(), "total_steps": total_steps, "x": x}
    GIVEN.append(found | others)
    return (z1 - z2).square().sum(), {"a_number": 2, "a_tensor": z1.sum()}


def takes_no_negatives(z1: Tensor, z2: Tensor) -> Result:
    """Alignment alone, and what keeps it from collapsing."""
    return (z1 - z2).square().sum(1).mean() + torch.pdist(z1).pow(2).mul(-2).exp().mean().log(), {}


def in_rows(z1: Tensor, z2: Tensor, *, share: Share, temperature: float = 0.05) -> Result:
    """InfoNCE in which a worker computes the rows of its own anchors."""
    columns = share.gather(z2)
    labels = torch.arange(share.start, share.start + len(z1))
    loss = torch.nn.functional.cross_entropy(z1 @ columns.T / temperature, labels, reduction="sum")
    return share.add(loss / len(columns)), {"rows": share.add(torch.tensor(float(len(z1))))}
