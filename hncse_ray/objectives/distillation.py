"""Distillation: an anchor ranks a list of documents as a teacher does that knows more than its vector."""

from typing import Literal

import torch
from torch import Tensor

from hncse_ray.objectives import checks
from hncse_ray.objectives.similarity import (
    Columns,
    Metrics,
    as_metric,
    autocast_off,
    contrast,
    cross_entropy,
    shared_metrics,
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
            z1, z2, negatives, negatives_mask, columns=columns, columns_mask=columns_mask, batch_mask=batch_mask
        )
        s_BL = torch.cat([c.batch_columns(c.s_BB), c.columns_BN], dim=1)
        if teacher is None:
            loss, accuracy = cross_entropy([s_BL], temperature=temperature)
            nothing = loss.new_zeros(())
            return loss, shared_metrics(c, accuracy) | _of_list(nothing, nothing, nothing)
        checks.check_teacher(teacher, s_BL)
        t_BL = teacher.to(s_BL.dtype)
        itself_BL = torch.eye(*s_BL.shape, dtype=torch.bool, device=s_BL.device)
        listed_BL = t_BL.isfinite() & (s_BL != -torch.inf) & ~itself_BL
        t_BL = torch.where(listed_BL, t_BL, 0.0)
        differ = _kl if list_loss == "kl" else _margin_mse
        safe_BL = torch.where(listed_BL, s_BL, 0.0)
        loss_B = differ(safe_BL / temperature, t_BL / teacher_temperature, listed_BL)
        has_B = listed_BL.sum(dim=1) > 1
        mean = torch.where(has_B, loss_B, 0.0).sum() / has_B.sum().clamp(min=1)
        loss = mean
        repelled_BL = s_BL
        if contrast_max_score is not None:
            repelled_BL = s_BL.masked_fill(listed_BL & (t_BL > contrast_max_score), -torch.inf)
        contrasted, accuracy = cross_entropy([repelled_BL], temperature=temperature)
        if contrast_weight:
            loss = loss + contrast_weight * contrasted
        return loss, shared_metrics(c, accuracy) | _of_list(mean, *_shares(s_BL, t_BL, listed_BL, has_B))


def _kl(s_BL: Tensor, t_BL: Tensor, listed_BL: Tensor) -> Tensor:
    """KL divergence of each anchor's list; only finite numbers are computed with, so gradients are finite."""
    lowest = torch.finfo(s_BL.dtype).min
    log_p_BL = s_BL.masked_fill(~listed_BL, lowest).log_softmax(dim=1)
    log_q_BL = t_BL.masked_fill(~listed_BL, lowest).log_softmax(dim=1)
    return torch.where(listed_BL, log_q_BL.exp() * (log_q_BL - log_p_BL), 0.0).sum(dim=1)


def _margin_mse(s_BL: Tensor, t_BL: Tensor, listed_BL: Tensor) -> Tensor:
    """Mean over all pairs of a list: twice the variance times n / (n - 1)."""
    count_B = listed_BL.sum(dim=1).clamp(min=1)
    difference_BL = torch.where(listed_BL, s_BL - t_BL, 0.0)
    mean_B1 = (difference_BL.sum(dim=1) / count_B).unsqueeze(1)
    squares_B = torch.where(listed_BL, (difference_BL - mean_B1).square(), 0.0).sum(dim=1)
    return 2 * squares_B / (count_B - 1).clamp(min=1)


def _shares(s_BL: Tensor, t_BL: Tensor, listed_BL: Tensor, has_B: Tensor) -> tuple[Tensor, Tensor]:
    best_B = s_BL.masked_fill(~listed_BL, -torch.inf).argmax(dim=1)
    agreed_B = (best_B == t_BL.masked_fill(~listed_BL, -torch.inf).argmax(dim=1)) & has_B
    return has_B.float().mean(), agreed_B.sum() / has_B.sum().clamp(min=1)


def _of_list(loss: Tensor, listed: Tensor, agreement: Tensor) -> Metrics:
    return {"list_loss": as_metric(loss), "listed": as_metric(listed), "teacher_agreement": as_metric(agreement)}
