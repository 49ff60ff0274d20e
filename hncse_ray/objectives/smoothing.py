"""Instance smoothing (IS-CSE, He et al. 2023, arXiv 2305.07424): positives averaged over their neighbours."""

import math

import torch
from torch import Tensor

from hncse_ray.objectives import checks
from hncse_ray.objectives.blocks import nearest
from hncse_ray.objectives.share import WHOLE, Share
from hncse_ray.objectives.similarity import (
    Metrics,
    as_metric,
    autocast_off,
    contrast,
    cross_entropy,
    means,
    normalise_or_keep,
    of_rows,
    shared_means,
    working_dtype,
)


def instance_smoothing(
    z1: Tensor,
    z2: Tensor,
    buffer: Tensor | None = None,
    *,
    temperature: float,
    group_size: int,
    attention_temperature: float,
    weight: float,
    neighbours: Tensor | None = None,
    neighbours_mask: Tensor | None = None,
    batch_mask: Tensor | None = None,
    share: Share = WHOLE,
) -> tuple[Tensor, Metrics, Tensor | None]:
    """Contrast anchors with their positives, and with averages over each positive's neighbourhood.

    The batch's z2, detached, is first pushed to the end of the buffer, and the oldest rows leave. The group
    of z2_i is z2_i itself and the buffer rows that follow the single most similar one (its own copy), which
    carry no gradient. `z*_i = normalise(sum of softmax(z2_i . group / attention_temperature) group)`, and
    the loss is `info_nce(z1, z2) + weight * info_nce(z1, z*)`. Until the buffer is full, that is while its
    first row is zero, the loss is `info_nce(z1, z2)` alone. z*_i is normalised because the paper compares by
    cosine; a sum shorter than 1e-6 leaves z2_i in its place.

    A batch larger than the buffer leaves only its last K rows there. The most similar buffer row is passed
    over for every i all the same.

    With `neighbours`, say of the whole corpus from a global index, the group of z2_i is z2_i and these, and
    the buffer is neither read nor changed. They carry no gradient either. A row without a usable neighbour
    keeps z*_i = z2_i, and while no row has one, the loss is `info_nce(z1, z2)` alone.

    IS-CSE (arXiv 2305.07424), method section; the paper has K = 1024, group_size = 16, attention_temperature = 2
    and weight = 0.1, or for large models a ramp from 0.005 to 0.05 (`cosine_ramp`).

    Args:
        z1: anchors, unit-norm rows [B, D].
        z2: positives, unit-norm rows [B, D].
        buffer: earlier positives [K, D], oldest first, rows of zeros where not yet filled; not modified.
            May be None where neighbours are given.
        temperature: divides the cosines of the contrast; above 0.
        group_size: number of neighbours in a group beside the positive itself; from 1 to K - 1. Ignored
            where neighbours are given: all usable ones are in the group.
        attention_temperature: divides the cosines inside a group; above 0.
        weight: of the smoothed term; at least 0.
        neighbours: each positive's neighbours, unit-norm [B, g, D], without the sentence itself; g may be 0.
        neighbours_mask: bool [B, g], True where a neighbour is usable; what the others hold is not looked at.
        batch_mask: see `info_nce`; in both terms.
        share: see `info_nce`. The buffer is the same for all, and what is pushed to it are the rows of all.

    Returns:
        The loss, a scalar in fp32 (fp64 for fp64 inputs); the metrics of `info_nce(z1, z2)` with
        `smoothing_active` (1 once the buffer is full, else 0; with neighbours, the share of rows that have a
        usable one) and `smoothing_loss` (the unweighted smoothed term, 0 while nothing is active); and the
        new buffer [K, D], of the old one's dtype, without gradient (with neighbours, `buffer` as it is).

    Raises:
        ValueError: shapes or dtypes do not fit together, B < 2, a number is out of its range, or there is
            neither a buffer nor neighbours.
    """
    checks.check_positive("temperature", temperature)
    checks.check_positive("attention_temperature", attention_temperature)
    checks.check_at_least("weight", weight, 0)
    with autocast_off(z1):
        c = contrast(z1, z2, None, None, columns="own", columns_mask=None, batch_mask=batch_mask, share=share)
        checks.check_neighbours(z1, neighbours, neighbours_mask)
        if neighbours is not None:
            group_bgD, usable_bg = _given(neighbours, neighbours_mask)
            has_neighbours_b = usable_bg.any(dim=1)
        else:
            if buffer is None:
                raise ValueError("buffer is None and neighbours is None; one of them must be given")
            _check_buffer(z1, buffer, group_size)
            buffer = _push(buffer, c.z2_BD)
            group_bgD, usable_bg = _nearest(c.z2_bD, buffer, group_size=group_size)
            has_neighbours_b = (buffer[0] != 0).any().expand(len(z1))
        base, is_highest_b, hardest_b = cross_entropy(c, c.z2_BD, temperature=temperature)
        dtype = working_dtype(c.z2_bD, group_bgD)
        smoothed_bD = _average(
            c.z2_bD.to(dtype), group_bgD.to(dtype), usable_bg, attention_temperature=attention_temperature
        )
        smoothed, _, _ = cross_entropy(c, share.gather(smoothed_bD), temperature=temperature)
        found = shared_means(c, is_highest_b, hardest_b) | {"smoothing_active": of_rows(has_neighbours_b)}
        metrics = means(share, found)
    # A choice on the device: asking for the flag here would make the host wait at every step.
    smoothed = torch.where(metrics["smoothing_active"] > 0, smoothed, 0.0)
    metrics["smoothing_loss"] = as_metric(smoothed)
    return base + weight * smoothed, metrics, buffer


def cosine_ramp(step: int, total_steps: int, *, start: float, end: float) -> float:
    """Weight of the smoothed term at a step: from `start` along a cosine to `end`, reached half-way.

    `end + (start - end) * cos(pi * step / total_steps)` while the cosine is above 0, then `end`. IS-CSE
    (arXiv 2305.07424) ramps large models from 0.005 to 0.05.

    Args:
        step: optimiser steps done so far; at least 0.
        total_steps: optimiser steps of the whole run; at least 1.
        start: weight at step 0.
        end: weight from half of the run on.

    Raises:
        ValueError: a number of steps is out of its range.
    """
    checks.check_at_least("step", step, 0)
    checks.check_at_least("total_steps", total_steps, 1)
    if 2 * step >= total_steps:
        return end
    return end + (start - end) * math.cos(math.pi * step / total_steps)


def _check_buffer(z1: Tensor, buffer: Tensor, group_size: int) -> None:
    if buffer.ndim != 2 or buffer.shape[1] != z1.shape[1]:
        raise ValueError(f"buffer has shape {tuple(buffer.shape)}; it must be [K, D] with D = {z1.shape[1]}")
    checks.check_floating("buffer", buffer)
    if not 1 <= group_size <= buffer.shape[0] - 1:
        raise ValueError(
            f"group_size is {group_size}; it must lie in [1, K - 1] with K = {buffer.shape[0]} buffer rows"
        )


def _push(buffer_KD: Tensor, z_BD: Tensor) -> Tensor:
    """A new buffer of the same size with the rows at its end, the oldest rows dropped."""
    K, B = buffer_KD.shape[0], z_BD.shape[0]
    kept_KD = buffer_KD.detach()[min(B, K) :]
    return torch.cat([kept_KD, z_BD.detach()[-K:].to(buffer_KD.dtype)])


def _nearest(z2_bD: Tensor, buffer: Tensor, *, group_size: int) -> tuple[Tensor, Tensor]:
    """The neighbours of each positive in the buffer after the nearest row, [b, g, D], all usable [b, g]."""
    dtype = working_dtype(z2_bD, buffer)
    buffer_KD = buffer.to(dtype)
    _, nearest_bG = nearest(z2_bD.to(dtype), buffer_KD, k=group_size + 1)
    nearest_bg = nearest_bG[:, 1:]
    return buffer_KD[nearest_bg], torch.ones_like(nearest_bg, dtype=torch.bool)


def _given(neighbours_BgD: Tensor, usable_Bg: Tensor | None) -> tuple[Tensor, Tensor]:
    """The neighbours without gradient, and which are usable [B, g]; zeros where not."""
    neighbours_BgD = neighbours_BgD.detach()
    if usable_Bg is None:
        return neighbours_BgD, torch.ones(neighbours_BgD.shape[:2], dtype=torch.bool, device=neighbours_BgD.device)
    # Padding may hold anything, NaN included, and 0 * NaN would reach the average and z2's gradient.
    return torch.where(usable_Bg.unsqueeze(-1), neighbours_BgD, 0.0), usable_Bg


def _average(z2_BD: Tensor, neighbours_BgD: Tensor, usable_Bg: Tensor, *, attention_temperature: float) -> Tensor:
    """z*: each positive averaged with its usable neighbours, unit-norm [B, D]; itself if it has none."""
    own_B1 = z2_BD.square().sum(dim=1, keepdim=True)
    others_Bg = (neighbours_BgD @ z2_BD.unsqueeze(-1)).squeeze(-1).masked_fill(~usable_Bg, -torch.inf)
    attention_BG = torch.softmax(torch.cat([own_B1, others_Bg], dim=1) / attention_temperature, dim=1)
    others_BD = (attention_BG[:, 1:].unsqueeze(1) @ neighbours_BgD).squeeze(1)
    sum_BD = attention_BG[:, :1] * z2_BD + others_BD
    smoothed_BD, _ = normalise_or_keep(sum_BD, z2_BD, chosen_b=usable_Bg.any(dim=1))
    return smoothed_BD
