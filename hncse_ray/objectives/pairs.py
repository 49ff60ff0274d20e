"""Random pairs of candidate ranks, for mixing hard negatives."""

import torch
from torch import Tensor


def draw_pairs(used_B: Tensor, *, k: int, n_mixes: int, generator: torch.Generator | None) -> Tensor:
    """Draw pairs of ranks a < b for each row, uniformly and with replacement.

    One number in [0, 1) is drawn for each pair and then turned into ranks, so what is taken from the
    generator depends on B and `n_mixes` alone: equal generators give equal pairs on every rank and device.

    Args:
        used_B: number of candidates of each row, int64 [B], at most k.
        k: the largest number of candidates of a row.
        n_mixes: pairs for each row.
        generator: on any device; None stands for the default one of the device of `used_B`.

    Returns:
        int64 [B, n_mixes, 2] on the device of `used_B`, with 0 <= a < b < used in each row; (0, 1) throughout
        where a row has fewer than 2 candidates, for the caller to leave out.
    """
    device = used_B.device if generator is None else generator.device
    uniform_Bs = torch.rand(used_B.shape[0], n_mixes, generator=generator, device=device, dtype=torch.float32).to(
        used_B.device
    )
    # In the order (0, 1), (0, 2), (1, 2), (0, 3), ... the pairs of every smaller number of ranks come first,
    # so rows with different numbers of candidates share one table.
    table_k = max(k, 2)
    b_P, a_P = torch.tril_indices(table_k, table_k, offset=-1, device=used_B.device)
    n_pairs_B1 = (used_B * (used_B - 1) // 2).unsqueeze(1)
    # The product may round up to n_pairs itself.
    index_Bs = torch.minimum((uniform_Bs * n_pairs_B1).long(), n_pairs_B1 - 1).clamp(min=0)
    return torch.stack([a_P[index_Bs], b_P[index_Bs]], dim=2)
