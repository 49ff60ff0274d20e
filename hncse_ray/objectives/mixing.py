"""HNCSE (Liu et al. 2024, arXiv 2411.12156): mixed positives, mixed hard negatives, and both at once.

The published code searches the mixing weights by Optuna inside every forward pass. Here they are plain
arguments, and a sweep over whole runs finds them.
"""

import torch
from torch import Tensor

from hncse_ray.objectives import checks
from hncse_ray.objectives.pairs import draw_pairs
from hncse_ray.objectives.share import WHOLE, Share
from hncse_ray.objectives.similarity import (
    MIN_NORM,
    Columns,
    Contrast,
    Metrics,
    autocast_off,
    contrast,
    cross_entropy,
    means,
    normalise_or_keep,
    of_rows,
    shared_means,
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
    share: Share = WHOLE,
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
        share: see `info_nce`.

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
            z1, z2, negatives, negatives_mask,
            columns=columns, columns_mask=columns_mask, batch_mask=batch_mask, share=share,
        )  # fmt: skip
        hardest = c.hardest(1)
        positives_bD, shares = _mixed_positives(c, hardest, margin=margin, w_pos=w_pos, w_neg=w_neg)
        loss, is_highest_b, _ = cross_entropy(c, share.gather(positives_bD), temperature=temperature)
        return loss, means(share, shared_means(c, is_highest_b, hardest[0][:, 0]) | shares)


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
    share: Share = WHOLE,
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
        share: see `info_nce`.

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
            z1, z2, negatives, negatives_mask,
            columns=columns, columns_mask=columns_mask, batch_mask=batch_mask, share=share,
        )  # fmt: skip
        masked = negatives_mask is not None or batch_mask is not None
        pairs = _pairs_or_draw(c, k, n_mixes, pairs=pairs, generator=generator, masked=masked)
        hardest = c.hardest(c.available(k))
        mixes_bs, of_mixes = _mixed_negatives(c, hardest, pairs, alpha=alpha)
        loss, is_highest_b, _ = cross_entropy(c, c.z2_BD, mixes_bs, temperature=temperature)
        return loss, means(share, shared_means(c, is_highest_b, hardest[0][:, 0]) | of_mixes)


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
    share: Share = WHOLE,
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
        share: see `info_nce`.

    Returns:
        The loss, a scalar in fp32 (fp64 for fp64 inputs), and the metrics of both parts.

    Raises:
        ValueError: shapes or dtypes do not fit together, B < 2, or an argument or a rank is out of its range.
    """
    _check_positive_mixing(temperature=temperature, margin=margin, w_pos=w_pos, w_neg=w_neg)
    _check_negative_mixing(temperature=temperature, k=k, n_mixes=n_mixes, alpha=alpha)
    with autocast_off(z1):
        c = contrast(
            z1, z2, negatives, negatives_mask,
            columns=columns, columns_mask=columns_mask, batch_mask=batch_mask, share=share,
        )  # fmt: skip
        hardest = c.hardest(c.available(k))
        positives_bD, shares = _mixed_positives(c, hardest, margin=margin, w_pos=w_pos, w_neg=w_neg)
        masked = negatives_mask is not None or batch_mask is not None
        pairs = _pairs_or_draw(c, k, n_mixes, pairs=pairs, generator=generator, masked=masked)
        mixes_bs, of_mixes = _mixed_negatives(c, hardest, pairs, alpha=alpha)
        loss, is_highest_b, _ = cross_entropy(c, share.gather(positives_bD), mixes_bs, temperature=temperature)
        return loss, means(share, shared_means(c, is_highest_b, hardest[0][:, 0]) | shares | of_mixes)


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


def _mixed_positives(
    c: Contrast, hardest: tuple[Tensor, Tensor], *, margin: float, w_pos: float, w_neg: float
) -> tuple[Tensor, dict[str, tuple[Tensor, Tensor]]]:
    """The positives [b, D] after mixing, and the share of anchors in each case."""
    top_bk, slots_bk = hardest
    h_bD = c.take(slots_bk[:, :1]).squeeze(1)
    p_b = c.p_b
    q_b = (c.z1_bD * h_bD).sum(dim=1).masked_fill(top_bk[:, 0] == -torch.inf, -torch.inf)

    sum_b = p_b + q_b
    # p > 0 first: with it, (p - q) / p > margin is p - q > margin * p, which needs no division.
    weighted_b = (p_b > 0) & (p_b > q_b) & (p_b - q_b <= margin * p_b)
    by_similarity_b = (p_b > 0) & (p_b <= q_b) & (sum_b >= MIN_NORM)

    safe_sum_b = torch.where(by_similarity_b, sum_b, 1.0)
    of_positive_b = torch.where(by_similarity_b, p_b / safe_sum_b, w_pos)
    of_negative_b = torch.where(by_similarity_b, q_b / safe_sum_b, w_neg)
    mix_bD = of_positive_b.unsqueeze(1) * c.z2_bD + of_negative_b.unsqueeze(1) * h_bD
    positives_bD, mixed_b = normalise_or_keep(mix_bD, c.z2_bD, chosen_b=weighted_b | by_similarity_b)
    return positives_bD, {
        "share_kept": of_rows(~mixed_b),
        "share_weighted_mix": of_rows(mixed_b & weighted_b),
        "share_similarity_mix": of_rows(mixed_b & by_similarity_b),
    }


def _mixed_negatives(
    c: Contrast, hardest: tuple[Tensor, Tensor], pairs_bs2: Tensor, *, alpha: float
) -> tuple[Tensor, dict[str, tuple[Tensor, Tensor]]]:
    """Cosines of the mixed negatives to their anchors [b, s], -inf where there is no mix."""
    top_bk, slots_bk = hardest
    k = top_bk.shape[1]
    used_b = c.count_b.clamp(max=k)
    n_bkD = c.take(slots_bk)
    s_bk = (n_bkD @ c.z1_bD.unsqueeze(-1)).squeeze(-1).masked_fill(top_bk == -torch.inf, 0.0)
    gram_bkk = n_bkD @ n_bkD.transpose(1, 2)
    norm_squared_bk = gram_bkk.diagonal(dim1=1, dim2=2)

    within_bs = (pairs_bs2 < used_b[:, None, None]).all(dim=2) & (used_b >= 2).unsqueeze(1)
    a_bs, b_bs = pairs_bs2.clamp(max=k - 1).unbind(dim=2)
    beta = 1.0 - alpha
    mix_norm_squared_bs = (
        alpha**2 * norm_squared_bk.gather(1, a_bs)
        + beta**2 * norm_squared_bk.gather(1, b_bs)
        + 2 * alpha * beta * gram_bkk.flatten(1).gather(1, a_bs * k + b_bs)
    )
    mixed_bs = within_bs & (mix_norm_squared_bs >= _MIN_GRAM_NORM**2)
    mix_norm_bs = torch.where(mixed_bs, mix_norm_squared_bs, 1.0).sqrt()
    cosine_bs = (alpha * s_bk.gather(1, a_bs) + beta * s_bk.gather(1, b_bs)) / mix_norm_bs
    return cosine_bs.masked_fill(~mixed_bs, -torch.inf), {
        "mixed_negative_similarity": of_rows(cosine_bs, mixed_bs),
        "candidates_used": of_rows(used_b),
    }


def _pairs_or_draw(
    c: Contrast,
    k: int,
    n_mixes: int,
    *,
    pairs: Tensor | None,
    generator: torch.Generator | None,
    masked: bool,
) -> Tensor:
    """The given pairs, checked, or drawn ones: int64 [b, n_mixes, 2] on the device of the anchors."""
    available = c.available(k)
    if pairs is None:
        used_b, batch_size = c.count_b.clamp(max=available), len(c.z2_BD)
        how = {"k": available, "n_mixes": n_mixes, "start": c.share.start, "batch_size": batch_size}
        return draw_pairs(used_b, generator=generator, **how)
    checks.check_pairs(pairs, batch_size=c.z1_bD.shape[0], n_mixes=n_mixes)
    checks.check_pair_ranks(pairs, upper=k if masked else available)
    return pairs.to(c.z1_bD.device)
