"""What all objectives share: precision, candidates and their similarities, cross entropy over columns.

Shape letters: B rows of the global batch, b of them this process's anchors (all B in one process), D embedding size,
m global negatives of one anchor, N columns of everyone's negatives, k hardest candidates, e further columns.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from hncse_ray.objectives import checks
from hncse_ray.objectives.blocks import nearest, over_columns
from hncse_ray.objectives.share import Share

Metrics = dict[str, Tensor]

Columns = Literal["own", "all", "none"]
"""Whose global negatives are columns of an anchor's logits: its own, those of all anchors, or nobody's."""

MIN_NORM = 1e-6
"""A mix shorter than this has no direction to speak of and is never normalised."""


def autocast_off(tensor: Tensor) -> torch.autocast:
    """Context that keeps autocast from lowering the precision of similarities on the tensor's device."""
    return torch.autocast(device_type=tensor.device.type, enabled=False)


def working_dtype(*tensors: Tensor) -> torch.dtype:
    """The dtype to compute in: the widest of the tensors' dtypes, and fp32 at the least."""
    dtype = torch.float32
    for tensor in tensors:
        dtype = torch.promote_types(dtype, tensor.dtype)
    return dtype


@dataclass(frozen=True, slots=True)
class Contrast:
    """The anchors of a process, their positives, and what they are compared to.

    Attributes:
        share: which rows of the batch the anchors are.
        z1_bD: anchors.
        z2_bD: their positives.
        z2_BD: those of the whole batch; row j is also an in-batch candidate of every anchor but j.
        g_bmD: each anchor's own global negatives (m may be 0), zero where not usable.
        p_b: z1_i . z2_i.
        s_bm: z1_i . g_im, -inf where not usable.
        usable_bm: which of them are usable; None if no negatives were given.
        own_columns: whether the own negatives are columns of the logits.
        g_ND: the global negatives of the whole batch, if all of them are columns; column j * m + n is g_jn.
        masks_of_all: which of these an anchor repels, [b, N] each.
        masks: which columns of the batch an anchor repels, [b, B] each; its own is not looked at.
        count_b: number of candidates of each anchor; B - 1 + m where nothing is masked.
    """

    share: Share
    z1_bD: Tensor
    z2_bD: Tensor
    z2_BD: Tensor
    g_bmD: Tensor
    p_b: Tensor
    s_bm: Tensor
    usable_bm: Tensor | None
    own_columns: bool
    g_ND: Tensor | None
    masks_of_all: Sequence[Tensor]
    masks: Sequence[Tensor]
    count_b: Tensor

    def available(self, k: int) -> int:
        """k, or the number of candidate slots of an anchor where there are fewer."""
        return min(k, len(self.z2_BD) - 1 + self.g_bmD.shape[1])

    def similarities(self) -> tuple[Tensor, Tensor]:
        """To all columns at once, [b, L], for objectives that look at the whole of a row; and which are own ones.

        First those of the batch, then the global negatives; -inf where a column takes no part.
        """
        own_bB = torch.zeros(len(self.z1_bD), len(self.z2_BD), dtype=torch.bool, device=self.z1_bD.device)
        own_bB.diagonal(self.share.start).fill_(True)
        s_bB = self.z1_bD @ self.z2_BD.T
        for mask_bB in self.masks:
            s_bB = s_bB.masked_fill(~(mask_bB | own_bB), -torch.inf)
        negatives_bN = self.s_bm if self.own_columns else self.s_bm[:, :0]
        if self.g_ND is not None:
            negatives_bN = self.z1_bD @ self.g_ND.T
            for mask_bN in self.masks_of_all:
                negatives_bN = negatives_bN.masked_fill(~mask_bN, -torch.inf)
        return torch.cat([s_bB, negatives_bN], dim=1), F.pad(own_bB, (0, negatives_bN.shape[1]))

    def hardest(self, k: int) -> tuple[Tensor, Tensor]:
        """The k hardest candidates of each anchor, the hardest first.

        Returns:
            Their similarities [b, k] without gradient, -inf where an anchor has fewer, and their slots: j < B is z2_j,
            B + n the anchor's own negative n.
        """
        B = len(self.z2_BD)
        in_batch_bk, slots_bk = nearest(
            self.z1_bD, self.z2_BD, k=min(k, B), own_from=self.share.start, masks=self.masks
        )
        own_bm = torch.arange(B, B + self.s_bm.shape[1], device=slots_bk.device).expand(len(slots_bk), -1)
        top_bk, order_bk = torch.cat([in_batch_bk, self.s_bm.detach()], dim=1).topk(k, dim=1)
        return top_bk, torch.cat([slots_bk, own_bm], dim=1).gather(1, order_bk)

    def take(self, slots_bk: Tensor) -> Tensor:
        """The candidates in the given slots of each anchor, [b, k, D], with gradient."""
        B, D = self.z2_BD.shape
        in_batch_bkD = F.embedding(slots_bk.clamp(max=B - 1), self.z2_BD)
        if self.g_bmD.shape[1] == 0:
            return in_batch_bkD
        own_bk = (slots_bk - B).clamp(min=0)
        own_bkD = self.g_bmD.gather(1, own_bk.unsqueeze(-1).expand(-1, -1, D))
        return torch.where((slots_bk < B).unsqueeze(-1), in_batch_bkD, own_bkD)


def contrast(
    z1: Tensor,
    z2: Tensor,
    negatives: Tensor | None,
    negatives_mask: Tensor | None,
    *,
    columns: Columns,
    columns_mask: Tensor | None,
    batch_mask: Tensor | None,
    share: Share,
) -> Contrast:
    """Check the embeddings, bring them to the working dtype and gather what all anchors are compared to.

    The candidates are the same whatever `columns` says: it only decides which negatives an anchor repels.

    Call under `autocast_off`.

    Raises:
        ValueError: shapes or dtypes do not fit together, B < 2, or `columns` is unknown.
    """
    checks.check_views(z1, z2=z2, fewest=2 if share.processes == 1 else 1)
    checks.check_negatives(z1, negatives, negatives_mask)
    b, D = z1.shape
    g_bmD = z1.new_empty(b, 0, D) if negatives is None else negatives
    dtype = working_dtype(z1, z2, g_bmD)
    z1_bD, z2_bD = z1.to(dtype), z2.to(dtype)
    m = g_bmD.shape[1]
    z2_BD = share.gather(z2_bD)
    B = len(z2_BD)
    checks.check_columns(columns, negatives, columns_mask, batch_size=B)
    checks.check_batch_mask(z1, batch_mask, batch_size=B)

    usable_bm = None if negatives is None else torch.ones(b, m, dtype=torch.bool, device=z1.device)
    if negatives_mask is not None:
        usable_bm = negatives_mask
        # Padding may hold anything, NaN included, and 0 * NaN would reach z1's gradient: blank it first.
        g_bmD = torch.where(negatives_mask.unsqueeze(-1), g_bmD, 0.0)
    given_bmD, g_bmD = g_bmD, g_bmD.to(dtype)
    s_bm = (g_bmD @ z1_bD.unsqueeze(-1)).squeeze(-1)
    count_b = torch.full((b,), B - 1 + m, device=z1.device)
    if negatives_mask is not None:
        s_bm = s_bm.masked_fill(~negatives_mask, -torch.inf)
        count_b = B - 1 + negatives_mask.sum(dim=1)
    if batch_mask is not None:
        count_b = count_b - (B - 1) + batch_mask.sum(dim=1) - batch_mask.diagonal(share.start).int()

    g_ND, masks_of_all = None, []
    if columns == "all" and m:
        g_ND = share.gather(given_bmD).flatten(0, 1).to(dtype)  # they travel as they were given: bf16 is half
        if negatives_mask is not None:
            masks_of_all.append(share.gather(negatives_mask).flatten().expand(b, -1))
        if columns_mask is not None:
            masks_of_all.append(columns_mask)
    return Contrast(
        share=share,
        z1_bD=z1_bD,
        z2_bD=z2_bD,
        z2_BD=z2_BD,
        g_bmD=g_bmD,
        p_b=(z1_bD * z2_bD).sum(dim=1),
        s_bm=s_bm,
        usable_bm=usable_bm,
        own_columns=columns == "own",
        g_ND=g_ND,
        masks_of_all=masks_of_all,
        masks=[] if batch_mask is None else [batch_mask],
        count_b=count_b,
    )


def cross_entropy(
    c: Contrast, positives_BD: Tensor, further: Tensor | None = None, *, temperature: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Mean cross entropy of the columns' similarities over the temperature; the label of row i is column i.

    Args:
        c: the anchors, and their global negatives, which are columns as `columns` said.
        positives_BD: columns of all rows, row i the positive of i.
        further: similarities [b, e] to columns of each anchor alone; those of -inf take no part.
        temperature: divides the similarities.

    Returns:
        The loss over the batch. Of each anchor [b], whether its label is strictly the highest, so that a collapsed
        encoder, where all are equal, scores 0; and the highest similarity to another's positive, without gradient.
    """
    others_b, label_b, hardest_b = over_columns(
        c.z1_bD, positives_BD, temperature=temperature, own_from=c.share.start, masks=c.masks
    )
    logits, rivals = [label_b.unsqueeze(1) / temperature, others_b.unsqueeze(1)], [hardest_b.unsqueeze(1)]
    if c.g_ND is not None:
        others_b, _, highest_b = over_columns(c.z1_bD, c.g_ND, temperature=temperature, masks=c.masks_of_all)
        logits.append(others_b.unsqueeze(1))
        rivals.append(highest_b.unsqueeze(1))
    for s_be in (c.s_bm if c.own_columns else None, further):
        if s_be is None:
            continue
        logits.append(s_be / temperature)
        rivals.append(s_be.detach())
    rows_be = torch.cat(logits, dim=1)
    of_row_b = torch.logsumexp(rows_be, dim=1) - rows_be[:, 0]
    is_highest_b = label_b.detach() > torch.cat(rivals, dim=1).amax(dim=1)
    return c.share.add(of_row_b.sum() / len(c.z2_BD)), is_highest_b, hardest_b


def shared_means(c: Contrast, is_highest_b: Tensor, hardest_b: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
    """The metrics that every objective reports, for `means`; their names depend on whether negatives were given alone.

    Args:
        c: the anchors.
        is_highest_b: see `cross_entropy`.
        hardest_b: similarity of the hardest candidate of the batch, or of all; -inf if there is none.
    """
    hardest_b = torch.maximum(hardest_b, c.s_bm.detach().amax(dim=1)) if c.s_bm.shape[1] else hardest_b
    found = {
        "positive_similarity": of_rows(c.p_b),
        "hardest_negative_similarity": of_rows(hardest_b, hardest_b != -torch.inf),
        "contrastive_accuracy": of_rows(is_highest_b),
    }
    if c.usable_bm is not None:
        found["negative_similarity"] = of_rows(c.s_bm, c.usable_bm)
    return found


def of_rows(values: Tensor, counted: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Sum and number of the values, or of those that count; what the others hold is not looked at."""
    if counted is None:
        counted = torch.ones_like(values, dtype=torch.bool)
    return torch.where(counted, values.detach(), 0).sum(), counted.sum()


def means(share: Share, found: dict[str, tuple[Tensor, Tensor]]) -> Metrics:
    """Means over all processes from sums and numbers of this one's; 0 where the number is 0."""
    dtype = working_dtype(*(total for total, _ in found.values()))
    pairs = share.add(torch.stack([torch.stack([total.to(dtype), n.to(dtype)]) for total, n in found.values()]))
    return {name: as_metric(total / n.clamp(min=1)) for name, (total, n) in zip(found, pairs, strict=True)}


def as_metric(value: Tensor) -> Tensor:
    """A detached fp32 scalar that stays on its device."""
    return value.detach().to(torch.float32)


def normalise_or_keep(mix_bD: Tensor, kept_bD: Tensor, *, chosen_b: Tensor) -> tuple[Tensor, Tensor]:
    """Unit-norm mixes where they are chosen and have a direction, the kept rows elsewhere.

    A row that is not mixed gets no gradient, and so no NaN, from the norm of its mix.

    Returns:
        The rows [b, D], and which of them are mixes [b].
    """
    norm_squared_b = mix_bD.square().sum(dim=1)
    mixed_b = chosen_b & (norm_squared_b >= MIN_NORM**2)
    norm_b = torch.where(mixed_b, norm_squared_b, 1.0).sqrt()
    rows_bD = torch.where(mixed_b.unsqueeze(1), mix_bD / norm_b.unsqueeze(1), kept_bD)
    return rows_bD, mixed_b
