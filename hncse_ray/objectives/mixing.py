"""HNCSE (Liu et al. 2024, arXiv 2411.12156): mixed positives, mixed hard negatives, and both at once.

The published code searches the mixing weights by Optuna inside every forward pass. Here they are plain
arguments, and a sweep over whole runs finds them.
"""

import torch
from torch import Tensor

from hncse_ray.objectives import checks
from hncse_ray.objectives.pairs import draw_pairs
from hncse_ray.objectives.similarity import (
    MIN_NORM,
    Columns,
    Contrast,
    Metrics,
    as_metric,
    autocast_off,
    contrast,
    cross_entropy,
    normalise_or_keep,
    shared_metrics,
)

# The norm of a mixed negative comes from a Gram matrix, whose fp32 rounding is about 1e-7 of a squared norm.
_MIN_GRAM_NORM = 1e-3


def positive_mixing(
    z1: Tensor,
    z2: Tensor,
    negatives: Tensor | None = None,
    *,
    temperature: float,
    margin: float,
    w_pos: float,
    w_neg: float,
    negatives_mask: Tensor | None = None,
    columns: Columns = "own",
    columns_mask: Tensor | None = None,
    batch_mask: Tensor | None = None,
) -> tuple[Tensor, Metrics]:
    """HNCSE-PM: mix the hardest negative into a positive that it rivals.

    The candidates of anchor i are every z2_j, j != i, and the anchor's own negatives. With h_i the candidate
    most similar to z1_i, q = z1_i . h_i and p = z1_i . z2_i, the positive of anchor i

    - stays z2_i where p > q and (p - q) / p > margin: the positive is clearly closer;
    - becomes w_pos z2_i + w_neg h_i where p > q and (p - q) / p <= margin: the two are about as close;
    - becomes (p z2_i + q h_i) / (p + q) where p <= q: the negative is closer.

    The mixes are normalised and stand in z2's place as columns of the logits, for every row; the negatives
    are further columns, as `columns` says. Gradient flows through the mixes and through p and q; which
    case holds is a constant.

    Guards: the positive stays z2_i where p <= 0 (the relative gap has no meaning, and the mix would point
    away from the positive), where p + q < 1e-6, where the anchor has no candidate, and where the mix is
    shorter than 1e-6 (for instance with opposite vectors, or with both weights 0).

    HNCSE-PM (arXiv 2411.12156); its published code has margin = 0.1.

    Args:
        z1: anchors, unit-norm rows [B, D].
        z2: positives, unit-norm rows [B, D].
        negatives: each anchor's own global negatives, unit-norm [B, m, D].
        temperature: divides the cosines; above 0.
        margin: relative gap (p - q) / p above which a positive is left alone; at least 0.
        w_pos: weight of the positive in the second case; at least 0. Only the ratio to `w_neg` matters.
        w_neg: weight of the hardest negative in the second case; at least 0.
        negatives_mask: bool [B, m], True where a negative is usable; the others take no part.
        columns: "own" or "all" as in `info_nce`, or "none": negatives are candidates for mixing and no
            columns. The candidates of an anchor are the batch's and its own in each case.
        columns_mask: see `info_nce`.
        batch_mask: see `info_nce`.

    Returns:
        The loss, a scalar in fp32 (fp64 for fp64 inputs), and the metrics of `info_nce` (similarities of the
        unmixed positives; accuracy against the mixed columns) with the shares of anchors in each case,
        `share_kept` (guarded ones among them), `share_weighted_mix` and `share_similarity_mix`.

    Raises:
        ValueError: shapes or dtypes do not fit together, B < 2, or an argument is out of its range.
    """
    _check_positive_mixing(temperature=temperature, margin=margin, w_pos=w_pos, w_neg=w_neg)
    with autocast_off(z1):
        c = contrast(
            z1, z2, negatives, negatives_mask, columns=columns, columns_mask=columns_mask, batch_mask=batch_mask
        )
        positives_BD, shares = _mixed_positives(c, margin=margin, w_pos=w_pos, w_neg=w_neg)
        loss, accuracy = cross_entropy(
            [c.batch_columns(c.z1_BD @ positives_BD.T), c.columns_BN], temperature=temperature
        )
        return loss, shared_metrics(c, accuracy) | shares


def hard_negative_mixing(
    z1: Tensor,
    z2: Tensor,
    negatives: Tensor | None = None,
    *,
    temperature: float,
    k: int,
    n_mixes: int,
    alpha: float,
    pairs: Tensor | None = None,
    generator: torch.Generator | None = None,
    negatives_mask: Tensor | None = None,
    columns: Columns = "own",
    columns_mask: Tensor | None = None,
    batch_mask: Tensor | None = None,
) -> tuple[Tensor, Metrics]:
    """HNCSE-HNM: make harder negatives by mixing pairs of an anchor's hardest ones.

    The candidates of anchor i are every z2_j, j != i, and the anchor's own negatives; n_0, n_1, ... are the k
    most similar to z1_i, the most similar first. Each of `n_mixes` pairs of ranks (a, b) gives
    `normalise(alpha n_a + (1 - alpha) n_b)`, and these mixes are further columns of row i beside the z2 and
    the negatives, as `columns` says. Gradient flows through the mixes. They are never materialised: only
    their cosines are computed, from the similarities of n_a and n_b and from the Gram matrix of the k
    candidates.

    An anchor with fewer than k candidates draws among those it has, and with fewer than 2 has no mixes. A
    mix shorter than 1e-3 (opposite vectors) has no direction and is left out.

    HNCSE-HNM (arXiv 2411.12156), after MoCHi (Kalantidis et al. 2020, arXiv 2010.01028), section 4.1;
    published values are k = 10, n_mixes = 40, alpha = 0.5.

    Args:
        z1: anchors, unit-norm rows [B, D].
        z2: positives, unit-norm rows [B, D].
        negatives: each anchor's own global negatives, unit-norm [B, m, D].
        temperature: divides the cosines; above 0.
        k: number of hardest candidates to draw from; at least 2.
        n_mixes: mixes for each anchor; at least 0.
        alpha: weight of n_a; in [0, 1].
        pairs: the ranks (a, b) to mix, int64 [B, n_mixes, 2] in [0, k), taken as they are (a = b and a > b
            included). Their values are checked on the device they lie on, so pairs on an accelerator make the
            host wait; pairs on the CPU do not. With a mask, a pair beyond an anchor's candidates is left
            out; without, it is an error.
        generator: draws the pairs when `pairs` is None: uniformly, with replacement, a < b. The draw depends
            on the generator's state and on shapes alone, so ranks that hold equal generators draw equal
            pairs. It may live on another device than z1. None stands for the default one of z1's device.
        negatives_mask: bool [B, m], True where a negative is usable; the others take no part.
        columns: see `positive_mixing`.
        columns_mask: see `info_nce`.
        batch_mask: see `info_nce`.

    Returns:
        The loss, a scalar in fp32 (fp64 for fp64 inputs), and the metrics of `info_nce` with
        `mixed_negative_similarity` (mean cosine of the mixes to their anchors, 0 if there are none) and
        `candidates_used` (mean number of candidates drawn from).

    Raises:
        ValueError: shapes or dtypes do not fit together, B < 2, or an argument or a rank is out of its range.
    """
    _check_negative_mixing(temperature=temperature, k=k, n_mixes=n_mixes, alpha=alpha)
    with autocast_off(z1):
        c = contrast(
            z1, z2, negatives, negatives_mask, columns=columns, columns_mask=columns_mask, batch_mask=batch_mask
        )
        masked = negatives_mask is not None or batch_mask is not None
        pairs = _pairs_or_draw(c, k, n_mixes, pairs=pairs, generator=generator, masked=masked)
        mixes_Bs, mix_metrics = _mixed_negatives(c, pairs, k=k, alpha=alpha)
        loss, accuracy = cross_entropy([c.batch_columns(c.s_BB), c.columns_BN, mixes_Bs], temperature=temperature)
        return loss, shared_metrics(c, accuracy) | mix_metrics


def hybrid(
    z1: Tensor,
    z2: Tensor,
    negatives: Tensor | None = None,
    *,
    temperature: float,
    margin: float,
    w_pos: float,
    w_neg: float,
    k: int,
    n_mixes: int,
    alpha: float,
    pairs: Tensor | None = None,
    generator: torch.Generator | None = None,
    negatives_mask: Tensor | None = None,
    columns: Columns = "own",
    columns_mask: Tensor | None = None,
    batch_mask: Tensor | None = None,
) -> tuple[Tensor, Metrics]:
    """HNCSE (arXiv 2411.12156): `positive_mixing` and `hard_negative_mixing` at once.

    The mixed positives stand in z2's place as columns; the mixed negatives, made from the original z2 and
    negatives and not from mixed positives, are further columns. As in both, `columns` decides which negatives
    are columns, never which are candidates.

    Args:
        z1: anchors, unit-norm rows [B, D].
        z2: positives, unit-norm rows [B, D].
        negatives: each anchor's own global negatives, unit-norm [B, m, D].
        temperature: divides the cosines; above 0.
        margin: see `positive_mixing`.
        w_pos: see `positive_mixing`.
        w_neg: see `positive_mixing`.
        k: see `hard_negative_mixing`.
        n_mixes: see `hard_negative_mixing`.
        alpha: see `hard_negative_mixing`.
        pairs: see `hard_negative_mixing`.
        generator: see `hard_negative_mixing`.
        negatives_mask: bool [B, m], True where a negative is usable; the others take no part.
        columns: see `positive_mixing`.
        columns_mask: see `info_nce`.
        batch_mask: see `info_nce`.

    Returns:
        The loss, a scalar in fp32 (fp64 for fp64 inputs), and the metrics of both parts.

    Raises:
        ValueError: shapes or dtypes do not fit together, B < 2, or an argument or a rank is out of its range.
    """
    _check_positive_mixing(temperature=temperature, margin=margin, w_pos=w_pos, w_neg=w_neg)
    _check_negative_mixing(temperature=temperature, k=k, n_mixes=n_mixes, alpha=alpha)
    with autocast_off(z1):
        c = contrast(
            z1, z2, negatives, negatives_mask, columns=columns, columns_mask=columns_mask, batch_mask=batch_mask
        )
        positives_BD, shares = _mixed_positives(c, margin=margin, w_pos=w_pos, w_neg=w_neg)
        masked = negatives_mask is not None or batch_mask is not None
        pairs = _pairs_or_draw(c, k, n_mixes, pairs=pairs, generator=generator, masked=masked)
        mixes_Bs, mix_metrics = _mixed_negatives(c, pairs, k=k, alpha=alpha)
        similarities = [c.batch_columns(c.z1_BD @ positives_BD.T), c.columns_BN, mixes_Bs]
        loss, accuracy = cross_entropy(similarities, temperature=temperature)
        return loss, shared_metrics(c, accuracy) | shares | mix_metrics


def _check_positive_mixing(*, temperature: float, margin: float, w_pos: float, w_neg: float) -> None:
    checks.check_positive("temperature", temperature)
    checks.check_at_least("margin", margin, 0)
    checks.check_at_least("w_pos", w_pos, 0)
    checks.check_at_least("w_neg", w_neg, 0)


def _check_negative_mixing(*, temperature: float, k: int, n_mixes: int, alpha: float) -> None:
    checks.check_positive("temperature", temperature)
    checks.check_at_least("k", k, 2)
    checks.check_at_least("n_mixes", n_mixes, 0)
    checks.check_fraction("alpha", alpha)


def _mixed_positives(c: Contrast, *, margin: float, w_pos: float, w_neg: float) -> tuple[Tensor, Metrics]:
    """The positives [B, D] after mixing, and the share of anchors in each case."""
    p_B = c.s_BB.diagonal()
    q_B, slot_B = c.hardest()
    h_BD = c.take(slot_B.unsqueeze(1)).squeeze(1)

    sum_B = p_B + q_B
    # p > 0 first: with it, (p - q) / p > margin is p - q > margin * p, which needs no division.
    weighted_B = (p_B > 0) & (p_B > q_B) & (p_B - q_B <= margin * p_B)
    by_similarity_B = (p_B > 0) & (p_B <= q_B) & (sum_B >= MIN_NORM)

    safe_sum_B = torch.where(by_similarity_B, sum_B, 1.0)
    of_positive_B = torch.where(by_similarity_B, p_B / safe_sum_B, w_pos)
    of_negative_B = torch.where(by_similarity_B, q_B / safe_sum_B, w_neg)
    mix_BD = of_positive_B.unsqueeze(1) * c.z2_BD + of_negative_B.unsqueeze(1) * h_BD
    positives_BD, mixed_B = normalise_or_keep(mix_BD, c.z2_BD, chosen_B=weighted_B | by_similarity_B)
    return positives_BD, {
        "share_kept": (~mixed_B).float().mean(),
        "share_weighted_mix": (mixed_B & weighted_B).float().mean(),
        "share_similarity_mix": (mixed_B & by_similarity_B).float().mean(),
    }


def _mixed_negatives(c: Contrast, pairs_Bs2: Tensor, *, k: int, alpha: float) -> tuple[Tensor, Metrics]:
    """Cosines of the mixed negatives to their anchors [B, s], -inf where there is no mix."""
    k = _available(c, k)
    used_B = c.count_B.clamp(max=k)
    top_Bk, slots_Bk = c.candidates_BC.topk(k, dim=1)
    s_Bk = top_Bk.masked_fill(top_Bk == -torch.inf, 0.0)
    n_BkD = c.take(slots_Bk)
    gram_Bkk = n_BkD @ n_BkD.transpose(1, 2)
    norm_squared_Bk = gram_Bkk.diagonal(dim1=1, dim2=2)

    within_Bs = (pairs_Bs2 < used_B[:, None, None]).all(dim=2) & (used_B >= 2).unsqueeze(1)
    a_Bs, b_Bs = pairs_Bs2.clamp(max=k - 1).unbind(dim=2)
    beta = 1.0 - alpha
    mix_norm_squared_Bs = (
        alpha**2 * norm_squared_Bk.gather(1, a_Bs)
        + beta**2 * norm_squared_Bk.gather(1, b_Bs)
        + 2 * alpha * beta * gram_Bkk.flatten(1).gather(1, a_Bs * k + b_Bs)
    )
    mixed_Bs = within_Bs & (mix_norm_squared_Bs >= _MIN_GRAM_NORM**2)
    mix_norm_Bs = torch.where(mixed_Bs, mix_norm_squared_Bs, 1.0).sqrt()
    cosine_Bs = (alpha * s_Bk.gather(1, a_Bs) + beta * s_Bk.gather(1, b_Bs)) / mix_norm_Bs

    n_mixed = mixed_Bs.sum().clamp(min=1)
    metrics = {
        "mixed_negative_similarity": as_metric(torch.where(mixed_Bs, cosine_Bs, 0.0).sum() / n_mixed),
        "candidates_used": used_B.float().mean(),
    }
    return cosine_Bs.masked_fill(~mixed_Bs, -torch.inf), metrics


def _pairs_or_draw(
    c: Contrast,
    k: int,
    n_mixes: int,
    *,
    pairs: Tensor | None,
    generator: torch.Generator | None,
    masked: bool,
) -> Tensor:
    """The given pairs, checked, or drawn ones: int64 [B, n_mixes, 2] on the device of the anchors."""
    available = _available(c, k)
    if pairs is None:
        return draw_pairs(c.count_B.clamp(max=available), k=available, n_mixes=n_mixes, generator=generator)
    checks.check_pairs(pairs, batch_size=c.z1_BD.shape[0], n_mixes=n_mixes)
    checks.check_pair_ranks(pairs, upper=k if masked else available)
    return pairs.to(c.z1_BD.device)


def _available(c: Contrast, k: int) -> int:
    """k, or the number of candidate slots of an anchor where there are fewer."""
    return min(k, c.candidates_BC.shape[1] - 1)
