"""The model card: the ``README.md`` of an exported model, as the Hugging Face hub reads it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import PurePath
from typing import Any

import yaml

Scores = Mapping[str, Mapping[str, float]]

_METHODS = {
    "info_nce": "unsupervised SimCSE",
    "positive_mixing": "HNCSE-PM (mixed positives)",
    "hard_negative_mixing": "HNCSE-HNM (mixed hard negatives)",
    "hybrid": "HNCSE (mixed positives and mixed hard negatives)",
    "three_view": "SimCSE's contrast over three dropout views",
    "instance_smoothing": "IS-CSE (instance smoothing)",
}
_SIMCSE = """@inproceedings{gao-etal-2021-simcse,
  title = {{SimCSE}: Simple Contrastive Learning of Sentence Embeddings},
  author = {Gao, Tianyu and Yao, Xingcheng and Chen, Danqi},
  booktitle = {Proceedings of the 2021 Conference on Empirical Methods in Natural Language Processing},
  year = {2021},
  pages = {6894--6910},
  doi = {10.18653/v1/2021.emnlp-main.552},
  note = {arXiv:2104.08821},
}"""
_HNCSE = """@misc{liu-etal-2024-hncse,
  title = {{HNCSE}: Advancing Sentence Embeddings via Hybrid Contrastive Learning with Hard Negatives},
  author = {Liu, Wenxiao and Yang, Zihong and Li, Chaozhuo and Hong, Zijin and Ma, Jianfeng and Liu, Zhiquan and
    Zhang, Litian and Huang, Feiran},
  year = {2024},
  eprint = {2411.12156},
  archivePrefix = {arXiv},
}"""
_ISCSE = """@inproceedings{he-etal-2023-instance,
  title = {Instance Smoothed Contrastive Learning for Unsupervised Sentence Embedding},
  author = {He, Hongliang and Zhang, Junlei and Lan, Zhenzhong and Zhang, Yue},
  booktitle = {Proceedings of the AAAI Conference on Artificial Intelligence},
  volume = {37},
  pages = {12863--12871},
  year = {2023},
  doi = {10.1609/aaai.v37i11.26512},
  note = {arXiv:2305.07424},
}"""
_CITATIONS = {
    "positive_mixing": (_HNCSE, _SIMCSE),
    "hard_negative_mixing": (_HNCSE, _SIMCSE),
    "hybrid": (_HNCSE, _SIMCSE),
    "instance_smoothing": (_ISCSE, _SIMCSE),
}
_SUITES = {"stsb": "STS-Benchmark", "python-docs": "Documentation pairs of Python packages", "pairs": "Own pairs"}


@dataclass(frozen=True)
class CardFacts:
    """What a card tells; plain values.

    Attributes:
        name: of the run.
        settings: the resolved settings, as a tree of plain values.
        usage: Markdown that shows how to load the model; ``PATH`` stands for the model.
        base_model: its name on the hub; None if the training began from something else.
        base_licence: front matter of the base model's card that concerns its licence; empty if not known.
        languages: of the base model, where its card names them.
        corpus_digest: names source, tokenizer and settings of the corpus.
        corpus_rows: unique sentences trained on.
        corpus_read: lines that they were chosen from.
        steps: optimiser steps taken.
        best_step: the step whose weights these are.
        before: scores by split and ``suite/metric`` of the base model.
        after: the same of this model.
        index_step: the step whose weights the last index of global negatives was made from; None without one.
    """

    name: str
    settings: Mapping[str, Any]
    usage: str
    base_model: str | None
    corpus_digest: str
    corpus_rows: int
    corpus_read: int
    steps: int
    best_step: int
    before: Scores
    after: Scores
    base_licence: Mapping[str, Any] = field(default_factory=dict)
    languages: tuple[str, ...] = ()
    index_step: int | None = None


def model_card(facts: CardFacts) -> str:
    """Return the card: front matter for the hub, then what a reader needs to use, judge and repeat the model.

    Folders of this machine are left out of it; of files the name stays.
    """
    front = yaml.safe_dump(_front_matter(facts), sort_keys=False, allow_unicode=True)
    sections = [
        f"# {facts.name}\n\n{_summary(facts)}",
        f"## Use\n\n{facts.usage.strip()}",
        f"## Scores\n\n{_scores(facts)}",
        f"## Training\n\n{_training(facts)}",
        f"## Limits\n\n{_limits(facts)}",
        f"## Citation\n\n{_citations(facts)}",
    ]
    return f"---\n{front}---\n\n" + "\n\n".join(sections) + "\n"


def shareable_settings(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings without the folders of this machine: a file or folder is its bare name."""
    tree = {section: dict(values) for section, values in settings.items()}
    tree["run"].pop("storage_path", None)
    tree["corpus"].pop("cache_dir", None)
    tree["encoder"]["model"] = _bare(tree["encoder"]["model"])
    if tree["corpus"]["source"] != "hub":
        tree["corpus"]["path"] = [_bare(path, always=True) for path in tree["corpus"]["path"]]
    for key in ("senteval_path", "pairs_dev", "pairs_test"):
        if tree["evaluation"].get(key):
            tree["evaluation"][key] = _bare(tree["evaluation"][key], always=True)
    return tree


def _bare(path: str, *, always: bool = False) -> str:
    """The last part of a path; a name on the hub and ``package:NAME/FOLDER`` are no paths."""
    is_place = always or path.startswith(("/", ".", "~", "\\")) or path.count("/") > 1
    return PurePath(path).name if is_place and not path.startswith("package:") else path


def _front_matter(facts: CardFacts) -> dict[str, Any]:
    front: dict[str, Any] = {"library_name": "sentence-transformers", "pipeline_tag": "sentence-similarity"}
    if facts.languages:
        front["language"] = list(facts.languages)
    front |= facts.base_licence or {"license": "other", "license_name": "unknown"}
    if facts.base_model is not None:
        front["base_model"] = facts.base_model
    corpus = facts.settings["corpus"]
    if corpus["source"] == "hub":
        front["datasets"] = list(corpus["path"])
    front["tags"] = [
        "sentence-transformers", "sentence-similarity", "feature-extraction", "hncse_ray",
        facts.settings["objective"]["name"],
    ]  # fmt: skip
    if results := list(_results(facts.after)):
        front["model-index"] = [{"name": facts.name, "results": results}]
    return front


def _results(after: Scores) -> Iterator[dict[str, Any]]:
    """One entry a suite, of the test split where it has one."""
    by_suite: dict[str, tuple[str, dict[str, float]]] = {}
    for split in ("dev", "test"):
        for name, value in after.get(split, {}).items():
            suite, _, metric = name.partition("/")
            if by_suite.get(suite, ("", {}))[0] != split:
                by_suite[suite] = (split, {})
            by_suite[suite][1][metric] = value
    for suite, (split, scores) in by_suite.items():
        is_sts = "spearman" in scores
        yield {
            "task": {"type": "semantic-similarity" if is_sts else "information-retrieval"},
            "dataset": {"name": _SUITES.get(suite, suite), "type": suite, "split": split},
            "metrics": [
                {"type": f"cosine_{metric}", "value": round(value, 4), "name": metric}
                for metric, value in scores.items()
            ],
        }


def _summary(facts: CardFacts) -> str:
    objective = facts.settings["objective"]["name"]
    base = facts.base_model or f"`{_bare(facts.settings['encoder']['model'])}`"
    if facts.best_step == 0:
        return (
            f"The weights are those of {base}: no step of the training scored better on the dev split. "
            f"The objective was {_METHODS.get(objective, objective)}."
        )
    return (
        f"A sentence encoder: {base}, trained further on {facts.corpus_rows:,} unlabelled sentences by contrast"
        f" ({_METHODS.get(objective, objective)}) with hncse_ray."
    )


def _scores(facts: CardFacts) -> str:
    lines = ["| score | split | before | after |", "|---|---|---|---|"]
    for split, scores in facts.after.items():
        for name, value in scores.items():
            old = facts.before.get(split, {}).get(name)
            before = "" if old is None else f"{old:.4f}"
            lines.append(f"| {name} | {split} | {before} | {value:.4f} |")
    if len(lines) == 2:
        return "No set was scored in this run."
    told = (
        "\n\nBefore is the base model, after is this one. The dev split chose the checkpoint, so the test split says"
        " more. stsb is Spearman correlation x 100; recall and MRR are from 0 to 1."
    )
    return "\n".join(lines) + told


def _training(facts: CardFacts) -> str:
    s = facts.settings
    train, corpus, objective = s["train"], s["corpus"], s["objective"]
    numbers = ", ".join(f"{key} {value}" for key, value in objective.items() if key != "name")
    lines = [
        f"- objective: `{objective['name']}` ({numbers})",
        f"- steps: {facts.steps} of {train['batch_size']} sentences, learning rate {train['learning_rate']};"
        f" the weights are those of step {facts.best_step}, chosen by `{s['evaluation']['metric']}` on dev",
        f"- seed: {s['run']['seed']}",
        f"- corpus: {_source(corpus)}; {facts.corpus_rows:,} unique sentences kept of {facts.corpus_read:,} lines",
        f"- corpus digest: `{facts.corpus_digest}`",
        f"- negatives: {_negatives(facts)}",
    ]
    tree = yaml.safe_dump(shareable_settings(s), sort_keys=False, allow_unicode=True)
    collapsed = f"<details>\n<summary>All settings</summary>\n\n```yaml\n{tree}```\n\n</details>"
    return "\n".join(lines) + f"\n\n{collapsed}"


def _source(corpus: Mapping[str, Any]) -> str:
    match corpus["source"]:
        case "hub":
            subset = f", {corpus['subset']}" if corpus["subset"] else ""
            return f"the hub's data set `{corpus['path'][0]}` ({corpus['split']}{subset})"
        case "python-docs":
            packages = ", ".join(corpus["packages"]) or "a selection of packages"
            return f"documentation of installed Python packages ({packages})"
        case source:
            return f"{source}, " + ", ".join(f"`{_bare(path, always=True)}`" for path in corpus["path"])


def _negatives(facts: CardFacts) -> str:
    n = facts.settings["negatives"]
    if n["source"] == "none":
        return "the other sentences of the batch only"
    per_anchor = n["per_anchor"]
    if facts.settings["objective"]["name"] == "instance_smoothing":
        per_anchor = facts.settings["objective"]["group_size"]
    every = n["refresh_every_steps"]
    refresh = "made once, at the start" if every is None else f"made anew every {every} steps ({n['refresh']})"
    made = "" if facts.index_step is None else f", last from the weights of step {facts.index_step}"
    limits = [f"cosine at most {n['max_score']}"] if n["max_score"] is not None else []
    if n["relative_margin"] is not None:
        limits.append(f"at most (1 - {n['relative_margin']}) x the positives' cosine")
    if n["skip_hardest"]:
        limits.append(f"the {n['skip_hardest']} nearest passed over")
    chosen = f"; {', '.join(limits)}" if limits else ""
    return (
        f"{per_anchor} of the {n['candidates']} nearest sentences of the whole corpus for each anchor, chosen by"
        f" `{n['sampling']}`{chosen}; used as `{n['use']}` vectors, columns `{n['columns']}`; found by index"
        f" `{n['index']}` (`{n['source']}`), {refresh}{made}"
    )


def _limits(facts: CardFacts) -> str:
    if facts.base_licence:
        licence = "The licence is that of the base model; the corpus may have terms of its own."
    else:
        licence = (
            "The licence of the base model was not known when this card was written, so that of this model is not"
            " known either: find it out before you share or use the model."
        )
    return "\n".join(
        [
            "- The scores are of one run with one seed; other seeds give somewhat other scores.",
            "- It was adapted to the corpus above, and may have become worse at other text.",
            "- It was trained without labels: what is near in it is what its base model and its corpus make near."
            " Their biases are in it too.",
            f"- {licence}",
        ]
    )


def _citations(facts: CardFacts) -> str:
    entries = _CITATIONS.get(facts.settings["objective"]["name"], (_SIMCSE,))
    return "```bibtex\n" + "\n\n".join(entries) + "\n```"
