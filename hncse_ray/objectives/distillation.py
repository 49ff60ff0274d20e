"""Distillation: an anchor ranks a list of documents as a teacher does that knows more than its vector."""

from dataclasses import replace
from typing import Literal

import torch
from torch import Tensor

from hncse_ray.objectives import checks
from hncse_ray.objectives.share import WHOLE, Share
from hncse_ray.objectives.similarity import (
    Columns,
    Contrast,
    Metrics,
    as_metric,
    autocast_off,
    contrast,
    cross_entropy,
    means,
    of_rows,
    shared_means,
)

ListLoss = Literal["kl", "margin_mse"]


def distillation(
    z1: Tensor,
    z2: Tensor,
    negatives: Tensor | None = None,
    *,
    teacher: Tensor | None,
    temperature: float,
    teacher_temperature: float,
    list_loss: ListLoss,
    contrast_weight: float,
    contrast_max_score: float | None,
    negatives_mask: Tensor | None = None,
    columns: Columns = "own",
    columns_mask: Tensor | None = None,
    batch_mask: Tensor | None = None,
    share: Share = WHOLE,
) -> tuple[Tensor, Metrics]:
    """Bring the scores of each anchor with a list of documents to those of a teacher.

    The list of anchor i are the columns of `info_nce` that it may repel: the other documents of the batch, and global
    negatives. Its own document is not in it: a teacher that counts words finds the anchor in there. With s_ij the
    cosine of anchor i and document j, and t_ij the teacher's score:

    - `kl`: the mean over i of KL(softmax_j(t_ij / teacher_temperature) || softmax_j(s_ij / temperature)), ListNet's
      loss (Cao et al. 2007) less a constant.
    - `margin_mse`: the mean over i, and over all pairs of documents j, k of its list, of
      ((s_ij - s_ik) / temperature - (t_ij - t_ik) / teacher_temperature)^2; Hofstaetter et al. 2020 (arXiv 2010.02666)
      have one such pair an anchor.

    To it is added `contrast_weight` times `info_nce` over the same columns and the own document. Where the teacher says
    that a document is near, the anchor does not repel it.

    Without a teacher, as when an index does not answer, the loss is that of `info_nce`, whatever its weight.

    Args:
        z1: anchors, unit-norm rows [B, D].
        z2: their own documents, unit-norm rows [B, D].
        negatives: see `info_nce`.
        teacher: its scores with z2_j [B, B], and behind them with the global negatives that are columns, [B, B + m] or,
            with `columns="all"`, [B, B + B * m]. What is not finite is not in the list. None: there is no teacher.
        temperature: divides the cosines; above 0.
        teacher_temperature: divides the teacher's scores; above 0.
        list_loss: "kl" or "margin_mse".
        contrast_weight: of `info_nce`; at least 0.
        contrast_max_score: documents that the teacher scores higher are not repelled; None: all are.
        negatives_mask: see `info_nce`.
        columns: see `info_nce`.
        columns_mask: see `info_nce`.
        batch_mask: see `info_nce`.
        share: see `info_nce`; the teacher's rows are those of the own anchors.

    Returns:
        The loss, and the metrics of `info_nce`; and `list_loss`, its mean over the anchors that have a list of at least
        two documents, `listed`, the share of anchors that have, and `teacher_agreement`, the share of these whose
        best document is the teacher's.

    Raises:
        ValueError: shapes or dtypes do not fit together, B < 2, or an argument is out of its range.
    """
    checks.check_positive("temperature", temperature)
    checks.check_positive("teacher_temperature", teacher_temperature)
    checks.check_at_least("contrast_weight", contrast_weight, 0)
    checks.check_negatives_are_columns(columns)
    if list_loss not in ("kl", "margin_mse"):
        raise ValueError(f"list_loss is {list_loss!r}; it must be 'kl' or 'margin_mse'")
    with autocast_off(z1):
        c = contrast(
            z1, z2, negatives, negatives_mask,
            columns=columns, columns_mask=columns_mask, batch_mask=batch_mask, share=share,
        )  # fmt: skip
        if teacher is None:
            loss, is_highest_b, hardest_b = cross_entropy(c, c.z2_BD, temperature=temperature)
            nothing = dict.fromkeys(("listed", "teacher_agreement", "list_loss"), as_metric(loss.new_zeros(())))
            return loss, means(share, shared_means(c, is_highest_b, hardest_b)) | nothing
        s_bL, own_bL = c.similarities()
        checks.check_teacher(teacher, s_bL)
        t_bL = teacher.to(s_bL.dtype)
        listed_bL = t_bL.isfinite() & (s_bL != -torch.inf) & ~own_bL
        t_bL = torch.where(listed_bL, t_bL, 0.0)
        differ = _kl if list_loss == "kl" else _margin_mse
        safe_bL = torch.where(listed_bL, s_bL, 0.0)
        loss_b = differ(safe_bL / temperature, t_bL / teacher_temperature, listed_bL)
        has_b = listed_bL.sum(dim=1) > 1
        mean = share.add(torch.where(has_b, loss_b, 0.0).sum() / share.add(has_b.sum()).clamp(min=1))
        loss = mean
        repelled = c if contrast_max_score is None else _without(c, listed_bL & (t_bL > contrast_max_score))
        with torch.set_grad_enabled(torch.is_grad_enabled() and contrast_weight > 0):  # else it is for the metrics
            contrasted, is_highest_b, _ = cross_entropy(repelled, c.z2_BD, temperature=temperature)
        if contrast_weight:
            loss = loss + contrast_weight * contrasted
        hardest_b = s_bL.detach().masked_fill(own_bL, -torch.inf)[:, : len(c.z2_BD)].amax(dim=1)
        agreed_b = _best(s_bL, listed_bL) == _best(t_bL, listed_bL)
        found = shared_means(c, is_highest_b, hardest_b)
        found |= {"listed": of_rows(has_b), "teacher_agreement": of_rows(agreed_b, has_b)}
        return loss, means(share, found) | {"list_loss": as_metric(mean)}


def _without(c: Contrast, near_bL: Tensor) -> Contrast:
    """The same without the columns that a teacher finds near."""
    B = len(c.z2_BD)
    repelled_bB, repelled_bN = ~near_bL[:, :B], ~near_bL[:, B:]
    if c.g_ND is not None:
        return replace(c, masks=[*c.masks, repelled_bB], masks_of_all=[*c.masks_of_all, repelled_bN])
    return replace(c, masks=[*c.masks, repelled_bB], s_bm=c.s_bm.masked_fill(~repelled_bN, -torch.inf))


def _kl(s_bL: Tensor, t_bL: Tensor, listed_bL: Tensor) -> Tensor:
    """KL divergence of each anchor's list; only finite numbers are computed with, so gradients are finite."""
    lowest = torch.finfo(s_bL.dtype).min
    log_p_bL = s_bL.masked_fill(~listed_bL, lowest).log_softmax(dim=1)
    log_q_bL = t_bL.masked_fill(~listed_bL, lowest).log_softmax(dim=1)
    return torch.where(listed_bL, log_q_bL.exp() * (log_q_bL - log_p_bL), 0.0).sum(dim=1)


def _margin_mse(s_bL: Tensor, t_bL: Tensor, listed_bL: Tensor) -> Tensor:
    """Mean over all pairs of a list: twice the variance times n / (n - 1)."""
    count_b = listed_bL.sum(dim=1).clamp(min=1)
    difference_bL = torch.where(listed_bL, s_bL - t_bL, 0.0)
    mean_b1 = (difference_bL.sum(dim=1) / count_b).unsqueeze(1)
    squares_b = torch.where(listed_bL, (difference_bL - mean_b1).square(), 0.0).sum(dim=1)
    return 2 * squares_b / (count_b - 1).clamp(min=1)


def _best(scores_bL: Tensor, listed_bL: Tensor) -> Tensor:
    return scores_bL.masked_fill(~listed_bL, -torch.inf).argmax(dim=1)
