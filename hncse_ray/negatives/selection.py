"""From the index's hits to the negatives of anchors: drop likely false negatives, then choose m an anchor.

Every anchor is chosen for by itself, so that a part of a batch gets what it gets in the whole.

Letters of shapes: B anchors, k hits of each, m negatives chosen for each.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

from hncse_ray.config import NegativesSettings

Int64 = npt.NDArray[np.int64]
Float32 = npt.NDArray[np.float32]
Bool = npt.NDArray[np.bool_]

SAMPLINGS = ("top", "uniform", "softmax", "bands")
RULES = ("itself", "same_content", "same_document", "in_batch", "max_score", "relative_margin", "skip_hardest")
FATES = ("no_hit", "left", "taken", *RULES)
"""What may become of a hit: there is none, it is left, it is a negative, or the rule that removes it."""
_NO_HIT, _LEFT, _TAKEN = range(3)


@dataclass(frozen=True)
class SelectionRules:
    """Which hits may be negatives, and which of those are taken.

    Args:
        per_anchor: m, negatives of an anchor; at least 1.
        max_score: hits scoring above are dropped as likely false negatives; None: no limit.
        relative_margin: hits scoring above `(1 - relative_margin)` of the positive's score are dropped; None: no limit.
        skip_hardest: of what is left, pass over so many of the hardest.
        sampling: `top` takes the hardest, `uniform` any with equal chance, `softmax` each with a probability
            in proportion to exp(score / temperature); always without replacement. `bands` takes any of the first
            band of ranks, then any of the second, and so on, from the first again behind the last.
        temperature: of softmax sampling; above 0.
        bands: last rank of each band but the last, counted from 1 among the hits that are left; rising.
        exclude_batch: drop hits that hold what a row of the batch holds.

    Raises:
        ValueError: a number is out of its range or the sampling is unknown.
    """

    per_anchor: int
    max_score: float | None
    relative_margin: float | None
    skip_hardest: int
    sampling: Literal["top", "uniform", "softmax", "bands"]
    temperature: float
    bands: tuple[int, ...] = ()
    exclude_batch: bool = True

    @classmethod
    def of(cls, settings: NegativesSettings, *, per_anchor: int, exclude_batch: bool) -> SelectionRules:
        """Return the rules that the settings of a run ask for."""
        return cls(
            per_anchor=per_anchor,
            max_score=settings.max_score,
            relative_margin=settings.relative_margin,
            skip_hardest=settings.skip_hardest,
            sampling=settings.sampling,
            temperature=settings.sampling_temperature,
            bands=settings.bands,
            exclude_batch=exclude_batch,
        )

    def __post_init__(self) -> None:
        if self.per_anchor < 1:
            raise ValueError(f"per_anchor is {self.per_anchor}, must be at least 1")
        if self.skip_hardest < 0:
            raise ValueError(f"skip_hardest is {self.skip_hardest}, must be at least 0")
        if self.sampling not in SAMPLINGS:
            raise ValueError(f"sampling is {self.sampling!r}, must be one of {', '.join(SAMPLINGS)}")
        if not self.temperature > 0:
            raise ValueError(f"temperature is {self.temperature}, must be above 0")


@dataclass(frozen=True, eq=False)
class Selection:
    """The negatives of a batch.

    Args:
        ids_Bm: row ids int64 [B, m], in the order of the hits within an anchor; -1 where not usable.
        scores_Bm: their cosines fp32 [B, m]; 0 where not usable.
        mask_Bm: bool [B, m], True where usable; the usable ones of an anchor stand first.
        barred_Bk: row ids of the hits that `max_score` or `relative_margin` removed; -1 elsewhere.
        removed: hits that each rule of `RULES` removed, a hit counted by the first rule that removes it.
        fates_Bk: what became of each hit, int8 [B, k], its place in `FATES`.
    """

    ids_Bm: Int64
    scores_Bm: Float32
    mask_Bm: Bool
    barred_Bk: Int64
    removed: dict[str, int]
    fates_Bk: npt.NDArray[np.int8]


def select(
    ids_Bk: Int64,
    scores_Bk: Float32,
    *,
    row_ids_B: Int64,
    contents: Callable[[Int64], Int64],
    documents: Int64 | None = None,
    positive_score: float | Float32,
    rules: SelectionRules,
    seed: Sequence[int],
    batch_ids: Int64 | None = None,
    first: int = 0,
) -> Selection:
    """Choose the negatives of anchors from the index's hits. The outcome depends on nothing but the arguments.

    The rules act in the order of `Selection.removed`; then `rules.sampling` takes up to m of the survivors.
    Where fewer are left the mask says so: no row is repeated and no rule is bent to fill up. Limits of scores
    are compared in fp32, and a score equal to a limit is kept.

    Args:
        ids_Bk: row ids of the hits [B, k], best first, each at most once an anchor; -1: no hit (its score is
            -inf), counted nowhere.
        scores_Bk: their cosines [B, k], which the limits are of.
        row_ids_B: row ids of the anchors [B].
        contents: of row ids [...], the hashes of what the rows hold [..., n]: their tokens, those of their targets.
            Rows that share one are never contrasted.
        documents: what the document of each row is known by [N]; rows that share one are never contrasted. None: rows
            have no documents, or are contrasted all the same.
        positive_score: what each anchor scores with its positive [B], or all of them, the measure of
            `relative_margin`.
        rules: which hits may be negatives, and which of those are taken.
        seed: integers >= 0 that the sampling is drawn from, such as the run's seed and the batch's number.
        batch_ids: row ids of the whole batch, if these anchors are a part of it.
        first: place of the first of these anchors in the batch: what is drawn for an anchor hangs on its place.

    Returns:
        The negatives, with the mask and the counts that go with them.

    Raises:
        ValueError: shapes do not fit together, the score of a hit is not finite, or `relative_margin` is set
            and `positive_score` is not finite.
    """
    hits = _Hits(
        ids_Bk=np.asarray(ids_Bk, np.int64),
        scores_Bk=np.asarray(scores_Bk, np.float32),
        row_ids_B=np.asarray(row_ids_B, np.int64),
        batch_ids=np.asarray(row_ids_B if batch_ids is None else batch_ids, np.int64),
        contents=contents,
        documents=documents,
    )
    limit = _margin_limit(positive_score, rules.relative_margin)
    fates_Bk = _fates(hits, margin_limit=limit, rules=rules)
    removed = {rule: int(np.count_nonzero(fates_Bk == FATES.index(rule))) for rule in RULES}
    alive_Bk = fates_Bk == _LEFT
    order_Bk = _order(hits.scores_Bk, alive_Bk, rules=rules, draw=_draw(seed, first * alive_Bk.shape[1]))
    chosen_Bk = np.zeros_like(alive_Bk)
    np.put_along_axis(chosen_Bk, order_Bk[:, : rules.per_anchor], True, axis=1)
    chosen_Bk &= alive_Bk
    fates_Bk[chosen_Bk] = _TAKEN

    # The chosen ones move to the front, in the order of the hits.
    anchors, positions = np.nonzero(chosen_Bk)
    slots = np.cumsum(chosen_Bk, axis=1)[anchors, positions] - 1
    shape = (len(chosen_Bk), rules.per_anchor)
    ids_Bm, scores_Bm = np.full(shape, -1, np.int64), np.zeros(shape, np.float32)
    mask_Bm = np.zeros(shape, np.bool_)
    ids_Bm[anchors, slots] = hits.ids_Bk[anchors, positions]
    scores_Bm[anchors, slots] = hits.scores_Bk[anchors, positions]
    mask_Bm[anchors, slots] = True
    too_close_Bk = np.isin(fates_Bk, [FATES.index("max_score"), FATES.index("relative_margin")])
    barred_Bk = np.where(too_close_Bk, hits.ids_Bk, -1)
    return Selection(ids_Bm, scores_Bm, mask_Bm, barred_Bk, removed, fates_Bk)


@dataclass(frozen=True, eq=False)
class _Hits:
    """The arrays of one call of `select`, checked."""

    ids_Bk: Int64
    scores_Bk: Float32
    row_ids_B: Int64
    batch_ids: Int64
    contents: Callable[[Int64], Int64]
    documents: Int64 | None

    def __post_init__(self) -> None:
        if self.ids_Bk.ndim != 2:
            raise ValueError(f"ids_Bk must be [B, k], got shape {self.ids_Bk.shape}")
        B, k = self.ids_Bk.shape
        for name, shape in {"scores_Bk": (B, k), "row_ids_B": (B,)}.items():
            if (found := getattr(self, name).shape) != shape:
                raise ValueError(f"{name} must have shape {shape} to fit ids_Bk {(B, k)}, got {found}")
        if not np.isfinite(self.scores_Bk[self.ids_Bk >= 0]).all():
            raise ValueError("scores_Bk: the score of a hit is not finite")

    def same_content(self, ids: Int64) -> Bool:
        """Which rows [B, n] share what they hold with the anchor [B]."""
        theirs, own = self.contents(ids), self.contents(self.row_ids_B)
        pairs = itertools.product(np.moveaxis(theirs, -1, 0), own.T)  # few; all at once would be a large array
        shared: Bool = functools.reduce(np.logical_or, [their == of_anchor[:, None] for their, of_anchor in pairs])
        return shared

    def same_document(self, ids: Int64) -> Bool:
        """Which rows [B, n] are of the anchor's document [B]."""
        if self.documents is None:
            return np.zeros(ids.shape, np.bool_)
        same: Bool = self.documents[ids] == self.documents[self.row_ids_B][:, None]
        return same


def _margin_limit(positive_score: float | Float32, relative_margin: float | None) -> Float32 | None:
    """Return the limit of each anchor, or of all, to be compared with [B, k]."""
    if relative_margin is None:
        return None
    if not np.isfinite(positive_score).all():
        raise ValueError(f"positive_score is {positive_score}; relative_margin needs a finite one")
    return (np.asarray(positive_score, np.float64).reshape(-1, 1) * (1 - relative_margin)).astype(np.float32)


def _fates(hits: _Hits, *, margin_limit: Float32 | None, rules: SelectionRules) -> npt.NDArray[np.int8]:
    """Apply the rules; return what became of each hit [B, k], as far as they decide it."""

    def above(limit: float | Float32 | None) -> Bool:
        return np.zeros(hits.ids_Bk.shape, np.bool_) if limit is None else hits.scores_Bk > np.float32(limit)

    in_batch_Bk = above(None)
    if rules.exclude_batch:
        in_batch_Bk = np.any(np.isin(hits.contents(hits.ids_Bk), hits.contents(hits.batch_ids)), axis=-1)
    breaches: dict[str, Bool] = {
        "itself": hits.ids_Bk == hits.row_ids_B[:, None],
        "same_content": hits.same_content(hits.ids_Bk),
        "same_document": hits.same_document(hits.ids_Bk),
        "in_batch": in_batch_Bk,
        "max_score": above(rules.max_score),
        "relative_margin": above(margin_limit),
    }
    fates_Bk = np.where(hits.ids_Bk >= 0, _LEFT, _NO_HIT).astype(np.int8)
    for rule, breach_Bk in breaches.items():
        fates_Bk[(fates_Bk == _LEFT) & breach_Bk] = FATES.index(rule)
    alive_Bk = fates_Bk == _LEFT
    fates_Bk[alive_Bk & (np.cumsum(alive_Bk, axis=1) <= rules.skip_hardest)] = FATES.index("skip_hardest")
    return fates_Bk


def _draw(seed: Sequence[int], skip: int) -> np.random.Generator:
    """Return a generator that has given away so many numbers, each of which takes one of the 64 bits that it makes."""
    draw = np.random.default_rng(list(seed))
    draw.bit_generator.advance(skip)  # type: ignore[attr-defined]  # PCG64 has it
    return draw


def _order(scores_Bk: Float32, alive_Bk: Bool, *, rules: SelectionRules, draw: np.random.Generator) -> Int64:
    """Return positions of hits [B, k] in the order they are taken in, survivors before all others.

    Adding Gumbel noise to log-weights and sorting draws without replacement in proportion to the weights
    (Kool et al. 2019, arXiv 1903.06059); equal weights make it a uniform draw.
    """
    if rules.sampling == "bands":
        return _order_by_bands(alive_Bk, rules.bands, draw=draw)
    keys_Bk = np.zeros(alive_Bk.shape)  # equal keys keep the order of the hits: `top`
    if rules.sampling != "top":
        keys_Bk += draw.gumbel(size=alive_Bk.shape)
    if rules.sampling == "softmax":
        keys_Bk += np.where(alive_Bk, scores_Bk, 0).astype(np.float64) / rules.temperature
    # lexsort: by its last key first, stable
    return np.lexsort((-keys_Bk, ~alive_Bk), axis=1)


def _order_by_bands(alive_Bk: Bool, bands: Sequence[int], *, draw: np.random.Generator) -> Int64:
    """Shuffle each band of the survivors' ranks, then deal the bands out in turn."""
    ranks_Bk = np.cumsum(alive_Bk, axis=1) - 1
    band_Bk = np.where(alive_Bk, np.searchsorted(bands, ranks_Bk, side="right"), len(bands) + 1)
    chance_Bk = draw.random(alive_Bk.shape)
    by_band_Bk = np.lexsort((chance_Bk, band_Bk), axis=1)
    starts = np.array([0, *bands, 0])[np.take_along_axis(band_Bk, by_band_Bk, 1)]
    turn_Bk = np.empty_like(by_band_Bk)  # how many of its band come before a hit
    np.put_along_axis(turn_Bk, by_band_Bk, np.arange(alive_Bk.shape[1]) - starts, axis=1)
    order_Bk: Int64 = np.lexsort((band_Bk, turn_Bk, ~alive_Bk), axis=1)
    return order_Bk
