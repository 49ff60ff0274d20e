"""The model card: the ``README.md`` of an exported model. Its text is ``templates/card.md``, its head the hub's own."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path, PurePath
from typing import TYPE_CHECKING, Any

import jinja2
import yaml

from hncse_ray.reporting.events import Verdict
from hncse_ray.reporting.verdict import describe_verdict

if TYPE_CHECKING:
    from huggingface_hub import EvalResult, ModelCardData

Scores = Mapping[str, Mapping[str, float]]

_SUITES = {
    "stsb": "STS-Benchmark",
    "python-docs": "Documentation pairs of Python packages",
    "python-code": "Functions of Python packages, by their summaries",
    "pairs": "Own pairs",
    "retrieval": "Own search collections",
    "cloze": "Sentences of the corpus, each to find its document",
    "pseudo-relevance": "Sentences of the corpus, to find what vectors and BM25 find together",
}
_SOFTWARE = ("hncse-ray", "sentence-transformers", "transformers", "torch")  # whose versions it tells
_FOLDERS = ("storage_path", "cache_dir")  # settings that a card leaves out
_FILES = ("path", "senteval_path", "pairs_dev", "pairs_test", "collection")  # settings of which it tells the last part


@dataclass(frozen=True)
class Usage:
    """How a model is used.

    Attributes:
        dimension: width of its vectors.
        max_length: tokens it takes of a text.
        stages: what follows the transformer, in the names of sentence-transformers.
        plain_pooling: the pooling, if transformers alone gives the same vectors with it; else None.
        prompts: what is put before a text, by name.
        sides: what is put before a query, a document, and a text that is neither.
        own_code: whether it comes with code of its own.
    """

    dimension: int
    max_length: int
    stages: tuple[str, ...]
    plain_pooling: str | None
    prompts: Mapping[str, str]
    sides: tuple[str, str, str]
    own_code: bool


@dataclass(frozen=True)
class CardFacts:
    """What a card tells; plain values.

    Attributes:
        settings: the resolved settings, as a tree.
        usage: how the model is used.
        base: front matter that tells of the base model, as far as known: ``base_model`` with ``base_model_revision`` if
            it is one of the hub, and what is passed on of its card: licence and language.
        corpus: the fields of its ``PrepareReport``.
        state: the fields of the ``TrainState`` at the end of the run.
        after: scores by split and ``suite/metric`` of this model; those of its base are in ``state``.
        verdict: what is made of the weights of the best step, and what dev says of it; None where it is not known.
    """

    settings: Mapping[str, Any]
    usage: Usage
    base: Mapping[str, Any]
    corpus: Mapping[str, Any]
    state: Mapping[str, Any]
    after: Scores
    verdict: Verdict | None = None


def model_card(facts: CardFacts) -> str:
    """Return the card: front matter for the hub, then what a reader needs to use, judge and repeat the model.

    Folders of this machine are left out of it; of files the name stays.
    """
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent / "templates"),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters["python"] = repr
    environment.filters["told"] = describe_verdict
    settings = shareable_settings(facts.settings)
    dumped = yaml.safe_dump(settings, sort_keys=False, allow_unicode=True)
    return environment.get_template("card.md").render(
        head=_front_matter(facts).to_yaml(),
        facts=facts,
        s=settings,
        settings_yaml=dumped,
        versions=_versions(),
    )


def shareable_settings(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings without the folders of this machine: a file or folder is its bare name."""

    def share(section: str, key: str, value: Any) -> Any:
        if isinstance(value, list):
            return [share(section, key, one) for one in value]
        if not isinstance(value, str) or value.startswith("package:"):
            return value
        on_hub = section == "corpus" and settings["corpus"]["source"] == "hub"
        is_place = (key in _FILES and not on_hub) or (key == "model" and value.count("/") > 1)
        return PurePath(value).name if is_place or value.startswith(("/", ".", "~")) else value

    return {
        section: {key: share(section, key, value) for key, value in values.items() if key not in _FOLDERS}
        for section, values in settings.items()
    }


def _versions() -> dict[str, str]:
    found = {}
    for name in _SOFTWARE:
        with suppress(PackageNotFoundError):  # of a package that is run from its source
            found[name] = version(name)
    return found


def _front_matter(facts: CardFacts) -> ModelCardData:
    from huggingface_hub import ModelCardData

    corpus, objective = facts.settings["corpus"], facts.settings["objective"]["name"]
    unknown: dict[str, Any] = {} if "license" in facts.base else {"license": "other", "license_name": "unknown"}
    return ModelCardData(
        **unknown,
        **facts.base,
        library_name="sentence-transformers",
        pipeline_tag="sentence-similarity",
        datasets=list(corpus["path"]) if corpus["source"] == "hub" else None,
        tags=["sentence-transformers", "sentence-similarity", "feature-extraction", "hncse_ray", objective],
        model_name=facts.settings["run"]["name"],
        eval_results=list(_results(facts.after)) or None,
    )


def _results(after: Scores) -> Iterator[EvalResult]:
    """Yield the scores of each suite, of its test split where it has one."""
    from huggingface_hub import EvalResult

    tested = {name.rpartition("/")[0] for name in after.get("test", {})}
    for split, scores in after.items():
        for name, value in scores.items():
            suite, _, metric = name.rpartition("/")  # of one of several collections: retrieval/cran
            if split == "test" or suite not in tested:
                yield EvalResult(
                    task_type="semantic-similarity" if metric == "spearman" else "information-retrieval",
                    dataset_type=suite,
                    dataset_name=_SUITES.get(suite, suite),
                    dataset_split=split,
                    metric_type=f"cosine_{metric}",
                    metric_name=metric,
                    metric_value=round(value, 4),
                )
