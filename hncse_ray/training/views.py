"""Positives from structure: what an anchor and its positive are where a corpus of passages gives no pairs.

Texts are made and tokenised when their batch comes near, in a thread beside the steps. They depend on the run's seed,
the batch's number and the row alone: a rank makes those of its own rows, a resumed run the same again.
"""

from __future__ import annotations

import re
import threading
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from hncse_ray.config import Settings, ViewKind
from hncse_ray.corpus import BatchPlan, Corpus, OwnTokens, Tokenize, rank_slice, row_hash, sentences_or_runs
from hncse_ray.corpus.sentences import count_words
from hncse_ray.encoder import SentenceEncoder
from hncse_ray.errors import DataError
from hncse_ray.reading import titled
from hncse_ray.training.distributed import rank, world_size

Int64 = NDArray[np.int64]
Bool = NDArray[np.bool_]
TokenRow = NDArray[np.int32]
Pair = tuple[str, str]

_LEAST_CROP_WORDS, _LEAST_SENTENCE_WORDS = 3, 4
_COUNTED_ROWS = 50_000  # whose words are counted at most
_LOOKED_AT, _LEAST_POSSIBLE = 1000, 0.02  # rows that a kind is tried on before the run, and the share it must do for
_WORD = re.compile(r"\w\w+")
_STREAM = 0x5EED  # tells these draws from others of the same seed and number


@dataclass(frozen=True)
class Views:
    """The two views of each row of a batch, or of a part of it.

    Attributes:
        kinds: of each row [b].
        anchors: token rows of the first views [b].
        texts: of the anchors [b].
        targets: token rows of the second views [b].
        target_ids_b: the row whose passage the target is of: the row itself, but for kind ``neighbour``.
        hashes_b2: of the token rows of both views.
        rows: the rows' own token rows [b], both views of kind ``dropout``.
        row_hashes_b: of these.
        impossible: how often a kind was drawn that a row does not do for.
        dropped: of how many rows the pair was given up, by its kind.
    """

    kinds: tuple[ViewKind, ...]
    anchors: Sequence[TokenRow]
    texts: Sequence[str]
    targets: Sequence[TokenRow]
    target_ids_b: Int64
    hashes_b2: Int64
    rows: Sequence[TokenRow]
    row_hashes_b: Int64
    impossible: Counter[ViewKind]
    dropped: Counter[ViewKind]

    @property
    def paired_b(self) -> Bool:
        """Which rows have an anchor of their own."""
        return np.array([kind != "dropout" for kind in self.kinds])

    def without(self, dropped_b: Bool) -> Views:
        """Return these views, but for some rows whose two views are dropout passes now."""
        if not dropped_b.any():
            return self
        kinds, anchors, targets = list(self.kinds), list(self.anchors), list(self.targets)
        positions = np.flatnonzero(dropped_b).tolist()
        for i in positions:
            kinds[i], anchors[i], targets[i] = "dropout", self.rows[i], self.rows[i]
        return replace(
            self,
            kinds=tuple(kinds),
            anchors=anchors,
            targets=targets,
            hashes_b2=np.where(dropped_b[:, None], self.row_hashes_b[:, None], self.hashes_b2),
            dropped=Counter(self.kinds[i] for i in positions),
        )


@dataclass(frozen=True)
class _Passage:
    """A row, as the kinds see it."""

    id: int
    title: str | None
    body: str
    text: str


class ViewMaker:
    """Makes the two views of each row of a batch.

    A row's kind is the first of a random order of all kinds, by their weights, that the row does for; else dropout.

    Args:
        settings: of the run.
        corpus: passages.
        tokenize: makes token rows.
    """

    def __init__(self, settings: Settings, corpus: Corpus, tokenize: Tokenize) -> None:
        self._settings, self._corpus, self._seed = settings.views, corpus, settings.run.seed
        self._own = OwnTokens(tokenize, settings.encoder.max_length)
        self._unit_has_title = settings.corpus.unit == "title_and_passage"
        weights = settings.views.mix.asked_for
        self._kinds, self._log_weights = tuple(weights), np.log(list(weights.values()))

    def __call__(self, number: int, ids_b: Int64) -> Views:
        """Return the views of a batch."""
        rows, impossible = self._corpus.token_rows(ids_b), Counter[ViewKind]()
        kinds: list[ViewKind] = ["dropout"] * len(ids_b)
        pairs: dict[int, Pair] = {}
        target_ids_b = np.array(ids_b, dtype=np.int64)
        passages = self._passages(ids_b)
        for i, passage in enumerate(passages):
            rng = np.random.default_rng((self._seed, number, passage.id, _STREAM))
            for k in np.argsort(-(self._log_weights + rng.gumbel(size=len(self._kinds))), kind="stable"):
                kind = self._kinds[k]
                if kind == "dropout":
                    break
                if (pair := self.pair(kind, passage, rng)) is not None:
                    kinds[i], pairs[i] = kind, pair
                    break
                impossible[kind] += 1
        anchors, targets = list(rows), list(rows)
        texts = [passage.text for passage in passages]
        anchor_rows = self._own([anchor for anchor, _ in pairs.values()], "query")
        target_rows = self._own([target for _, target in pairs.values()], "document")
        for i, anchor, target in zip(pairs, anchor_rows, target_rows, strict=True):
            if anchor is None or target is None or np.array_equal(anchor, target):  # the model sees no pair
                impossible[kinds[i]] += 1
                kinds[i] = "dropout"
                continue
            anchors[i], targets[i], texts[i] = anchor, target, pairs[i][0]
            if kinds[i] == "neighbour":
                target_ids_b[i] = self._adjacent(int(ids_b[i]))
        hashes_b2 = np.array([[row_hash(a), row_hash(t)] for a, t in zip(anchors, targets, strict=True)], np.int64)
        return Views(
            kinds=tuple(kinds),
            anchors=anchors,
            texts=texts,
            targets=targets,
            target_ids_b=target_ids_b,
            hashes_b2=hashes_b2,
            rows=rows,
            row_hashes_b=self._corpus.hashes[ids_b],
            impossible=impossible,
            dropped=Counter(),
        )

    def begin(self) -> None:
        """Do beforehand what takes seconds on a large corpus: no look-up should have to wait for it."""
        if "keywords" in self._kinds:
            self._rows_with.total()

    def share_possible(self, kind: ViewKind) -> tuple[int, int]:
        """Return how many rows of a sample a kind does for, and of how many."""
        ids = np.unique(np.linspace(0, len(self._corpus) - 1, _LOOKED_AT).astype(np.int64))
        found = [self.pair(kind, passage, np.random.default_rng(0)) for passage in self._passages(ids)]
        return sum(pair is not None for pair in found), len(ids)

    def pair(self, kind: ViewKind, passage: _Passage, rng: np.random.Generator) -> Pair | None:
        """Return anchor and positive of a kind; None if the passage does not do for it."""
        match kind:
            case "title":
                return (passage.title, passage.body) if passage.title and passage.body else None
            case "crop":
                return self._crops(passage, rng)
            case "cloze":
                return self._cloze(passage, rng)
            case "neighbour":
                adjacent = self._adjacent(passage.id)
                return None if adjacent < 0 or not passage.body else (passage.body, self._corpus.texts([adjacent])[0])
            case "keywords":
                return self._keywords(passage, rng)
        return None

    def _passages(self, ids: Int64) -> list[_Passage]:
        c = self._corpus
        columns = zip(ids.tolist(), c.titles(ids), c.bodies(ids), c.texts(ids), strict=True)
        return [_Passage(*values) for values in columns]

    def _crops(self, passage: _Passage, rng: np.random.Generator) -> Pair | None:
        words, blank = passage.body.split(), " "
        if len(words) < count_words(passage.body):  # a script that parts no words
            words, blank = list(passage.body), ""
        if len(words) < 2 * _LEAST_CROP_WORDS:
            return None
        crops = []
        for share in rng.uniform(self._settings.crop_least, self._settings.crop_most, size=2):
            size = max(_LEAST_CROP_WORDS, round(share * len(words)))
            start = int(rng.integers(len(words) - size + 1))
            crops.append(blank.join(words[start : start + size]))
        return crops[0], crops[1]

    def _cloze(self, passage: _Passage, rng: np.random.Generator) -> Pair | None:
        sentences = sentences_or_runs(passage.body)
        asked = [i for i, sentence in enumerate(sentences) if count_words(sentence) >= _LEAST_SENTENCE_WORDS]
        if len(sentences) < 2 or not asked:
            return None
        at = asked[int(rng.integers(len(asked)))]
        rest = passage.body
        if rng.random() >= self._settings.cloze_keep:
            rest = " ".join(sentences[:at] + sentences[at + 1 :])
        return sentences[at], titled(passage.title, rest) if self._unit_has_title else rest

    def _keywords(self, passage: _Passage, rng: np.random.Generator) -> Pair | None:
        positions: dict[str, int] = {}
        words = _WORD.findall(passage.text)
        for place, word in enumerate(words):
            positions.setdefault(word.lower(), place)
        if len(positions) < self._settings.keywords_least:
            return None
        count = int(rng.integers(self._settings.keywords_least, self._settings.keywords_most + 1))
        rarest = sorted(positions, key=lambda word: (self._rows_with[word], positions[word]))[:count]
        return " ".join(words[place] for place in sorted(positions[word] for word in rarest)), passage.text

    @cached_property
    def _rows_with(self) -> Counter[str]:
        """Count the rows that hold a word, in a sample of the corpus that does not hang on chance."""
        counts: Counter[str] = Counter()
        ids = np.unique(np.linspace(0, len(self._corpus) - 1, _COUNTED_ROWS).astype(np.int64))
        for part in np.array_split(ids, max(1, len(ids) // 1000)):
            for text in self._corpus.texts(part):
                counts.update({word.lower() for word in _WORD.findall(text)})
        return counts

    def _adjacent(self, row: int) -> int:
        """Return the next passage of a row's document, of the last the one before; -1 where it stands alone."""
        following = int(self._corpus.next_in_document([row])[0])
        if following < 0 and row > 0 and int(self._corpus.next_in_document([row - 1])[0]) == row:
            return row - 1
        return following


def batch_views(settings: Settings, corpus: Corpus, plan: BatchPlan, encoder: SentenceEncoder) -> BatchViews:
    """Return the views of a run's batches."""
    maker = ViewMaker(settings, corpus, encoder.token_rows)
    maker.begin()
    return BatchViews(maker, plan, kinds=settings.views.mix.asked_for, ahead=settings.negatives.prefetch_batches)


class BatchViews:
    """The views of this rank's rows of a run's batches, made some batches ahead in a thread.

    Args:
        make: of a batch's number and rows.
        plan: the batches.
        kinds: those that are counted.
        ahead: how many batches are made before they are needed.
    """

    def __init__(
        self, make: Callable[[int, Int64], Views], plan: BatchPlan, *, kinds: Iterable[ViewKind], ahead: int
    ) -> None:
        self._make, self._plan, self._ahead = make, plan, ahead
        fates = ("kept", "dropped", "impossible")
        self._names = ("dropout", *(f"{kind}_{fate}" for kind in kinds if kind != "dropout" for fate in fates))
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="views")
        self._lock = threading.Lock()
        self._futures: dict[int, Future[Views]] = {}
        self._batches = 0
        self._counts: Counter[str] = Counter()

    def of(self, number: int) -> Views:
        """Return the views of a batch, made now if need be. From any thread."""
        return self._begun(number).result()

    def take(self, numbers: Sequence[int], dropped: Sequence[Bool | None]) -> list[Views]:
        """Return the views of the batches of this step, count them, and begin those of the next.

        Args:
            numbers: of the batches.
            dropped: of each batch, the rows [b] whose pair is given up; None: none.
        """
        for number in range(numbers[0], numbers[-1] + 1 + self._ahead):
            self._begun(number)
        taken = []
        for number, dropped_b in zip(numbers, dropped, strict=True):
            views = self.of(number)
            taken.append(views if dropped_b is None else views.without(dropped_b))
            self._count(taken[-1])
        with self._lock:
            self._futures = {n: future for n, future in self._futures.items() if n > numbers[-1]}
        return taken

    def window(self) -> tuple[Counter[str], int]:
        """Return what became of this rank's rows since the last call, and in how many batches."""
        window = self._counts, self._batches
        self._counts, self._batches = Counter(), 0
        return window

    def metrics(self, windows: Sequence[tuple[Counter[str], int]]) -> dict[str, float]:
        """Return rows a batch, by kind and what became of them, from what all ranks have counted."""
        counts = sum((counts for counts, _ in windows), Counter[str]())
        return {f"views/{name}": counts[name] / max(1, windows[0][1]) for name in self._names}

    def __enter__(self) -> BatchViews:
        """Use it until it is left; then no more are made."""
        return self

    def __exit__(self, *_: object) -> None:
        self._thread.shutdown(wait=False, cancel_futures=True)

    def _begun(self, number: int) -> Future[Views]:
        with self._lock:
            if number not in self._futures:
                ids_b = rank_slice(self._plan.batch(number), rank(), world_size())
                self._futures[number] = self._thread.submit(self._make, number, ids_b)
            return self._futures[number]

    def _count(self, views: Views) -> None:
        self._batches += 1
        kept = Counter(views.kinds)
        self._counts["dropout"] += kept.pop("dropout", 0)
        for fate, counts in (("kept", kept), ("dropped", views.dropped), ("impossible", views.impossible)):
            self._counts.update({f"{kind}_{fate}": count for kind, count in counts.items()})


def check_views(settings: Settings, corpus: Corpus, notify: Callable[[str], None]) -> None:
    """See that the corpus can give the positives that are asked for, of some kind at least.

    Args:
        settings: of the run.
        corpus: of the run.
        notify: is told of kinds that hardly a passage does for, beside others that do.

    Raises:
        DataError: it has no passages, or hardly one does for any kind.
    """
    if not settings.views.active:
        return
    place = f"corpus {settings.corpus.place}"
    if not corpus.has_passages:
        raise DataError("has no passages, which views.mix makes positives of", place,
                        "Give a folder of documents, or set corpus.source=documents")  # fmt: skip
    maker = ViewMaker(settings, corpus, lambda texts, max_length, *, side: [])
    asked_for = settings.views.mix.asked_for.keys() - {"dropout"}
    missing: dict[ViewKind, str] = {}
    for kind in sorted(asked_for):
        possible, seen = maker.share_possible(kind)
        if possible < max(1, _LEAST_POSSIBLE * seen):
            missing[kind] = f"views.mix.{kind} needs {_NEEDED[kind]}: had by {possible} of {seen} passages looked at"
    if len(missing) == len(asked_for):
        kind, what = next(iter(missing.items()))
        raise DataError(what, place, f"{_MENDED[kind]}, or leave {kind} out of views.mix")
    for kind, what in missing.items():
        notify(f"{what}; the other kinds stand in for it. {_MENDED[kind]}, or leave {kind} out")


_NEEDED: dict[ViewKind, str] = {
    "title": "a title and a text under it",
    "crop": f"{2 * _LEAST_CROP_WORDS} words",
    "cloze": "two sentences",
    "neighbour": "another passage of their document beside them",
    "keywords": "enough words",
}
_MENDED: dict[ViewKind, str] = {
    "title": "A title is a text file's first line with an empty line below, a Markdown file's first heading, an HTML"
    " file's <title>, a table's column corpus.title_column",
    "crop": "Give longer texts",
    "cloze": "Give texts of several sentences, with marks at their ends",
    "neighbour": "Give longer documents, or lower corpus.passage_words",
    "keywords": "Give longer texts",
}
