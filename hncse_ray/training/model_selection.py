"""Model selection: the encoder is scored when due, the weights that are best on dev are kept, one model is exported.

All ranks score together; what the first has found counts, as the last bits differ from processor to processor.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace

from hncse_ray.config import Settings
from hncse_ray.corpus import Corpus
from hncse_ray.encoder import SentenceEncoder
from hncse_ray.errors import HncseError
from hncse_ray.evaluation import Encode
from hncse_ray.reporting.events import Evaluated, Event, StageProgress, Verdict
from hncse_ray.training.checkpoint import TrainState, Weights
from hncse_ray.training.choice import Candidate, ExportChoice
from hncse_ray.training.control import whitened_base
from hncse_ray.training.distributed import from_first, raise_together
from hncse_ray.training.encoding import KnownEncode, ShardedEncode
from hncse_ray.training.evaluator import EvaluationSets, Measured, Scores, Split
from hncse_ray.training.label_free import hold_out, label_free_sets


class ModelSelection:
    """Scores, remembers the best weights, and chooses what is exported.

    Args:
        settings: of the run.
        encoder: that is trained.
        corpus: of the run; dev sets without labels are made of it.
        sets: the other dev and test sets.
        tell: emits an event on the first rank, when all call it.

    Attributes:
        sets: all of them.
        left_out: rows of the corpus that are not trained on, as dev asks about them; None without such a dev set.
        best: weights with the best score on dev; None before the first.
    """

    def __init__(
        self,
        settings: Settings,
        encoder: SentenceEncoder,
        corpus: Corpus,
        sets: EvaluationSets,
        tell: Callable[[Event], None],
    ) -> None:
        self._settings, self._encoder, self._corpus, self._tell = settings, encoder, corpus, tell
        self._encode = ShardedEncode(encoder, settings.evaluation.batch_size)
        self._untouched = KnownEncode(self._encode)  # these weights, until the first step or a checkpoint's
        self.sets, self._state = sets, TrainState()
        self.best: Weights | None = None
        gaps = hold_out(settings, corpus)
        self.left_out = None if gaps is None else gaps.rows
        if gaps is not None:
            tell(StageProgress("finding what the held-out sentences should find", 0, None))
            found = label_free_sets(settings, corpus, gaps, self._untouched)
            self.sets = EvaluationSets({**sets.sets, **{(suite, "dev"): data for suite, data in found.items()}})

    def resume(self, state: TrainState, best: Weights | None) -> None:
        """Take the run's state, which is written to from now on, and the weights that were best until then."""
        self._state, self.best = state, best

    def begin(self) -> None:
        """Score the base and its control, if no checkpoint knows their scores."""
        state = self._state
        if not state.before:
            dev, test = self._score(self._untouched, "dev"), self._score(self._untouched, "test")
            state.before, state.before_earned = {"dev": dev.scores, "test": test.scores}, dev.earned
            self._consider(dev)
            if self._settings.evaluation.test and self.sets.sets:
                self._begins("whitening the base, which the gain is told beside")
                started, counted = time.perf_counter(), state.seconds.get("scoring", 0.0)
                state.whitened_base_power, state.whitened_base = whitened_base(
                    self._untouched, self._corpus, self._settings,
                    dimension=self._encoder.dimension, measure=self._measure,
                )  # fmt: skip
                state.seconds["scoring"] = counted + time.perf_counter() - started  # the corpus was encoded too
        del self._untouched

    @property
    def patience_is_over(self) -> bool:
        """Whether dev has not gained for so long that training should stop."""
        patience = self._settings.train.early_stopping_evaluations
        return patience is not None and self._state.evaluations_without_gain >= patience

    def evaluate(self) -> None:
        """Score the present weights on dev."""
        self._consider(self._score(self._encode, "dev"))

    def choose(self, base: Weights | None) -> tuple[Verdict, dict[str, Scores]]:
        """Have the encoder give the vectors of what is exported.

        Args:
            base: weights before training; None where no choice needs them.

        Returns:
            What it is, and its scores by split.
        """
        assert self.best is not None  # the weights of step 0 were the first
        choice = ExportChoice(
            self._settings,
            self._encoder,
            self._corpus,
            state=self._state,
            base=base,
            trained=self.best,
            measure=lambda encode: self._measure(encode, "dev"),
            progress=lambda stage, done, total: self._tell(StageProgress(stage, done, total)),
        )
        chosen = choice.make()
        verdict = from_first(lambda: self._verdict(chosen, tried=choice.to_score))
        self._tell(verdict)
        after = {"dev": chosen.measured.scores, "test": self._score(self._encode, "test").scores}
        if after["test"]:
            metric = self._settings.evaluation.metric
            self._tell(Evaluated(self._state.best_step, "test", after["test"], metric, is_best=True))
        return verdict, after

    def _consider(self, measured: Measured) -> None:
        state, metric, scores = self._state, self._settings.evaluation.metric, measured.scores
        state.evaluated_step = state.step
        score = scores.get(metric)
        is_best = score is None or state.best_score is None or score > state.best_score
        if is_best:
            state.best_score, state.best_step = score, state.step
            state.best_scores, state.best_earned = scores, measured.earned
            state.evaluations_without_gain = 0
            self.best = self._encoder.weights()
        else:
            state.evaluations_without_gain += 1
        self._tell(Evaluated(state.step, "dev", scores, metric, is_best))

    def _score(self, encode: Encode, split: Split) -> Measured:
        """Say that it is done, and score."""
        if any(of == split for _, of in self.sets.sets):
            self._begins(f"scoring {split}")
        return self._measure(encode, split)

    def _begins(self, stage: str) -> None:
        self._tell(StageProgress(stage, 0, None))

    def _measure(self, encode: Encode, split: Split) -> Measured:
        error: HncseError | None = None
        measured, started = Measured({}, {}), time.perf_counter()
        try:
            measured = self.sets.measure(encode, split, self._settings.evaluation.metric if split == "dev" else "")
        except HncseError as caught:
            error = caught
        raise_together(error)
        self._state.add_seconds("scoring", time.perf_counter() - started)
        return from_first(lambda: measured)

    def _verdict(self, chosen: Candidate, *, tried: int) -> Verdict:
        """Say what is exported, and how sure its gain on dev is."""
        state, metric = self._state, self._settings.evaluation.metric
        verdict = Verdict(state.best_step, chosen.merge, chosen.whiten, tried=tried)
        if metric not in chosen.measured.scores:
            return verdict
        base, score = state.before["dev"][metric], chosen.measured.scores[metric]
        found = None
        if not verdict.is_base:
            found = self.sets.judge(state.before_earned, chosen.measured.earned, metric)
        low, high = (None, None) if found is None else (found.low, found.high)
        return replace(verdict, metric=metric, base=base, chosen=score, low=low, high=high)
