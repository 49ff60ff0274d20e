"""Scoring finished models: on every suite, side by side, several seeds as one."""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from hncse_ray.config import SUITE_METRICS, EncoderSettings, Settings, load_settings
from hncse_ray.encoder import check_weights, choose_device, load_encoder, resolve_model
from hncse_ray.errors import SettingsError
from hncse_ray.evaluation import (
    STS_TASKS,
    Difference,
    Encode,
    SimilarityHistogram,
    compare_sts,
    evaluate_geometry,
    evaluate_sts,
    evaluate_transfer,
    mean_and_spread,
    read_sts,
)
from hncse_ray.training.encoding import Alone, BulkEncoder, KnownEncode
from hncse_ray.training.evaluator import EvaluationSets, load_evaluation_sets
from hncse_ray.training.senteval import senteval_folder

TEST_SUITES = ("sts", "transfer", "geometry")
SUITES = ("sts", "transfer", "geometry", "python-docs", "python-code", "pairs", "retrieval", "stsb")
FULL = ("sts", "transfer", "geometry", "python-docs")

Tell = Callable[[str, int, int | None], None]
Named = str | Path | Sequence[str | Path]  # one, or several


OpenEncoder = Callable[[str, EncoderSettings], BulkEncoder]


@dataclass(frozen=True)
class GroupScores:
    """Scores of one model, or of the same training with several seeds.

    Attributes:
        name: what the user called it.
        models: the models, one a seed.
        runs: scores of each by split (``dev``, ``test``) and ``suite/metric``.
        similarities: cosines of positives and negatives of each, if the suite ``geometry`` was asked for.
    """

    name: str
    models: tuple[str, ...]
    runs: tuple[dict[str, dict[str, float]], ...]
    similarities: tuple[SimilarityHistogram, ...] = ()

    def summary(self, split: str) -> dict[str, tuple[float, float]]:
        """Return mean and standard deviation of each score of a split."""
        return mean_and_spread([run[split] for run in self.runs])


@dataclass(frozen=True)
class Scoreboard:
    """Everything that was scored.

    Attributes:
        groups: one a model, in the order asked for: ``groups[0].runs[0]["test"]["sts/avg"]`` is a score.
        differences: second model less first, with interval and p, if two single models were compared.
    """

    groups: tuple[GroupScores, ...]
    differences: tuple[Difference, ...] = ()


def resolve_suites(names: Sequence[str]) -> list[str]:
    """Return the suites that are meant, each once; ``full`` stands for :data:`FULL`.

    Raises:
        SettingsError: there is no such suite.
    """
    if unknown := [name for name in names if name not in ("full", *SUITES)]:
        raise SettingsError(f"unknown suite {unknown[0]!r}; choose from full, {', '.join(SUITES)}", "--suite")
    return list(dict.fromkeys(itertools.chain(*(FULL if name == "full" else (name,) for name in names))))


def chosen_suites(names: Sequence[str], *, pairs: str | None, collection: Sequence[str]) -> list[str]:
    """Return the suites that are meant, where naming the data of one asks for it; ``python-docs`` if none is.

    Raises:
        SettingsError: there is no such suite, or one lacks its data.
    """
    named = {"pairs": ("--pairs", [] if pairs is None else [pairs]), "retrieval": ("--data", collection)}
    suites = resolve_suites([*names, *(s for s, (_, given) in named.items() if given)] or ["python-docs"])
    for needed in (s for s in suites if s in named and not all(named[s][1] or [""])):
        raise SettingsError(f"the suite {needed} needs data", named[needed][0], "Name them with this option")
    return suites


def evaluate(
    models: Named,
    suites: Named = (),
    *,
    pairs: str | Path | None = None,
    collection: Named = (),
    senteval: str | Path | None = None,
    encoder: Mapping[str, Any] | None = None,
    device: str = "auto",
    tell: Tell = lambda stage, done, total: None,
    open_encoder: OpenEncoder | None = None,
) -> Scoreboard:
    """Score models on dev and test sets; two models are also compared by a paired bootstrap.

    Example::

        board = hncse_ray.evaluate(["base", "runs/mine/model"], collection=["collections/mine"])
        board.groups[1].runs[0]["test"]["retrieval/ndcg@10"]

    Args:
        models: one or several: folders, hub names or ``package:NAME/FOLDER``; joined by commas they are seeds of one.
        suites: one or several of ``sts``, ``transfer``, ``geometry``, ``python-docs``, ``python-code``, ``stsb``, or
            ``full``; default: those of the data given, without any ``python-docs``.
        pairs: a file of query and answer; adds the suite ``pairs``.
        collection: one or several folders with corpus, queries and qrels; add the suite ``retrieval``.
        senteval: the SentEval folder; default: ``$HNCSE_DATA/senteval``.
        encoder: settings of the section ``encoder``, such as ``{"pooling": "mean"}``; the rest is as the models say.
        device: ``auto`` (a GPU where there is one), ``cpu``, ``cuda`` or ``cuda:N``.
        tell: called with a stage and how far it is.
        open_encoder: loads a model; default: in this process.

    Raises:
        HncseError: missing data, or a model that cannot be loaded or scored.
    """
    groups, collections = _names(models, "models"), _names(collection, "collection")
    pairs_dev = None if pairs is None else str(pairs)
    suites = chosen_suites(_names(suites, "suites"), pairs=pairs_dev, collection=collections)
    scored = [suite for suite in suites if suite not in TEST_SUITES]
    evaluation: dict[str, Any] = {
        "suites": scored, "senteval_path": None if senteval is None else str(senteval), "pairs_dev": pairs_dev,
        "collection": collections,
    }  # fmt: skip
    if scored:
        evaluation["metric"] = f"{scored[0]}/{SUITE_METRICS[scored[0]][0]}"
    settings = load_settings({"corpus": {"source": "python-docs"}, "encoder": encoder or {}, "evaluation": evaluation})
    open_encoder = open_encoder or partial(load_encoder, device=choose_device(device))
    return score_models(groups, suites, settings, settings.encoder, tell=tell, open_encoder=open_encoder)


def _names(given: Named, argument: str) -> list[str]:
    """One name or several, as a list."""
    names = [given] if isinstance(given, str | Path) else list(given) if isinstance(given, Iterable) else [given]
    if odd := [name for name in names if not isinstance(name, str | Path)]:
        raise SettingsError(f"{odd[0]!r} is no name", argument, "Give a text or a path, or a list of them")
    return [str(name) for name in names]


def split_seeds(group: str) -> tuple[str, ...]:
    """Return the models that a group names, joined by commas; of a folder whose own name has commas, all of it.

    Raises:
        SettingsError: a name is empty.
    """
    parts, models = group.split(","), []
    while parts:
        sizes = range(len(parts), 1, -1)
        size = next((n for n in sizes if os.path.isdir(os.path.expanduser(",".join(parts[:n])))), 1)
        models.append(",".join(parts[:size]))
        parts = parts[size:]
    if not all(models):
        raise SettingsError("names a model without a name", repr(group), "Name a folder, a hub name or package:NAME")
    return tuple(models)


def score_models(
    groups: Sequence[str],
    suites: Sequence[str],
    settings: Settings,
    encoder: EncoderSettings,
    *,
    tell: Tell,
    open_encoder: OpenEncoder = load_encoder,
) -> Scoreboard:
    """Score models on suites.

    Args:
        groups: each a model, or several joined by commas that differ in their seed.
        suites: of :func:`resolve_suites`.
        settings: ``evaluation`` and ``corpus`` say where the sets come from.
        encoder: how to load the models.
        tell: called with a stage and how far it is.
        open_encoder: loads a model; default: in this process.

    Raises:
        HncseError: no model, missing data, or a model that cannot be loaded or scored.
    """
    if not groups:
        raise SettingsError("no model is named", "models", "Name a folder, a hub name or package:NAME")
    members = [split_seeds(group) for group in groups]
    for model in itertools.chain(*members):
        # That the last one is none should not show after an hour with the others.
        check_weights(resolve_model(model, revision=encoder.revision), model)
    sets = load_evaluation_sets(settings.evaluation, settings.corpus, dev_needed=False)
    data_dir = senteval_folder(settings.evaluation) if set(suites) & set(TEST_SUITES) else ""
    found, encodes = [], []
    for group, models in zip(groups, members, strict=True):
        runs, similarities = [], []
        for model in models:
            loaded = open_encoder(model, encoder.model_copy(update={"model": model}))
            encode = KnownEncode(Alone(loaded, progress=partial(tell, f"encoding with {model}")))
            scores = {split: sets.score(encode, split) for split in ("dev", "test")}
            for suite in suites:
                if suite in TEST_SUITES:
                    of_suite, similarity = _score_suite(suite, encode, data_dir, lambda line: tell(line, 0, None))
                    scores["dev" if suite == "geometry" else "test"] |= of_suite  # of STS-Benchmark's dev sentences
                    similarities += [similarity] if similarity is not None else []
            runs.append(scores)
        found.append(GroupScores(group, models, tuple(runs), tuple(similarities)))
        encodes.append(encode)
    differences: list[Difference] = []
    if len(found) == 2 and all(len(group.models) == 1 for group in found):
        differences = _compare(encodes[0], encodes[1], suites, data_dir, sets, tell)
    return Scoreboard(tuple(found), tuple(differences))


def _score_suite(
    suite: str, encode: Encode, data_dir: str, tell: Callable[[str], None]
) -> tuple[dict[str, float], SimilarityHistogram | None]:
    similarity: SimilarityHistogram | None = None
    if suite == "sts":
        scores = evaluate_sts(encode, data_dir)
    elif suite == "transfer":
        scores = evaluate_transfer(encode, data_dir, progress=tell)
    else:
        scores, similarity = evaluate_geometry(encode, data_dir)
    return {f"{suite}/{name}": value for name, value in scores.items()}, similarity


def _compare(
    first: Encode, second: Encode, suites: Sequence[str], data_dir: str, sets: EvaluationSets, tell: Tell
) -> list[Difference]:
    """Compare two encoders on all suites that are made of pairs or queries; the others have nothing to draw again."""
    found: list[Difference] = []
    if "sts" in suites:
        tell("comparing on sts", 0, None)
        of_task = {task: read_sts(task, "test", data_dir) for task in STS_TASKS}
        found += [replace(d, name=f"sts/{d.name}") for d in compare_sts(first, second, of_task)]
    for suite in suites:
        if suite not in TEST_SUITES:
            tell(f"comparing on {suite}", 0, None)
            found += sets.compare(first, second, suite)
    return found
