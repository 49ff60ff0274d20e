"""Whether a run can use its objective, found out before anything is started: one of the user's is tried."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor
from torch.nn.functional import normalize

from hncse_ray.config import OwnObjective, Settings
from hncse_ray.errors import HncseError, SettingsError
from hncse_ray.training.objective import Neighbours, Objective
from hncse_ray.training.own_objective import OwnFunction

# Of the vectors that a function is tried on: the machine that a command is given on may be a small one.
_MOST_ROWS, _MOST_NUMBERS = 1024, 2**25


def check_objective(settings: Settings, *, dimension: int, batch_size: int) -> None:
    """See that a run can use its objective; a function of the user's is called on random vectors.

    Args:
        settings: of the run.
        dimension: width D of the embeddings.
        batch_size: rows of a batch.

    Raises:
        SettingsError: it cannot, and why.
    """
    negatives, cpu = settings.negatives, torch.device("cpu")
    objective = Objective(settings.objective, dimension=dimension, device=cpu, columns=negatives.columns)
    if settings.objective.name == "distillation" and negatives.source == "none":
        raise SettingsError("objective 'distillation' learns from the index, and there is none", "negatives.source",
                            "Set negatives.source=pool")  # fmt: skip
    if not isinstance(settings.objective, OwnObjective):
        return
    where = f"objective.name = {settings.objective.name}"
    given = len(settings.corpus.negative_columns)  # each may hold several
    m = given + (0 if negatives.source == "none" else settings.neighbours_per_anchor)
    if m and "negatives" not in objective.takes:
        what, without = ("negatives.source is " + negatives.source, "negatives.source=none")
        if given:
            what, without = "corpus.negative_columns gives some", "corpus.negative_columns=[]"
        raise SettingsError(f"it takes no negatives, but {what}", where,
                            f"Give it a parameter `negatives`, or set {without}")  # fmt: skip
    if m and negatives.columns != "own" and "columns" not in objective.takes:
        raise SettingsError(f"it takes no `columns`, so negatives.columns={negatives.columns} has no effect", where,
                            "Give it a parameter `columns`, or set negatives.columns=own")  # fmt: skip
    rows = min(batch_size, _MOST_ROWS, max(2, _MOST_NUMBERS // (max(m, 1) * dimension)))
    for usable, twins in ((0.8, False), (0.0, True)):
        first, again = (_loss(objective, settings, rows, dimension, m=m, usable=usable, twins=twins) for _ in range(2))
        if not torch.isclose(first, again, rtol=1e-4):
            raise SettingsError(
                f"its loss is {first:g}, and for the same vectors again {again:g}",
                where,
                "A function may remember nothing between calls, and must draw random numbers by torch",
            )


def check_objectives(variants: Iterable[Settings], *, model: str, dimension: int) -> None:
    """See that the trials of a sweep can use their objectives, each different one once.

    Args:
        variants: settings that trials may have.
        model: trials with another one have embeddings of another width, and are left to themselves.
        dimension: width D of its embeddings.

    Raises:
        SettingsError: one cannot, and why.
    """
    seen = set()
    for settings in variants:
        batch_size = settings.train.batch_size
        different = (settings.objective.model_dump_json(), settings.negatives.model_dump_json(), batch_size)
        if settings.encoder.model == model and different not in seen:
            seen.add(different)
            check_objective(settings, dimension=dimension, batch_size=batch_size)


def _loss(
    objective: Objective, settings: Settings, rows: int, dimension: int, *, m: int, usable: float, twins: bool
) -> Tensor:
    """Loss of random views and negatives, of which so many are usable; its gradient is computed too."""
    assert isinstance(function := objective.function, OwnFunction)
    views, neighbours = _batch(
        settings, rows, dimension, m=m, usable=usable, taught=usable > 0 and objective.taught(settings)
    )
    batch_mask = ~torch.eye(rows, dtype=torch.bool)
    batch_mask[0, 1] = batch_mask[1, 0] = False
    with torch.random.fork_rng(devices=[]):  # the caller's random numbers stay what they would have been
        try:
            loss, _ = objective(
                views,
                neighbours,
                batch_mask=batch_mask if twins else None,
                step=0,
                total_steps=settings.train.max_steps or 1000,
                generator=torch.Generator().manual_seed(1),
            )
            gradients = torch.autograd.grad(loss, views, allow_unused=True) if loss.requires_grad else ()
        except HncseError:
            raise
        except Exception as error:
            given = f"{rows} random rows of {dimension} numbers" + (f", {m} negatives each" if m else "")
            said = " ".join(f"{type(error).__name__}: {error}".split())
            raise SettingsError(f"on {given} it fails: {said} ({function.place_of(error)})", function.where) from error
    reached = [gradient for gradient in gradients if gradient is not None]
    if not reached:
        raise SettingsError("no gradient flows from its loss to z1 or z2", function.where,
                            "Compute with torch alone, and do not detach both")  # fmt: skip
    if not all(value.isfinite().all() for value in (loss, *reached)):
        raise SettingsError(f"on random vectors its loss is {loss:g}, and not all of that or its gradient is finite",
                            function.where)  # fmt: skip
    return loss.detach()


def _batch(
    settings: Settings, rows: int, dimension: int, *, m: int, usable: float, taught: bool
) -> tuple[list[Tensor], Neighbours | None]:
    draw = torch.Generator().manual_seed(0)
    z1_BD = torch.randn(rows, dimension, generator=draw)
    z2_BD = z1_BD + torch.randn(rows, dimension, generator=draw)
    views = [normalize(z, dim=1).requires_grad_() for z in (z1_BD, z2_BD)]
    if not m:
        return views, None
    vectors_BmD = normalize(torch.randn(rows, m, dimension, generator=draw), dim=2)
    mask_Bm = torch.rand(rows, m, generator=draw) < usable
    columns_mask = mask_Bm.flatten().repeat(rows, 1) if settings.negatives.columns == "all" else None
    teacher_BL = None
    if taught:
        teacher_BL = torch.rand(rows, rows + (m if columns_mask is None else rows * m), generator=draw)
    vectors_BmD.requires_grad_(settings.negatives.use == "fresh")
    return views, Neighbours(vectors_BmD, mask_Bm, columns_mask, teacher_BL)
