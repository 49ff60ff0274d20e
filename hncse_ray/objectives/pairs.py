"""Random pairs of candidate ranks, for mixing hard negatives."""

import torch
from torch import Tensor


def draw_pairs(
    used_b: Tensor,
    *,
    k: int,
    n_mixes: int,
    generator: torch.Generator | None,
    start: int = 0,
    batch_size: int | None = None,
) -> Tensor:
    """Draw pairs of ranks a < b for each row, uniformly and with replacement.

    One number in [0, 1) is drawn for each pair and then turned into ranks, so what is taken from the
    generator depends on B and `n_mixes` alone: equal generators give equal pairs on every rank and device.

    Args:
        used_b: number of candidates of each row, int64 [b], at most k.
        k: the largest number of candidates of a row.
        n_mixes: pairs for each row.
        start: number of the first row in the batch.
        batch_size: rows of the batch, B; numbers are drawn for all of them. None: these are all.
        generator: on any device; None stands for the default one of the device of `used_b`.

    Returns:
        int64 [b, n_mixes, 2] on the device of `used_b`, with 0 <= a < b < used in each row; (0, 1) throughout
        where a row has fewer than 2 candidates, for the caller to leave out.
    """
    device = used_b.device if generator is None else generator.device
    rows = len(used_b)
    drawn_Bs = torch.rand(batch_size or rows, n_mixes, generator=generator, device=device, dtype=torch.float32)
    uniform_bs = drawn_Bs[start : start + rows].to(used_b.device)
    # In the order (0, 1), (0, 2), (1, 2), (0, 3), ... the pairs of every smaller number of ranks come first,
    # so rows with different numbers of candidates share one table.
    table_k = max(k, 2)
    b_P, a_P = torch.tril_indices(table_k, table_k, offset=-1, device=used_b.device)
    n_pairs_b1 = (used_b * (used_b - 1) // 2).unsqueeze(1)
    # The product may round up to n_pairs itself.
    index_bs = torch.minimum((uniform_bs * n_pairs_b1).long(), n_pairs_b1 - 1).clamp(min=0)
    return torch.stack([a_P[index_bs], b_P[index_bs]], dim=2)
