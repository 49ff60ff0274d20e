"""What a run exports: the trained weights, mixed with the base's and whitened as the settings or dev say."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from hncse_ray.config import Settings
from hncse_ray.corpus import Corpus
from hncse_ray.encoder import SentenceEncoder
from hncse_ray.errors import counted
from hncse_ray.evaluation import Encode
from hncse_ray.training.checkpoint import TrainState, Weights
from hncse_ray.training.encoding import KnownEncode, ShardedEncode
from hncse_ray.training.evaluator import Measured
from hncse_ray.training.merging import merged
from hncse_ray.training.whitening import Spread, Whitened, add_whitening, corpus_spread

_ROWS_PER_DIMENSION, _MOST_ROWS = 10, 20_000  # of the corpus, that its spread is measured on
_NOTHING = Measured({}, {})


@dataclass(frozen=True)
class Candidate:
    """What may be exported: the share of the trained weights, the power of the whitening (0: none), and its scores."""

    merge: float
    whiten: float
    measured: Measured


class ExportChoice:
    """Chooses what is exported and makes the encoder that. All ranks call it alike.

    Where dev chooses, merges are tried first and then whitenings of the best of them. The scores of the base and of the
    trained weights are known already.

    Args:
        settings: of the run.
        encoder: changed in place.
        corpus: whose spread whitening levels.
        state: of the run at its end.
        base: weights before training; None where no merge needs them.
        trained: the best weights.
        measure: scores an encoder on dev, on all ranks, with one outcome.
        progress: takes a stage and how far it is.
    """

    def __init__(
        self,
        settings: Settings,
        encoder: SentenceEncoder,
        corpus: Corpus,
        *,
        state: TrainState,
        base: Weights | None,
        trained: Weights,
        measure: Callable[[Encode], Measured],
        progress: Callable[[str, int, int], None],
    ) -> None:
        self._settings, self._encoder, self._corpus = settings, encoder, corpus
        self._base, self._trained = base, trained
        self._measure, self._progress = measure, progress
        self._encode = ShardedEncode(encoder, settings.evaluation.batch_size)
        self._metric = settings.evaluation.metric
        self._untouched = Candidate(0.0, 0.0, Measured(state.before["dev"], state.before_earned))
        self._best = Candidate(1.0, 0.0, Measured(state.best_scores, state.best_earned))
        self._judged = self._metric in self._untouched.measured.scores
        # Where no step was better than the base, the best weights are the base's, and so is any merge of them.
        self._merges = settings.export.merges if state.best_step else (0.0,)
        self.to_score = 0
        if self._judged:
            self.to_score = sum(0 < m < 1 for m in self._merges) + sum(p > 0 for p in settings.export.whitenings)
        self._scored = 0

    @staticmethod
    def needs_base(settings: Settings) -> bool:
        """Whether the weights before training must be kept."""
        return settings.export.merges != (1.0,)

    def make(self) -> Candidate:
        """Choose, and have the encoder give the vectors of the choice."""
        chosen = self._best_of([self._merge(share) for share in self._merges])
        spread = None
        if any(self._settings.export.whitenings):
            self._take(chosen.merge)
            rows = min(_ROWS_PER_DIMENSION * self._encoder.dimension, _MOST_ROWS)
            spread = corpus_spread(self._encode, self._corpus, rows=rows, seed=self._settings.run.seed)
            chosen = self._best_of(self._whiten(chosen, spread))
        if self._settings.export.chooses and not self._score(chosen) > self._score(self._untouched):
            chosen = self._untouched
        self._take(chosen.merge)
        if chosen.whiten and spread is not None:
            add_whitening(self._encoder.model, spread, chosen.whiten)
        return chosen

    def _score(self, candidate: Candidate) -> float:
        return candidate.measured.scores[self._metric]

    def _best_of(self, candidates: list[Candidate]) -> Candidate:
        return candidates[0] if len(candidates) == 1 else max(candidates, key=self._score)  # of equal ones the first

    def _merge(self, share: float) -> Candidate:
        if share in (0.0, 1.0):
            return self._best if share else self._untouched
        if self._judged:
            self._take(share)
        return Candidate(share, 0.0, self._scored_on_dev(self._encode))

    def _whiten(self, chosen: Candidate, spread: Spread) -> list[Candidate]:
        """What whitening makes of the present weights, which the encoder has."""
        known, found = KnownEncode(self._encode), []
        for power in self._settings.export.whitenings:
            encode = Whitened(known, spread, power)
            found.append(Candidate(chosen.merge, power, self._scored_on_dev(encode)) if power else chosen)
        return found

    def _scored_on_dev(self, encode: Encode) -> Measured:
        if not self._judged:
            return _NOTHING
        stage = f"scoring {counted(self.to_score, 'candidate')} for export on dev"
        self._progress(stage, self._scored, self.to_score)
        measured = self._measure(encode)
        self._scored += 1
        self._progress(stage, self._scored, self.to_score)
        return measured

    def _take(self, share: float) -> None:
        self._encoder.load_weights(self._trained if self._base is None else merged(self._base, self._trained, share))
