"""InfoNCE over dropout views, the objective of unsupervised SimCSE, with two views or three."""

from torch import Tensor

from hncse_ray.objectives import checks
from hncse_ray.objectives.similarity import Metrics, autocast_off, contrast, cross_entropy, shared_metrics


def info_nce(
    z1: Tensor,
    z2: Tensor,
    negatives: Tensor | None = None,
    *,
    temperature: float,
    negatives_mask: Tensor | None = None,
) -> tuple[Tensor, Metrics]:
    """Contrast each anchor's positive with the batch and with the anchor's own global negatives.

    Row i of the logits is `[z1_i . z2_1, ..., z1_i . z2_B, z1_i . g_i1, ..., z1_i . g_im] / temperature`;
    its label is i. Unsupervised SimCSE (Gao et al. 2021, arXiv 2104.08821), section 3; the paper's
    temperature is 0.05.

    Args:
        z1: anchors, unit-norm rows [B, D].
        z2: positives, unit-norm rows [B, D]; z2_j is also a negative of every anchor but j.
        negatives: each anchor's own global negatives, unit-norm [B, m, D].
        temperature: divides the cosines; above 0.
        negatives_mask: bool [B, m], True where a negative is usable; the others take no part.

    Returns:
        The loss, a scalar in fp32 (fp64 for fp64 inputs), and the metrics `positive_similarity`,
        `hardest_negative_similarity` (both mean cosines) and `contrastive_accuracy` (a share).

    Raises:
        ValueError: shapes or dtypes do not fit together, B < 2, or a number is out of its range.
    """
    checks.check_positive("temperature", temperature)
    with autocast_off(z1):
        c = contrast(z1, z2, negatives, negatives_mask)
        loss, accuracy = cross_entropy([c.s_BB, c.s_Bm], temperature=temperature)
        return loss, shared_metrics(c, accuracy)


def three_view(z1: Tensor, z2: Tensor, z3: Tensor, *, temperature: float) -> tuple[Tensor, Metrics]:
    """Chain three dropout views of each sentence: `info_nce(z1, z2) + info_nce(z2, z3)`.

    Args:
        z1: first view, unit-norm rows [B, D].
        z2: second view, unit-norm rows [B, D].
        z3: third view, unit-norm rows [B, D].
        temperature: divides the cosines; above 0.

    Returns:
        The loss, and the metrics of `info_nce`, each the mean over the two terms.

    Raises:
        ValueError: shapes or dtypes do not fit together, B < 2, or a number is out of its range.
    """
    checks.check_views(z1, z2=z2, z3=z3)
    first, first_metrics = info_nce(z1, z2, temperature=temperature)
    second, second_metrics = info_nce(z2, z3, temperature=temperature)
    metrics = {name: (value + second_metrics[name]) / 2 for name, value in first_metrics.items()}
    return first + second, metrics
