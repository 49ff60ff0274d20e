"""What people look at to judge a run: a few hundred sentences and their neighbours, before and after training.

It is encoded at the end, with the weights from before training and with those that are exported, and kept as plain
values (:class:`Sampled`); the page of the run only draws it.

Shape letters: n sentences, q queries, b rows of a rank's batch.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from hncse_ray.config import Settings
from hncse_ray.corpus import Corpus
from hncse_ray.encoder import SentenceEncoder
from hncse_ray.evaluation import Encode, RetrievalSet, encode_unit, on_side
from hncse_ray.negatives import FATES
from hncse_ray.reporting.events import Event, Sampled
from hncse_ray.training.checkpoint import Weights
from hncse_ray.training.distributed import from_first
from hncse_ray.training.encoding import Alone
from hncse_ray.training.evaluator import EvaluationSets
from hncse_ray.training.label_free import SUITES as LABEL_FREE
from hncse_ray.training.lookup import LookedUp
from hncse_ray.training.negatives import GlobalNegatives
from hncse_ray.training.step import Seen
from hncse_ray.training.views import BatchViews

_ROWS, _QUERIES, _CANDIDATES = 256, 8, 96  # of the corpus; of the dev sets, and what these are searched among
_NEIGHBOURS = 10
_ANCHORS, _HITS = 10, 8
_TEXT = 300  # characters kept
_DRAW = (0, 4)  # a stream of random numbers beside those of the run
_BINS = 40
_HISTOGRAMS = 8  # of the cosines of a batch, beside that of the first step
_MOST_ROWS = 1024  # of a batch that are looked at: all pairs of a large one would be gigabytes

Counts = list[int]


@dataclass(frozen=True)
class Sample:
    """The sentences that are looked at: rows of the corpus, and some queries of dev with candidates.

    Attributes:
        texts: n sentences, distinct.
        queries: q of them.
        right: of each query the positions of its right answers among the texts.
        sides: whether texts and queries get the prompts of documents and queries.
    """

    texts: tuple[str, ...]
    queries: tuple[str, ...]
    right: tuple[tuple[int, ...], ...]
    sides: bool

    @classmethod
    def draw(cls, corpus: Corpus, sets: EvaluationSets, *, seed: int) -> Sample:
        """Choose by the seed alone, so that a resumed run looks at the same sentences."""
        rng = np.random.default_rng([seed, *_DRAW])
        rows = np.sort(rng.choice(len(corpus), min(_ROWS, len(corpus)), replace=False))
        texts = dict.fromkeys(corpus.target_texts(rows))
        sides = corpus.target_side is not None
        queries: dict[str, list[str]] = {}
        for (name, split), data in sets.sets.items():
            if split != "dev" or not isinstance(data, RetrievalSet) or name in LABEL_FREE or queries:
                continue
            sides = sides or data.sides
            for i in rng.choice(len(data.queries), min(_QUERIES, len(data.queries)), replace=False).tolist():
                queries[data.queries[i]] = [data.candidates[at] for at in data.grades[i]]
            others = rng.choice(len(data.candidates), min(_CANDIDATES, len(data.candidates)), replace=False).tolist()
            right = [text for of_query in queries.values() for text in of_query[:_NEIGHBOURS]]
            texts |= dict.fromkeys([*right, *(data.candidates[i] for i in others)])
        place = {text: i for i, text in enumerate(texts)}
        found = (tuple(place[text] for text in of_query if text in place) for of_query in queries.values())
        return cls(tuple(texts), tuple(queries), tuple(found), sides)

    def seen_by(self, encode: Encode) -> dict[str, Any]:
        """Return the nearest of each text and query, with cosines, and each text's place on a map; plain values.

        ``neighbours`` and ``query_neighbours`` hold ``[place, cosine]``, best first; ``map`` the two principal
        components, ``explained`` their share of the variance.
        """
        texts_nD = encode_unit(on_side(encode, "document") if self.sides else encode, self.texts)
        own_nn = texts_nD @ texts_nD.T
        np.fill_diagonal(own_nn, -np.inf)
        facts: dict[str, Any] = {"neighbours": _nearest(own_nn), "query_neighbours": []}
        if self.queries:
            queries_qD = encode_unit(on_side(encode, "query") if self.sides else encode, self.queries)
            facts["query_neighbours"] = _nearest(queries_qD @ texts_nD.T)
        positions_n2, explained = _principal(texts_nD)
        return facts | {"map": np.round(positions_n2, 3).tolist(), "explained": round(explained, 3)}

    def described(self) -> dict[str, Any]:
        """Return the sentences themselves; plain values."""
        return {"texts": list(map(shortened, self.texts)), "queries": list(map(shortened, self.queries)),
                "right": [list(positions) for positions in self.right]}  # fmt: skip


class SampleRecorder:
    """Records, at a few moments of a run, what its page shows. All ranks call it alike; the first one does it.

    Args:
        settings: of the run.
        corpus: its rows.
        sets: what it is scored on.
        encoder: that is trained.
        base: its weights before training.
        total_steps: of the run.
        emit: takes what is told.
    """

    def __init__(
        self,
        settings: Settings,
        corpus: Corpus,
        sets: EvaluationSets,
        encoder: SentenceEncoder,
        base: Weights,
        *,
        total_steps: int,
        emit: Callable[[Event], None],
    ) -> None:
        self._corpus, self._total, self._emit = corpus, total_steps, emit
        self._batches_a_step = settings.train.accumulation_steps
        self._sample = Sample.draw(corpus, sets, seed=settings.run.seed)
        self._encoder, self._encode = encoder, Alone(encoder, batch_size=settings.evaluation.batch_size)
        self._base = base
        self._before: dict[str, Any] = {}

    def step(self, step: int, seen: Seen) -> None:
        """After a step: at the start, a few times on the way, and at the end."""
        if step == 1 or step * _HISTOGRAMS // self._total > (step - 1) * _HISTOGRAMS // self._total:
            from_first(lambda: self._emit(Sampled(step, "similarities", similarities(seen))))

    def at_base(self) -> None:
        """At the end, with the weights from before training, which the first rank's encoder is left with."""

        def look() -> None:
            self._encoder.load_weights(self._base)
            self._before = self._sample.seen_by(self._encode)

        from_first(look)

    def last(self, step: int, negatives: GlobalNegatives | None, views: BatchViews | None) -> None:
        """At the end, with what is exported; ``negatives`` are the first rank's."""
        from_first(lambda: self._tell(step, negatives, views))

    def _tell(self, step: int, negatives: GlobalNegatives | None, views: BatchViews | None) -> None:
        facts = self._sample.described() | {"before": self._before, "after": self._sample.seen_by(self._encode)}
        self._emit(Sampled(step, "sentences", facts))
        # The rows of the last batch again, in what the index holds now.
        looked_up = None if negatives is None or step == 0 else negatives.look_up_again(step * self._batches_a_step - 1)
        if looked_up is not None:
            self._emit(Sampled(step, "negatives", mined(looked_up, self._corpus, views)))


def similarities(seen: Seen) -> dict[str, Any]:
    """Count the cosines that a step has compared, of this rank's rows: nothing is encoded for it.

    Of more than 1,024 rows it takes 1,024, evenly spaced.

    Returns:
        ``bins``, the edges, and counts of ``positive`` pairs, of pairs ``in batch`` that repel each other, and of
        anchors and their ``global`` negatives, without those of which there are none.
    """
    b = len(seen.z1_bD)
    rows = torch.linspace(0, b - 1, min(b, _MOST_ROWS), device=seen.z1_bD.device, dtype=torch.float64).long()
    z1_bD, z2_bD = seen.z1_bD[rows], seen.z2_bD[rows]
    scores_bb = (z1_bD @ z2_bD.T).float()
    apart_bb = ~torch.eye(len(rows), dtype=torch.bool, device=rows.device)
    if seen.mask_bb is not None:
        apart_bb &= seen.mask_bb[rows][:, rows]
    parts = {"positive": scores_bb.diagonal(), "in batch": scores_bb[apart_bb]}
    if (found := seen.neighbours) is not None:
        own_bm = torch.einsum("bd,bmd->bm", z1_bD.float(), found.vectors_BmD[rows].float())
        parts["global"] = own_bm[found.mask_Bm[rows]]
    counts = {name: _counts(cosines) for name, cosines in parts.items() if cosines.numel()}
    return {"bins": np.round(np.linspace(-1, 1, _BINS + 1), 3).tolist()} | counts


def mined(looked_up: LookedUp, corpus: Corpus, views: BatchViews | None = None) -> dict[str, Any]:
    """Return ten anchors of a batch with what the index finds for them, and what the rules do with each hit.

    Args:
        looked_up: of the batch.
        corpus: that the hits are rows of.
        views: the anchors of the batches, where they are made of passages.
    """
    anchors = corpus.texts(looked_up.row_ids_b) if views is None else list(views.of(looked_up.number).texts)
    hits, fates_Bk = looked_up.hits, looked_up.selection.fates_Bk
    rows = []
    for i in np.unique(np.linspace(0, len(anchors) - 1, _ANCHORS).astype(int)).tolist():
        target = int(looked_up.target_ids_b[i])
        shown = [k for k, fate in enumerate(fates_Bk[i]) if FATES[fate] not in ("no_hit", "itself")]
        taken = [k for k in shown if FATES[fates_Bk[i, k]] == "taken"]
        shown = sorted({*shown[:_HITS], *taken[: _HITS // 2]})
        ids = hits.ids_Bk[i, shown]
        (target_text,) = corpus.target_texts([target])
        rows.append(
            {
                "anchor": shortened(anchors[i]),
                "target": None if target_text == anchors[i] else shortened(target_text),
                "hits": [
                    {"text": shortened(text), "cosine": round(float(hits.scores_Bk[i, k]), 3), "rank": k + 1,
                     "fate": FATES[fates_Bk[i, k]], "is_target": int(at) == target}
                    for text, k, at in zip(corpus.target_texts(ids), shown, ids, strict=True)
                ],
            }
        )  # fmt: skip
    return {"index_step": hits.version.step, "anchors": rows}


def shortened(text: str) -> str:
    """Return a text in one line, cut after a word where it is long; within one that fills half of it."""
    text = " ".join(text.split())
    if len(text) <= _TEXT:
        return text
    end = text.rfind(" ", _TEXT // 2, _TEXT)
    return text[: _TEXT - 1 if end < 0 else end] + "…"


def _nearest(scores: NDArray[np.floating[Any]]) -> list[list[tuple[int, float]]]:
    k = min(_NEIGHBOURS, scores.shape[1])
    order = np.argsort(-scores, axis=1, kind="stable")[:, :k]
    best = np.take_along_axis(scores, order, axis=1)
    return [
        [(at, round(score, 3)) for at, score in zip(positions, own, strict=True) if np.isfinite(score)]
        for positions, own in zip(order.tolist(), best.tolist(), strict=True)
    ]


def _principal(vectors_nD: NDArray[np.floating[Any]]) -> tuple[NDArray[np.floating[Any]], float]:
    """Return the two principal components ``[n, 2]`` and their share of the variance."""
    centred_nD = vectors_nD - vectors_nD.mean(axis=0)
    left, singular, _ = np.linalg.svd(centred_nD, full_matrices=False)
    positions = np.zeros((len(vectors_nD), 2))
    positions[:, : len(singular[:2])] = left[:, :2] * singular[:2]
    return positions, float((singular[:2] ** 2).sum() / max((singular**2).sum(), 1e-12))


def _counts(cosines: Tensor) -> Counts:
    counts: Counts = torch.histc(cosines.clamp(-1, 1).float().cpu(), bins=_BINS, min=-1, max=1).int().tolist()
    return counts
