"""What all objectives share: precision, candidates and their similarities, cross entropy over columns.

Shape letters: B anchors (the global batch), D embedding size, m global negatives of one anchor,
N columns that global negatives add to an anchor's logits, C = B + m candidate slots of one anchor, k hardest
candidates, s mixed negatives.
"""

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from hncse_ray.objectives import checks

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
    """The anchors of a batch, their positives and candidates, and the similarities between them.

    Attributes:
        z1_BD: anchors.
        z2_BD: positives; row j is also an in-batch candidate of every anchor but j.
        g_BmD: each anchor's own global negatives (m may be 0), zero where not usable.
        s_BB: z1_i . z2_j.
        s_Bm: z1_i . g_im, -inf where not usable.
        usable_Bm: which of them are usable; None if no negatives were given.
        columns_BN: the similarities of the global negatives that are columns of the logits, -inf where a
            column takes no part: s_Bm for "own"; z1_i . g_jn in column j * m + n for "all"; none for "none".
        candidates_BC: similarity of each anchor to its candidates N_i: slot j < B is z2_j (-inf for j = i
            or if i does not repel j), slot B + j is the anchor's own negative j (-inf where not usable).
        count_B: number of candidates of each anchor; B - 1 + m where nothing is masked.
        repelled_BB: True where anchor i repels column j of the batch, and on the diagonal; None if it is everywhere.
    """

    z1_BD: Tensor
    z2_BD: Tensor
    g_BmD: Tensor
    s_BB: Tensor
    s_Bm: Tensor
    usable_Bm: Tensor | None
    columns_BN: Tensor
    candidates_BC: Tensor
    count_B: Tensor
    repelled_BB: Tensor | None

    def batch_columns(self, s_BB: Tensor) -> Tensor:
        """Similarities to the batch's columns, mixed or not, as logits: -inf where an anchor does not repel one."""
        return s_BB if self.repelled_BB is None else s_BB.masked_fill(~self.repelled_BB, -torch.inf)

    def hardest(self) -> tuple[Tensor, Tensor]:
        """Similarity q_i of each anchor's hardest candidate, and its slot; both [B]."""
        q_B, slot_B = self.candidates_BC.max(dim=1)
        return q_B, slot_B

    def take(self, slots_Bk: Tensor) -> Tensor:
        """The candidates in the given slots of each anchor, [B, k, D], with gradient."""
        B, D = self.z2_BD.shape
        in_batch_BkD = F.embedding(slots_Bk.clamp(max=B - 1), self.z2_BD)
        if self.g_BmD.shape[1] == 0:
            return in_batch_BkD
        own_Bk = (slots_Bk - B).clamp(min=0)
        own_BkD = self.g_BmD.gather(1, own_Bk.unsqueeze(-1).expand(-1, -1, D))
        return torch.where((slots_Bk < B).unsqueeze(-1), in_batch_BkD, own_BkD)


def contrast(
    z1: Tensor,
    z2: Tensor,
    negatives: Tensor | None,
    negatives_mask: Tensor | None,
    *,
    columns: Columns,
    columns_mask: Tensor | None,
    batch_mask: Tensor | None,
) -> Contrast:
    """Check the embeddings, bring them to the working dtype and compare every anchor to its candidates.

    The candidates are the same whatever `columns` says: it only decides which negatives an anchor repels.

    Call under `autocast_off`.

    Raises:
        ValueError: shapes or dtypes do not fit together, B < 2, or `columns` is unknown.
    """
    checks.check_views(z1, z2=z2)
    checks.check_negatives(z1, negatives, negatives_mask)
    checks.check_columns(columns, negatives, columns_mask)
    checks.check_batch_mask(z1, batch_mask)
    B, D = z1.shape
    g_BmD = z1.new_empty(B, 0, D) if negatives is None else negatives
    dtype = working_dtype(z1, z2, g_BmD)
    z1_BD, z2_BD, g_BmD = z1.to(dtype), z2.to(dtype), g_BmD.to(dtype)
    m = g_BmD.shape[1]

    usable_Bm = None if negatives is None else torch.ones(B, m, dtype=torch.bool, device=z1.device)
    count_B = torch.full((B,), B - 1 + m, device=z1.device)
    if negatives_mask is not None:
        usable_Bm = negatives_mask
        # Padding may hold anything, NaN included, and 0 * NaN would reach z1's gradient: blank it first.
        g_BmD = torch.where(negatives_mask.unsqueeze(-1), g_BmD, 0.0)
        count_B = B - 1 + negatives_mask.sum(dim=1)

    s_BB = z1_BD @ z2_BD.T
    s_Bm = (g_BmD @ z1_BD.unsqueeze(-1)).squeeze(-1)
    if negatives_mask is not None:
        s_Bm = s_Bm.masked_fill(~negatives_mask, -torch.inf)
    itself_BB = torch.eye(B, dtype=torch.bool, device=z1.device)
    repelled_BB, no_candidate_BB = None, itself_BB
    if batch_mask is not None:
        repelled_BB = batch_mask | itself_BB
        no_candidate_BB = ~batch_mask | itself_BB
        count_B = count_B - (no_candidate_BB.sum(dim=1) - 1)
    candidates_BC = torch.cat([s_BB.masked_fill(no_candidate_BB, -torch.inf), s_Bm], dim=1)

    if columns == "own":
        columns_BN = s_Bm
    elif columns == "none":
        columns_BN = s_Bm[:, :0]
    else:
        columns_BN = z1_BD @ g_BmD.reshape(B * m, D).T
        if negatives_mask is not None:
            columns_BN = columns_BN.masked_fill(~negatives_mask.reshape(B * m), -torch.inf)
        if columns_mask is not None:
            columns_BN = columns_BN.masked_fill(~columns_mask, -torch.inf)
    return Contrast(z1_BD, z2_BD, g_BmD, s_BB, s_Bm, usable_Bm, columns_BN, candidates_BC, count_B, repelled_BB)


def cross_entropy(columns: list[Tensor], *, temperature: float) -> tuple[Tensor, Tensor]:
    """Mean cross entropy of the columns' similarities over the temperature; row i has label i.

    Args:
        columns: similarities [B, any], side by side; the first is [B, B] and holds the positives on its
            diagonal. Entries of -inf take no part.
        temperature: divides the similarities.

    Returns:
        The loss, and the contrastive accuracy: the share of rows whose label is strictly the highest, so
        that a collapsed encoder, where all are equal, scores 0.
    """
    logits_BN = torch.cat(columns, dim=1) / temperature
    labels_B = torch.arange(logits_BN.shape[0], device=logits_BN.device)
    loss = F.cross_entropy(logits_BN, labels_B)
    ranked_BN = logits_BN.detach()
    at_least_label_B = (ranked_BN >= ranked_BN.diagonal().unsqueeze(1)).sum(dim=1)
    return loss, (at_least_label_B == 1).float().mean()


def shared_metrics(c: Contrast, accuracy: Tensor) -> Metrics:
    """The metrics that every objective reports; their names depend on whether negatives were given alone."""
    metrics = {
        "positive_similarity": as_metric(c.s_BB.diagonal().mean()),
        "hardest_negative_similarity": as_metric(_mean_of_finite(c.candidates_BC.amax(dim=1))),
        "contrastive_accuracy": as_metric(accuracy),
    }
    if c.usable_Bm is not None:
        usable_s_Bm = torch.where(c.usable_Bm, c.s_Bm, 0.0)
        metrics["negative_similarity"] = as_metric(usable_s_Bm.sum() / c.usable_Bm.sum().clamp(min=1))
    return metrics


def _mean_of_finite(q_B: Tensor) -> Tensor:
    """The mean over the anchors that have a candidate, 0 if none has."""
    has_B = q_B != -torch.inf
    return torch.where(has_B, q_B, 0.0).sum() / has_B.sum().clamp(min=1)


def as_metric(value: Tensor) -> Tensor:
    """A detached fp32 scalar that stays on its device."""
    return value.detach().to(torch.float32)


def normalise_or_keep(mix_BD: Tensor, kept_BD: Tensor, *, chosen_B: Tensor) -> tuple[Tensor, Tensor]:
    """Unit-norm mixes where they are chosen and have a direction, the kept rows elsewhere.

    A row that is not mixed gets no gradient, and so no NaN, from the norm of its mix.

    Returns:
        The rows [B, D], and which of them are mixes [B].
    """
    norm_squared_B = mix_BD.square().sum(dim=1)
    mixed_B = chosen_B & (norm_squared_B >= MIN_NORM**2)
    norm_B = torch.where(mixed_B, norm_squared_B, 1.0).sqrt()
    rows_BD = torch.where(mixed_B.unsqueeze(1), mix_BD / norm_B.unsqueeze(1), kept_BD)
    return rows_BD, mixed_B
