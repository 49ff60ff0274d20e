"""The dev and test sets of a run, loaded once by the driver, scored by all ranks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from hncse_ray.config import RETRIEVAL_METRICS, CorpusSettings, EvaluationSettings
from hncse_ray.corpus import documentation_pairs
from hncse_ray.evaluation import Encode, StsPairs, evaluate_retrieval, read_pairs, read_sts, spearman
from hncse_ray.training.senteval import senteval_folder

Split = Literal["dev", "test"]
Scores = dict[str, float]


@dataclass(frozen=True)
class RetrievalPairs:
    """Sentence pairs: ``answers[i]`` is what ``queries[i]`` should find among all answers."""

    queries: tuple[str, ...]
    answers: tuple[str, ...]


@dataclass(frozen=True)
class EvaluationSets:
    """Everything a run is scored on, by suite and split; plain data that travels to the workers."""

    sets: dict[tuple[str, Split], RetrievalPairs | StsPairs]

    def score(self, encode: Encode, split: Split) -> Scores:
        """Score an encoder on all suites of a split; keys are ``suite/metric``.

        Raises:
            DataError: the encoder returned vectors that cannot be scored.
        """
        scores: Scores = {}
        for (suite, its_split), data in self.sets.items():
            if its_split != split:
                continue
            if isinstance(data, RetrievalPairs):
                found = evaluate_retrieval(encode, list(data.queries), list(data.answers))
                scores |= {f"{suite}/{metric}": found[metric] for metric in RETRIEVAL_METRICS}
            else:
                scores[f"{suite}/spearman"] = spearman(encode, data)
        return scores


def load_evaluation_sets(settings: EvaluationSettings, corpus: CorpusSettings) -> EvaluationSets:
    """Read the dev and test sets that a run needs.

    Raises:
        DataError: a set is missing or damaged.
    """
    sets: dict[tuple[str, Split], RetrievalPairs | StsPairs] = {}
    splits: tuple[Split, ...] = ("dev", "test") if settings.test else ("dev",)
    for suite in settings.suites:
        if suite == "stsb":
            folder = senteval_folder(settings)
            for split in splits:
                sets[suite, split] = read_sts("STSBenchmark", split, folder)
        elif suite == "python-docs":
            packages = corpus.packages if corpus.source == "python-docs" else ()
            pairs = documentation_pairs(
                packages or None, num_processes=corpus.num_processes, cache_dir=corpus.cache_dir
            )
            for split in splits:
                chosen = [p for p in pairs if p.split == split]
                sets[suite, split] = RetrievalPairs(tuple(p.query for p in chosen), tuple(p.answer for p in chosen))
        else:
            for split, path in (("dev", settings.pairs_dev), ("test", settings.pairs_test)):
                if path is not None and split in splits:
                    queries, answers = read_pairs(path)
                    sets[suite, split] = RetrievalPairs(tuple(queries), tuple(answers))
    return EvaluationSets(sets)
