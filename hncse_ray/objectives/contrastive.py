"""InfoNCE over dropout views, the objective of unsupervised SimCSE, with two views or three."""

from functools import partial

from torch import Tensor

from hncse_ray.objectives import checks
from hncse_ray.objectives.share import WHOLE, Share
from hncse_ray.objectives.similarity import Columns, Metrics, autocast_off, contrast, cross_entropy, means, shared_means


def info_nce(
    z1: Tensor,
    z2: Tensor,
    negatives: Tensor | None = None,
    *,
    temperature: float,
    negatives_mask: Tensor | None = None,
    columns: Columns = "own",
    columns_mask: Tensor | None = None,
    batch_mask: Tensor | None = None,
    share: Share = WHOLE,
) -> tuple[Tensor, Metrics]:
    """Contrast each anchor's positive with the batch and with global negatives.

    Row i of the logits is `[z1_i . z2_1, ..., z1_i . z2_B, z1_i . g_i1, ..., z1_i . g_im] / temperature`;
    its label is i. With `columns="all"` the negatives of every anchor are columns of every row: after the B
    of the batch, column j * m + n, counted from 0, is z1_i . g_jn. Unsupervised SimCSE (Gao et al. 2021,
    arXiv 2104.08821), section 3; the paper's temperature is 0.05.

    Args:
        z1: anchors, unit-norm rows [B, D].
        z2: positives, unit-norm rows [B, D]; z2_j is also a negative of every anchor but j.
        negatives: each anchor's own global negatives, unit-norm [B, m, D].
        temperature: divides the cosines; above 0.
        negatives_mask: bool [B, m], True where a negative is usable; the others take no part, whatever they
            hold, and with "all" are no column of anyone.
        columns: "own" or "all". "none" is refused: nothing is mixed here, so negatives would have no use.
        columns_mask: bool [B, B * m], only with "all": True where anchor i may repel column j * m + n. It
            leaves out further columns, and does not stand in for `negatives_mask`.
        batch_mask: bool [B, B], True where anchor i may repel z2_j; the diagonal is not looked at. False for rows
            that are the same, or belong together: such a z2_j is no column of row i, and no candidate for mixing.
        share: which rows of a global batch these are: all of them, or those of one process of several, which gives its
            own b for the B above, and for the first B of both masks. The loss and the metrics are those of the batch.

    Returns:
        The loss, a scalar in fp32 (fp64 for fp64 inputs), and the metrics `positive_similarity`,
        `hardest_negative_similarity` (both mean cosines; the hardest is of the batch and the anchor's own
        negatives, whatever `columns` says) and `contrastive_accuracy` (a share, over all columns). With
        negatives also `negative_similarity`, the mean cosine of the usable ones to the anchors that own
        them, 0 if there are none.

    Raises:
        ValueError: shapes or dtypes do not fit together, B < 2, or an argument is out of its range.
    """
    checks.check_positive("temperature", temperature)
    checks.check_negatives_are_columns(columns)
    with autocast_off(z1):
        c = contrast(
            z1, z2, negatives, negatives_mask,
            columns=columns, columns_mask=columns_mask, batch_mask=batch_mask, share=share,
        )  # fmt: skip
        loss, is_highest_b, hardest_b = cross_entropy(c, c.z2_BD, temperature=temperature)
        return loss, means(share, shared_means(c, is_highest_b, hardest_b))


def three_view(
    z1: Tensor,
    z2: Tensor,
    z3: Tensor,
    negatives: Tensor | None = None,
    *,
    temperature: float,
    negatives_mask: Tensor | None = None,
    columns: Columns = "own",
    columns_mask: Tensor | None = None,
    batch_mask: Tensor | None = None,
    share: Share = WHOLE,
) -> tuple[Tensor, Metrics]:
    """Chain three dropout views of each sentence: `info_nce(z1, z2) + info_nce(z2, z3)`.

    A sentence's global negatives are those of z1_i in the first term and of z2_i in the second.

    Args:
        z1: first view, unit-norm rows [B, D].
        z2: second view, unit-norm rows [B, D].
        z3: third view, unit-norm rows [B, D].
        negatives: each sentence's own global negatives, unit-norm [B, m, D].
        temperature: divides the cosines; above 0.
        negatives_mask: see `info_nce`.
        columns: see `info_nce`.
        columns_mask: see `info_nce`.
        batch_mask: see `info_nce`.
        share: see `info_nce`.

    Returns:
        The loss, and the metrics of `info_nce`, each the mean over the two terms.

    Raises:
        ValueError: shapes or dtypes do not fit together, B < 2, or an argument is out of its range.
    """
    checks.check_views(z1, z2=z2, z3=z3, fewest=2 if share.processes == 1 else 1)
    term = partial(
        info_nce,
        negatives=negatives,
        temperature=temperature,
        negatives_mask=negatives_mask,
        columns=columns,
        columns_mask=columns_mask,
        batch_mask=batch_mask,
        share=share,
    )
    first, first_metrics = term(z1, z2)
    second, second_metrics = term(z2, z3)
    metrics = {name: (value + second_metrics[name]) / 2 for name, value in first_metrics.items()}
    return first + second, metrics
