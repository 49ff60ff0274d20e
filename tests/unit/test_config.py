"""Settings: defaults, overrides, and an error for everything that is wrong."""

import re
from pathlib import Path
from typing import Any

import pytest

from hncse_ray.config import OBJECTIVES, Settings, load_settings
from hncse_ray.errors import SettingsError

BASE = {"corpus": {"source": "python-docs"}}


def error_of(*overrides: str, base: dict | None = None) -> str:
    with pytest.raises(SettingsError) as caught:
        load_settings(base or BASE, overrides)
    return str(caught.value)


def test_yaml_and_overrides_give_the_resolved_tree(tmp_path: Path) -> None:
    recipe = tmp_path / "mine.yaml"
    recipe.write_text("corpus: {source: text, path: a.txt}\ntrain: {batch_size: 32}\n")
    settings = load_settings(recipe, ["train.learning_rate=1e-5", "corpus.path=[b.txt, c.txt]", "run.name=7"])
    assert settings.train.batch_size == 32
    assert settings.train.learning_rate == 1e-5
    assert settings.corpus.path == ("b.txt", "c.txt")
    assert settings.run.name == "7"


@pytest.mark.parametrize("name", OBJECTIVES)
def test_resolved_settings_read_back_to_the_same_tree(name: str, tmp_path: Path) -> None:
    settings = load_settings(BASE, [f"objective.name={name}"])
    path = tmp_path / "settings.yaml"
    path.write_text(settings.to_yaml())
    assert load_settings(path) == settings
    assert settings.objective.name == name


def test_settings_cannot_be_changed() -> None:
    settings = load_settings(BASE)
    with pytest.raises(ValueError, match="frozen"):
        settings.train.batch_size = 1  # type: ignore[misc]


def test_of_an_override_given_twice_the_last_counts_as_if_it_stood_alone() -> None:
    recipe = {"corpus": {"source": "python-docs"}, "objective": {"name": "hybrid", "k": 7}}
    twice = ["train.max_steps=5", "objective.name=info_nce", "train.max_steps=6", "objective.name=hybrid"]
    assert load_settings(recipe, twice) == load_settings(recipe, ["train.max_steps=6", "objective.name=hybrid"])
    assert load_settings(recipe, twice).objective.k == 7  # type: ignore[union-attr]


def test_another_objective_keeps_what_it_knows() -> None:
    base = {**BASE, "objective": {"name": "hybrid", "temperature": 0.1, "w_neg": 0.5, "k": 4}}
    objective = load_settings(base, ["objective.name=hard_negative_mixing"]).objective
    assert objective.model_dump() == {
        "name": "hard_negative_mixing", "dimensions": None, "temperature": 0.1, "k": 4, "n_mixes": 40, "alpha": 0.5,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("train.learnig_rate=1", "did you mean 'train.learning_rate'"),
        ("temperature=1", "did you mean 'objective.temperature'"),
        ("objective.name=hybird", "did you mean 'hybrid'"),
        ("trainn.x=1", "did you mean 'train'"),
        ("train.batch_size=1", "train.batch_size = 1: input should be greater than or equal to 2"),
        ("train.learning_rate=.nan", "train.learning_rate"),
        ("train.learning_rate=fast", "train.learning_rate = 'fast'"),
        ("encoder.pooling=cls_before_head", "'auto', 'cls', 'mean', 'max'"),
        ("run.name=a/b", "run.name"),
        ("cluster.use_gpu=2", "'auto', True or False"),
        ("cluster={num_workers: 2, gpus_per_worker: 0.5}", "would put two workers on one GPU"),
        ("cluster={num_workers: 2, min_workers: 3, use_gpu: false}", "min_workers 3 is more than num_workers 2"),
        ("cluster={num_workers: 2, min_workers: 1}", "set use_gpu to true or false"),
        ("corpus.source=text", "needs a path"),
        ("corpus.path=x", "takes no path"),
        ("train={warmup_steps: 5, max_steps: 5}", "train: warmup_steps 5 is not less than max_steps 5"),
        ("evaluation.metric=stsb/recall@1", "choose from stsb/spearman"),
        ("evaluation.suites=[pairs]", "needs pairs_dev"),
        ("export={merge: 0}", "merge 0 without whiten exports the base"),
        ("export.merge=1.5", "1.5 is neither auto nor from 0 to 1"),
        ("export.merge=most", "export.merge = 'most'"),
        ("export.whiten=0", "0 is neither none, auto nor from 0.01 to 0.5"),
        ("export.whiten=all", "export.whiten = 'all'"),
        ("train", "is not an override"),
        ("=3", "is not an override"),
        ("train.batch_size=[", "train.batch_size = '[': input should be a valid integer"),
        ("corpus.source.x=1", "is a value, not a section"),
    ],
)
def test_each_mistake_is_named(override: str, said: str) -> None:
    assert said in error_of(override)


def test_an_unknown_key_names_what_the_objective_knows() -> None:
    assert "objective 'info_nce' knows name, dimensions, temperature" in error_of("objective.margin=0.2")


def test_k_must_fit_the_candidates() -> None:
    assert "larger than the 7 candidates" in error_of("objective.name=hybrid", "train.batch_size=8")


def test_a_smoothing_group_must_fit_its_buffer() -> None:
    assert "does not fit a buffer of 16" in error_of("objective.name=instance_smoothing", "objective.buffer_size=16")


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (("candidates=8", "per_anchor=9"), "negatives: per_anchor 9 + skip_hardest 0 is more than the 8 candidates"),
        (("candidates=8", "per_anchor=5", "skip_hardest=4"), "per_anchor 5 + skip_hardest 4 is more than the 8"),
        (("source=in_process", "num_shards=2"), "source 'in_process' is one shard"),
        (("source=in_process", "cpus_per_shard=1"), "source 'in_process' is one shard"),
        (("source=in_process", "gpus_per_shard=0.5"), "for more set source: pool"),
        (("gpus_per_shard=1.5",), "gpus_per_shard 1.5 must be a whole number or a fraction of one"),
        (("per_anchor=0",), "negatives.per_anchor = 0"),
        (("relative_margin=1",), "negatives.relative_margin = 1"),
        (("max_staleness_steps=0",), "negatives.max_staleness_steps = 0"),
        (("sampling=best",), "'top', 'uniform', 'softmax' or 'bands'"),
    ],
)
def test_global_negatives_that_do_not_fit_together_are_refused(overrides: tuple[str, ...], said: str) -> None:
    assert said in error_of(*(f"negatives.{override}" for override in overrides))


@pytest.mark.parametrize(
    "overrides",
    [
        ("candidates=8", "per_anchor=5", "skip_hardest=3"),
        ("source=in_process",),
        ("source=pool", "num_shards=3", "cpus_per_shard=1.5"),
        ("gpus_per_shard=2",),
        ("gpus_per_shard=0.5",),
    ],
)
def test_global_negatives_that_just_fit_are_taken(overrides: tuple[str, ...]) -> None:
    taken = load_settings(BASE, [f"negatives.{override}" for override in overrides]).negatives
    for key, _, value in (override.partition("=") for override in overrides):
        assert str(getattr(taken, key)) in (value, f"{value}.0")


SMOOTHING = ("objective.name=instance_smoothing", "objective.group_size=20", "negatives.candidates=22")


@pytest.mark.parametrize("source", ["pool", "in_process"])
@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (("negatives.columns=none",), "leaves objective 'info_nce' without use"),
        (("objective.name=three_view", "negatives.columns=none"), "leaves objective 'three_view' without use"),
        (("objective.name=instance_smoothing", "negatives.use=fresh"), "set negatives.use=stored"),
        ((*SMOOTHING, "objective.group_size=23"), "objective.group_size 23 + negatives.skip_hardest 0 is more than"),
        ((*SMOOTHING, "negatives.skip_hardest=3"), "skip_hardest 3 is more than negatives.candidates = 22"),
    ],
)
def test_global_negatives_must_be_of_use_to_the_objective(source: str, overrides: tuple[str, ...], said: str) -> None:
    assert said in error_of(f"negatives.source={source}", *overrides)
    load_settings(BASE, overrides)  # of no matter while there are none


def test_the_objective_says_how_many_neighbours_it_takes() -> None:
    just = load_settings(BASE, ["negatives.source=pool", *SMOOTHING, "negatives.skip_hardest=2"])
    assert just.neighbours_per_anchor == 20
    mixing = ["negatives.source=pool", "objective.name=hybrid", "negatives.columns=none", "negatives.per_anchor=3"]
    assert load_settings(BASE, mixing).neighbours_per_anchor == 3


def test_several_mistakes_are_all_named() -> None:
    message = error_of("train.batch_size=0", "run.seed=-1")
    assert "train.batch_size" in message and "run.seed" in message


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("corpus: {source: [", "not valid YAML"),
        ("- a\n- b\n", "holds no mapping"),
        ("", "holds no mapping"),
        ("corpus: {source: python-docs}\ncorpus: {source: text}\n", "given twice"),
        ("corpus: 3\n", "corpus = '3': it is a section"),
        ("run: {name: x}\n", "'corpus' is missing"),
    ],
)
def test_a_broken_recipe_is_refused(text: str, said: str, tmp_path: Path) -> None:
    recipe = tmp_path / "broken.yaml"
    recipe.write_text(text)
    with pytest.raises(SettingsError, match="broken.yaml") as caught:
        load_settings(recipe)
    assert said in str(caught.value)


@pytest.mark.parametrize("key", ["objective.", "objective.k", "a.b", "", "."])
def test_a_key_of_a_recipe_with_dots_is_an_unknown_setting(key: str, tmp_path: Path) -> None:
    recipe = tmp_path / "dots.yaml"
    recipe.write_text(f"corpus: {{source: python-docs}}\n{key!r}: 1\n")
    with pytest.raises(SettingsError, match=rf"unknown setting {re.escape(repr(key))}"):
        load_settings(recipe)


def test_a_binary_recipe_and_a_folder_are_refused(tmp_path: Path) -> None:
    binary = tmp_path / "x.yaml"
    binary.write_bytes(b"\xff\xfe\x00")
    odd: tuple[Any, ...] = (binary, tmp_path, "", None, 3)
    for path, said in zip(
        odd, ("cannot be read", "is a directory", "'': no such", "of type NoneType", "of type int"), strict=True
    ):
        with pytest.raises(SettingsError, match=said):
            load_settings(path)


def test_one_override_may_stand_alone_and_what_is_none_is_named() -> None:
    assert load_settings("quickstart", "train.max_steps=3").train.max_steps == 3
    for odd, said in (
        ([3], "3: is not an override"),
        ([""], "'': is not an override"),
        ({3: 4}, "unknown setting '3'"),
    ):
        with pytest.raises(SettingsError, match=said):
            load_settings("quickstart", odd)  # type: ignore[arg-type]


def test_recipes_resolve_by_bare_name_and_a_wrong_name_gets_the_nearest() -> None:
    assert isinstance(load_settings("quickstart"), Settings)
    with pytest.raises(SettingsError, match="Did you mean 'quickstart'"):
        load_settings("quikstart")


# ------------------------------------------------------------------------------------------------ pairs


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["corpus.source=text"], "source 'text' has no columns, so positive_column"),
        (["corpus.source=python-docs", "corpus.path=[]"], "source 'python-docs' has no columns, so positive_column"),
        (["corpus.positive_column=null", "corpus.negative_columns=n"], "negative_columns needs positive_column"),
        (["corpus.positive_column=q"], "column 'q' is named twice"),
        (["corpus.negative_columns=[n, a]"], "column 'a' is named twice"),
        (["corpus.negative_columns=[n, n]"], "column 'n' is named twice"),
        (["corpus.repel_within_document=true"], "repel_within_document needs document_column"),
        (
            ["corpus.negative_columns=n", "objective.name=instance_smoothing"],
            "'instance_smoothing' has no use for corpus",
        ),
        (
            ["corpus.negative_columns=n", "negatives.columns=none"],
            "leaves objective 'info_nce' without use for corpus.neg",
        ),
    ],
)
def test_columns_that_cannot_be_are_refused(overrides: list[str], said: str) -> None:
    tree = {"corpus": {"path": "pairs.tsv", "column": "q", "positive_column": "a"}}
    fits = load_settings(tree, ["corpus.negative_columns=n", "corpus.document_column=a"])
    assert fits.corpus.negative_columns == ("n",)
    with pytest.raises(SettingsError) as caught:
        load_settings(tree, overrides)
    assert said in str(caught.value)


def test_a_corpus_of_documents_is_scored_by_itself_however_it_is_named() -> None:
    for corpus in ("corpus={source: documents, path: x.jsonl}", "corpus.source=documents"):
        settings = load_settings({"corpus": {"path": "x.jsonl"}}, [corpus])
        assert (settings.evaluation.suites, settings.evaluation.metric) == (
            ("pseudo-relevance",),
            "pseudo-relevance/ndcg@10",
        )
    settings = load_settings({"corpus": {"path": "x.jsonl"}}, ["corpus.source=documents", "evaluation={suites: []}"])
    assert settings.evaluation.suites == ()
