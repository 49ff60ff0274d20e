"""Whom an anchor must not be repelled from: worked out on the device, from what ranks tell each other of their rows.

Shape letters: B rows of the global batch, b of them this rank's, m negatives of each, N = B * m columns of everyone's,
k hits, c hashes of what a row holds.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from hncse_ray.encoder import to_device
from hncse_ray.negatives import NearHits
from hncse_ray.objectives import Share

Int64 = NDArray[np.int64]


@dataclass(frozen=True)
class ColumnFacts:
    """What decides which of everyone's negatives an anchor is repelled from.

    Attributes:
        ids_bm: row ids of this rank's negatives; -1 of those that are no rows, or not usable.
        contents_bmc: hashes of what they hold.
        documents_bm: their documents; None where these do not matter.
        row_ids_b: the anchors.
        kept_bt: hashes of what an anchor is not repelled from, in any order; repeated to fill up.
        own_documents_b: of the anchors; None as above.
        barred_bk: row ids that are too close to an anchor; -1 to fill up.
    """

    ids_bm: Int64
    contents_bmc: Int64
    documents_bm: Int64 | None
    row_ids_b: Int64
    kept_bt: Int64
    own_documents_b: Int64 | None
    barred_bk: Int64


def columns_mask(facts: ColumnFacts, usable_bm: Tensor, share: Share) -> Tensor:
    """Return which of everyone's usable negatives each anchor may be repelled from, bool ``[b, N]``.

    A row that several anchors have selected is a column once, the first time.
    """
    device = usable_bm.device

    def here(array: NDArray[Any]) -> Tensor:
        return to_device(array, device)

    ids_N = share.gather(here(facts.ids_bm)).flatten()
    contents_Nc = share.gather(here(facts.contents_bmc)).flatten(0, 1)
    sorted_N, order_N = ids_N.sort(stable=True)
    again_N = torch.zeros_like(ids_N, dtype=torch.bool)
    again_N[order_N[1:]] = (sorted_N[1:] == sorted_N[:-1]) & (sorted_N[1:] >= 0)
    mask_bN = share.gather(usable_bm).flatten() & ~again_N & (ids_N != here(facts.row_ids_b).unsqueeze(1))
    if facts.documents_bm is not None and facts.own_documents_b is not None:
        documents_N = share.gather(here(facts.documents_bm)).flatten()
        mask_bN &= (ids_N < 0) | (documents_N != here(facts.own_documents_b).unsqueeze(1))
    for kept_b in here(facts.kept_bt).T:
        for contents_N in contents_Nc.T:
            mask_bN &= contents_N != kept_b.unsqueeze(1)
    # Where each row that is too close stands among the columns, if it does; else behind them.
    barred_bk, N = here(facts.barred_bk), len(ids_N)
    at_bk = torch.searchsorted(sorted_N, barred_bk).clamp(max=N - 1)
    found_bk = (sorted_N[at_bk] == barred_bk) & (barred_bk >= 0)
    padded_bN = torch.nn.functional.pad(mask_bN, (0, 1))
    padded_bN.scatter_(1, torch.where(found_bk, order_N[at_bk], N), False)
    return padded_bN[:, :N]


def apart(near: NearHits, share: Share, device: torch.device) -> Tensor:
    """Return which rows of the batch the index keeps apart from each anchor, bool ``[b, B]``; see `near_hits`."""
    keys_bk, above_bk, nearest_bk, own_b = (
        to_device(array, device) for array in (near.keys_Bk, near.above_Bk, near.nearest_Bk, near.own_B)
    )
    own_B, keys_Bk = share.gather(own_b), share.gather(keys_bk)
    mine, theirs = (own_B, keys_bk), (own_b, keys_Bk)
    above_bB = _are_hits(*mine, above_bk) | _are_hits(*theirs, share.gather(above_bk)).T
    return above_bB | (_are_hits(*mine, nearest_bk) & _are_hits(*theirs, share.gather(nearest_bk)).T)


def _are_hits(targets_n: Tensor, keys_rk: Tensor, counted_rk: Tensor) -> Tensor:
    """Which of n targets are among the hits that count of r anchors, ``[r, n]``."""
    found_rn = torch.zeros(len(keys_rk), len(targets_n), dtype=torch.bool, device=keys_rk.device)
    for keys_r, counted_r in zip(keys_rk.T, counted_rk.T, strict=True):
        found_rn |= (keys_r.unsqueeze(1) == targets_n) & counted_r.unsqueeze(1)
    return found_rn


def share_a_key(keys_bn: Int64, share: Share, device: torch.device) -> Tensor:
    """Return which rows of the batch share a key with each of this rank's, bool ``[b, B]``; each does with itself."""
    own_bn = to_device(keys_bn, device)
    keys_Bn = share.gather(own_bn)
    shared_bB = torch.zeros(len(own_bn), len(keys_Bn), dtype=torch.bool, device=device)
    for own_b in own_bn.T:
        for keys_B in keys_Bn.T:
            shared_bB |= own_b.unsqueeze(1) == keys_B
    return shared_bB
