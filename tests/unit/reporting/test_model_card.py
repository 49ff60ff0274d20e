"""The model card: accepted by the hub's own reader, complete, and silent about folders of this machine."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import yaml
from huggingface_hub import ModelCard, ModelCardData

from hncse_ray import __version__
from hncse_ray.config import OBJECTIVES, load_settings
from hncse_ray.reporting.events import Verdict
from hncse_ray.reporting.model_card import CardFacts, Usage, model_card, shareable_settings

USAGE = Usage(
    dimension=32,
    max_length=64,
    stages=("Pooling (mean)",),
    plain_pooling="mean",
    prompts={},
    sides=("", "", ""),
    own_code=False,
)


def facts(*overrides: str, corpus: Any = None, state: Any = None, **changed: Any) -> CardFacts:
    """Facts of a small run; ``corpus`` and ``state`` replace some of theirs."""
    tree = {
        "run": {"name": "mine", "seed": 7, "storage_path": "/home/someone/runs"},
        "corpus": {"source": "text", "path": ["/home/someone/secret/notes.txt"], "cache_dir": "/home/someone/cache"},
        "encoder": {"model": "/home/someone/base"},
        "evaluation": {"senteval_path": "/home/someone/senteval"},
    }
    ended = {
        "step": 80,
        "best_step": 60,
        "corpus_digest": "abc123",
        "before": {"dev": {"stsb/spearman": 80.0}, "test": {"stsb/spearman": 79.0}},
        "whitened_base": {},
        "whitened_base_power": 0.0,
        "index_version": None,
    }
    plain = CardFacts(
        settings=load_settings(tree, overrides).model_dump(mode="json"),
        usage=USAGE,
        base={},
        corpus={"rows": 4200, "read": 5000, "without_positive": None, "documents": None} | (corpus or {}),
        state=ended | (state or {}),
        after={"dev": {"stsb/spearman": 82.0}, "test": {"stsb/spearman": 81.12345}},
    )
    return replace(plain, **changed)


def test_the_hub_s_reader_takes_it_and_writes_the_same_again() -> None:
    base = {
        "base_model": "bert-base-uncased",
        "base_model_revision": "a1b2",
        "license": "apache-2.0",
        "language": ["en"],
    }
    text = model_card(facts(base=base))
    card = ModelCard(text)
    data = card.data
    assert (data.license, data.language, data.base_model) == ("apache-2.0", ["en"], "bert-base-uncased")
    assert (data.library_name, data.pipeline_tag) == ("sentence-transformers", "sentence-similarity")
    assert data.base_model_revision == "a1b2" and "bert-base-uncased (revision `a1b2`), trained" in card.text
    assert {"sentence-transformers", "hncse_ray", "info_nce"} <= set(data.tags)
    again = ModelCard(str(card))
    assert again.data.to_dict() == data.to_dict() == ModelCardData(**data.to_dict()).to_dict()
    assert again.text.strip() == card.text.strip()


def test_scores_become_the_hub_s_results_of_the_test_split_where_there_is_one() -> None:
    after = {"dev": {"stsb/spearman": 82.0, "pairs/mrr": 0.4}, "test": {"stsb/spearman": 81.12345}}
    results = ModelCard(model_card(facts(after=after))).data.eval_results
    found = {(r.dataset_type, r.dataset_split, r.metric_type): r.metric_value for r in results}
    assert found == {("stsb", "test", "cosine_spearman"): 81.1235, ("pairs", "dev", "cosine_mrr"): 0.4}
    assert {r.task_type for r in results} == {"semantic-similarity", "information-retrieval"}


def test_scores_are_told_in_their_units_and_beside_what_they_are_not_compared_with() -> None:
    text = model_card(facts())
    assert "stsb is Spearman correlation x 100" in text and "base whitened on the same corpus" in text
    scores = {"dev": {"retrieval/ndcg@10": 0.5}}
    text = model_card(facts("evaluation.suites=[retrieval]", "evaluation.metric=retrieval/ndcg@10",
                            "evaluation.collection=c", state={"before": scores}, after=scores))  # fmt: skip
    assert "its scores are somewhat too good" in text and "test split" not in text
    assert "stsb" not in text.split("## Scores")[1].split("## Training")[0] and "All are from 0 to 1" in text


def test_the_whitened_base_stands_beside_the_gain() -> None:
    after = {"dev": {"stsb/spearman": 82.0, "pairs/mrr": 0.4}}
    state = {
        "before": {"dev": {"stsb/spearman": 78.0}},
        "whitened_base": {"dev": {"stsb/spearman": 80.5}},
        "whitened_base_power": 0.25,
    }
    text = model_card(facts(state=state, after=after))
    assert "| score | split | before | whitened base | after |" in text
    assert "| stsb/spearman | dev | 78.0000 | 80.5000 | 82.0000 |" in text
    assert "| pairs/mrr | dev |  | | 0.4000 |" in text
    assert "to a power of -0.25, which takes no training" in text and "is not among them" not in text


def test_without_scores_or_a_known_licence_it_says_so() -> None:
    text = model_card(facts(state={"before": {}}, after={"dev": {}}))
    data = ModelCard(text).data
    assert data.license == "other" and data.get("eval_results") is None and data.get("language") is None
    assert "whitened" not in text and "on dev" not in text.split("<details>")[0]
    assert "No set was scored" in text and "licence of the base model was not known" in text
    assert data.get("base_model") is None and "licence is that of the base model" not in text


def test_it_tells_how_the_model_came_to_be() -> None:
    text = model_card(
        facts("negatives.source=pool", "negatives.refresh_every_steps=50", state={"index_version": {"step": 50}})
    )
    for said in (
        "seed: 7", "abc123", "4,200 unique sentences kept of 5,000 lines", "`notes.txt`", "temperature 0.05",
        "| stsb/spearman | test | 79.0000 | 81.1235 |", "step 60", "80 of 64 sentences",
        "1 of the 32 nearest sentences", "cosine at most 0.7", "used as `stored` vectors", "every 50 steps (async)",
        "weights of step 50", "(`pool`)",
    ):  # fmt: skip
        assert said in text, said
    assert f"hncse-ray {__version__}, sentence-transformers 6." in text
    assert "of the batch only" in model_card(facts())
    base = model_card(facts(state={"best_step": 0}))
    assert "no step of the training scored better" in base and "adapted to the corpus" not in base
    whitened = model_card(facts(state={"best_step": 0}, verdict=Verdict(step=0, merge=0, whiten=1)))
    assert "adapted to the corpus" in whitened and "base whitened on the same corpus" not in whitened


def test_a_smoothing_group_is_as_large_as_the_objective_says() -> None:
    text = model_card(facts("objective.name=instance_smoothing", "negatives.source=in_process"))
    assert "16 of the 32 nearest sentences" in text


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_the_papers_of_the_objective_are_cited(objective: str) -> None:
    text = model_card(facts(f"objective.name={objective}"))
    cited = {number for number in ("2104.08821", "2411.12156", "2305.07424") if number in text}
    own = {"hybrid": "2411.12156", "positive_mixing": "2411.12156", "hard_negative_mixing": "2411.12156"}
    assert cited == {"2104.08821", own.get(objective), {"instance_smoothing": "2305.07424"}.get(objective)} - {None}
    bibtex = text.split("```bibtex\n")[1].split("```")[0]
    assert bibtex.count("{") == bibtex.count("}") and bibtex.count("@") == len(cited)


def test_no_folder_of_this_machine_is_told() -> None:
    card_facts = facts(
        "evaluation.pairs_dev=/home/someone/pairs.tsv",
        "evaluation.collection=[/home/someone/cran, shared/med]",
        "corpus.path=[../other/notes.txt, b.txt]",
    )
    text = model_card(card_facts)
    assert "/home" not in text and "someone" not in text and "../" not in text
    tree = shareable_settings(card_facts.settings)
    assert tree["corpus"]["path"] == ["notes.txt", "b.txt"] and tree["evaluation"]["pairs_dev"] == "pairs.tsv"
    assert tree["evaluation"]["collection"] == ["cran", "med"]
    assert tree["encoder"]["model"] == "base" and "storage_path" not in tree["run"]
    collapsed = text.split("```yaml\n")[1].split("```")[0]
    assert yaml.safe_load(collapsed) == tree


@pytest.mark.parametrize("name", ["bert-base-uncased", "org/model", "package:one/two/three"])
def test_names_that_are_no_places_stay(name: str) -> None:
    assert shareable_settings(facts(f"encoder.model={name}").settings)["encoder"]["model"] == name


def test_names_with_slashes_that_are_no_places_stay() -> None:
    card_facts = facts("encoder.model=org/model", "encoder.revision=refs/pr/1", "encoder.prompts={query: 'a/b/c: '}")
    encoder = shareable_settings(card_facts.settings)["encoder"]
    assert encoder["revision"] == "refs/pr/1" and encoder["prompts"] == {"query": "a/b/c: "}


def test_prompts_are_shown_where_the_model_has_any() -> None:
    usage = replace(
        USAGE, prompts={"query": "Ask `it`:\nQuery: ", "topic": "'topic': "}, sides=("Ask `it`:\nQuery: ", "", "")
    )
    text = model_card(facts(usage=usage))
    for said in (
        "encode_query",
        "encode_document",
        'side="query"',
        r"""- `query`: `'Ask `it`:\nQuery: '`""",
        "`topic`",
        "prompt_name",
    ):
        assert said in text, said
    plain = model_card(facts())
    assert "prompt" not in plain.split("## Use")[1].split("## Scores")[0] and "encode_query" not in plain


def test_code_of_the_model_s_own_is_asked_for_only_where_there_is_some() -> None:
    text = model_card(facts(usage=replace(USAGE, own_code=True, plain_pooling=None)))
    assert text.count("trust_remote_code=True") == 2 and "transformers alone" not in text
    assert "trust_remote_code=True" not in model_card(facts())


def test_a_hub_corpus_is_named_in_the_front_matter() -> None:
    card_facts = facts("corpus.source=hub", "corpus.path=org/data", "corpus.subset=en")
    text = model_card(card_facts)
    assert ModelCard(text).data.datasets == ["org/data"] and "`org/data` (train, en)" in text


def test_pairs_are_called_so() -> None:
    changes = ["corpus.source=csv", "corpus.column=question", "corpus.positive_column=answer",
               "corpus.negative_columns=[wrong, worse]"]  # fmt: skip
    text = model_card(facts(*changes, corpus={"without_positive": 7}))
    assert "4,200 pairs by InfoNCE" in text and "unlabelled" not in text and "without labels" not in text
    assert "of `question` and `answer` with the negatives of `wrong`, `worse`; 7 without a positive" in text
    assert "the other pairs of the batch and those given" in text
    assert text.count("\n- corpus digest") == 1 and "dropout views" in text
    assert "dropout views" not in model_card(facts(*changes, corpus={"without_positive": 0}))
    plain = model_card(facts())
    assert (
        "unlabelled sentences" in plain and "trained without labels" in plain and "pairs" not in plain.split("```")[0]
    )


def test_passages_and_code_are_told_of():
    changes = ["corpus.source=documents", "corpus.path=docs"]
    text = model_card(facts(*changes, corpus={"documents": 40}))
    assert "unlabelled passages by unsupervised SimCSE" in text
    assert "unique passages kept of" in text and " documents\n" in text
    text = model_card(facts("corpus.source=python-code", "corpus.path=[]", "corpus.packages=[numpy]"))
    assert "first sentences of their docstrings (numpy)" in text
    assert "unique pairs kept of" in text and "`None`" not in text
