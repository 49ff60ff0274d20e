"""The dev and test sets of a run, loaded once by the driver, scored by all ranks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from hncse_ray.config import CorpusSettings, EvaluationSettings
from hncse_ray.corpus import documentation_pairs, scored_code_pairs
from hncse_ray.errors import DataError
from hncse_ray.evaluation import (
    Difference,
    Encode,
    RetrievalSet,
    StsPairs,
    compare_earned,
    compare_retrieval,
    compare_sts,
    paired_set,
    read_collection,
    read_pairs,
    read_sts,
)
from hncse_ray.evaluation.collection import LAYOUT
from hncse_ray.evaluation.retrieval import query_scores
from hncse_ray.evaluation.sts import correlation, cosines
from hncse_ray.training.senteval import senteval_folder

Split = Literal["dev", "test"]
Scores = dict[str, float]
Earned = dict[str, list[float]]


@dataclass(frozen=True)
class Measured:
    """What an encoder was found to score.

    Attributes:
        scores: by ``suite/metric``.
        earned: of one metric, by set: what each query earns, or the cosine of each pair. With it two encoders are
            compared later, without encoding again.
    """

    scores: Scores
    earned: Earned


@dataclass(frozen=True)
class EvaluationSets:
    """Everything a run is scored on, by name and split; plain data that travels to the workers.

    A set's name is its suite, or ``suite/name`` where a suite has several sets.
    """

    sets: dict[tuple[str, Split], RetrievalSet | StsPairs]

    def score(self, encode: Encode, split: Split) -> Scores:
        """Score an encoder on all sets of a split; keys are ``name/metric``, and ``suite/metric`` for means of several.

        Raises:
            DataError: the encoder returned vectors that cannot be scored.
        """
        return self.measure(encode, split).scores

    def measure(self, encode: Encode, split: Split, metric: str = "") -> Measured:
        """Do what :meth:`score` does, and keep what every item has earned by one metric, ``suite/metric``."""
        scores: Scores = {}
        several: dict[str, list[float]] = {}
        earned: Earned = {}
        for (name, its_split), data in self.sets.items():
            if its_split != split:
                continue
            if isinstance(data, StsPairs):
                of_items = {"spearman": cosines(encode, [data])[0]}
                found = {"spearman": correlation(of_items["spearman"], data)}
            else:
                of_items = query_scores(encode, data)
                found = {each: float(np.mean(of_queries)) for each, of_queries in of_items.items()}
            suite, slash, _ = name.partition("/")
            for each, score in found.items():
                scores[f"{name}/{each}"] = score
                if slash:
                    several.setdefault(f"{suite}/{each}", []).append(score)
                if metric == f"{suite}/{each}":
                    earned[name] = of_items[each].tolist()
        means = {name: sum(of_sets) / len(of_sets) for name, of_sets in several.items()}
        return Measured(scores | means, earned)

    def judge(self, first: Earned, second: Earned, metric: str) -> Difference | None:
        """Compare what two encoders have earned on dev by ``metric``; None if that is not known of both."""
        if not first or first.keys() != second.keys():
            return None
        sets = {name: self.sets[name, "dev"] for name in first}
        gold = {
            name: np.array([p.gold for p in data.pairs]) for name, data in sets.items() if isinstance(data, StsPairs)
        }
        both = {name: (np.array(of_first), np.array(second[name])) for name, of_first in first.items()}
        return compare_earned(metric, both, gold=gold or None)

    def compare(self, first: Encode, second: Encode, suite: str) -> list[Difference]:
        """Compare two encoders on a suite's test sets, or on those of dev where it has no test.

        Raises:
            DataError: an encoder returned vectors that cannot be scored.
        """
        own = {key: data for key, data in self.sets.items() if key[0].partition("/")[0] == suite}
        split = "test" if any(split == "test" for _, split in own) else "dev"
        named = {name: data for (name, its_split), data in own.items() if its_split == split}
        scored = {f"{name}/spearman": data for name, data in named.items() if isinstance(data, StsPairs)}
        searched = {name: data for name, data in named.items() if isinstance(data, RetrievalSet)}
        return [*compare_sts(first, second, scored), *compare_retrieval(first, second, searched, mean=suite)]


def load_evaluation_sets(
    settings: EvaluationSettings, corpus: CorpusSettings, *, dev_needed: bool = True
) -> EvaluationSets:
    """Read the dev and test sets that a run needs.

    Args:
        settings: which sets.
        corpus: of the run; its packages are those of the documentation pairs.
        dev_needed: refuse a collection that has nothing to choose a checkpoint by.

    Raises:
        DataError: a set is missing or damaged.
    """
    sets: dict[tuple[str, Split], RetrievalSet | StsPairs] = {}
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
                sets[suite, split] = paired_set([p.query for p in chosen], [p.answer for p in chosen], sides=False)
        elif suite == "python-code":
            for split in splits:
                packages = settings.code_dev if split == "dev" else settings.code_test
                code = scored_code_pairs(split, packages, corpus, settings.code_pairs)
                sets[suite, split] = paired_set([pair.summary for pair in code], [pair.code for pair in code])
        elif suite in ("cloze", "pseudo-relevance"):
            continue  # of the prepared corpus: label_free.py
        elif suite == "retrieval":
            sets |= _collections(settings.collection, splits, dev_needed=dev_needed)
        else:
            for split, path in (("dev", settings.pairs_dev), ("test", settings.pairs_test)):
                if path is not None and split in splits:
                    sets[suite, split] = paired_set(*read_pairs(path))
    return EvaluationSets(sets)


def _collections(
    folders: Sequence[str], splits: tuple[Split, ...], *, dev_needed: bool
) -> dict[tuple[str, Split], RetrievalSet | StsPairs]:
    """The sets of the suite retrieval, named after their folders where these are several."""
    names = [Path(folder).expanduser().resolve().name for folder in folders]
    if twice := [name for name in names if names.count(name) > 1]:
        raise DataError(f"two collections are called {twice[0]!r}", ", ".join(folders), "Rename a folder")
    sets: dict[tuple[str, Split], RetrievalSet | StsPairs] = {}
    for name, folder in zip(names, folders, strict=True):
        found = read_collection(folder, splits)
        if dev_needed and "dev" not in found:
            raise DataError("has no qrels/dev.tsv, which chooses the checkpoint", folder, LAYOUT)
        for split in splits:
            if split in found:
                sets["retrieval" if len(folders) == 1 else f"retrieval/{name}", split] = found[split]
    return sets
