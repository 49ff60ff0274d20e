"""Matryoshka representation learning (Kusupati et al. 2022, arXiv 2205.13147): embeddings that may be cut short."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from hncse_ray.objectives import checks
from hncse_ray.objectives.similarity import as_metric, autocast_off, working_dtype

# The arguments of objectives that are embeddings as the views are.
_EMBEDDINGS = ("negatives", "neighbours", "buffer")


def matryoshka(
    objective: Callable[..., tuple[Any, ...]], *views: Tensor, dimensions: Sequence[int], **arguments: Any
) -> tuple[Any, ...]:
    """Mean of an objective over the whole embeddings and over their first entries, normalised again.

    For each width d, views and all other embeddings (`negatives`, `neighbours`, `buffer`) are cut to their first d
    entries and brought to unit norm, and the objective is computed from these alone: hardest candidates, mixes and
    smoothing groups are those of that width. The full width always takes part, first, and as it is. So the model
    can be used at each width (`truncate_dim` of sentence-transformers), at a small loss.

    Kusupati et al. 2022 (arXiv 2205.13147), equation 1, with equal weights. Theirs is a sum; a mean keeps the
    size of loss and gradient, so that learning rate and clipping mean what they did.

    Args:
        objective: takes embeddings and keywords; returns loss, metrics and maybe more.
        views: unit-norm rows [B, D], or negatives [B, m, D].
        dimensions: the widths, each from 1 to D; D itself may be left out.
        arguments: handed to the objective.

    Returns:
        What the objective returns at the full width, but with the mean loss, and with the metrics `loss_at_d` of
        each width d.

    Raises:
        ValueError: a width is out of its range.
    """
    D = views[0].shape[-1]
    results = []
    for width in _widths(dimensions, D):
        embeddings = {name: arguments[name] for name in _EMBEDDINGS if arguments.get(name) is not None}
        cut = {name: _cut(z, width) for name, z in embeddings.items()}
        results.append((width, objective(*(_cut(z, width) for z in views), **arguments | cut)))
    _, (_, metrics, *further) = results[0]
    of_widths = {f"loss_at_{width}": as_metric(result[0]) for width, result in results}
    return torch.stack([result[0] for _, result in results]).mean(), metrics | of_widths, *further


def _widths(dimensions: Sequence[int], full: int) -> list[int]:
    """The widths to train at, the full one first."""
    for width in dimensions:
        checks.check_at_least("dimensions", width, 1)
        if width > full:
            raise ValueError(f"dimensions has {width}; the embeddings have {full} entries")
    return [full, *sorted(set(dimensions) - {full}, reverse=True)]


def _cut(z: Tensor, width: int) -> Tensor:
    """The first entries of each row, unit norm; zero where they are zero, as rows of an unfilled buffer."""
    if width == z.shape[-1]:
        return z
    with autocast_off(z):
        return F.normalize(z[..., :width].to(working_dtype(z)), dim=-1)
