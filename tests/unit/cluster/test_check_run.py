"""What a run on pairs is refused for before Ray is started, and what it is not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from pair_tables import COLUMNS, make_pairs, write_pairs
from passages import documents_section, make_documents
from tiny import make_sentences, make_topics

from hncse_ray.config import Settings, load_settings
from hncse_ray.corpus import Corpus
from hncse_ray.encoder import load_encoder
from hncse_ray.errors import DataError, HncseError, ModelError
from hncse_ray.reporting import Notice
from hncse_ray.training.checks import check_run
from hncse_ray.training.views import check_views

Tree = dict[str, Any]


class Heard(list[Any]):
    def on(self, event: Any) -> None:
        self.append(event)


@pytest.fixture
def tree(small_run: Tree, tmp_path: Path) -> Tree:
    path = write_pairs(tmp_path / "pairs.jsonl", make_pairs(40))
    small_run["corpus"] |= {"path": str(path), **COLUMNS}
    small_run["objective"] = {"name": "info_nce"}
    return small_run


def checked(settings: Settings) -> Corpus:
    return check_run(settings, Heard())[2]  # type: ignore[arg-type]


def unpooled(model: str, folder: Path) -> str:
    """The model with a pooling that leaves prompts out."""
    encoder = load_encoder(model)
    encoder.model[1].include_prompt = False
    folder.mkdir()
    encoder.model.save_pretrained(str(folder))
    return str(folder)


def test_dropout_is_asked_for_where_a_row_has_no_positive(tree: Tree, tmp_path: Path) -> None:
    heard, without = Heard(), ["encoder.dropout=0"]
    check_run(load_settings(tree), heard)  # type: ignore[arg-type]
    assert Notice("6 rows without a positive: they are trained on in two dropout views") in heard
    with pytest.raises(ModelError, match=r"6 rows without a positive, and it has no dropout.*encoder\.dropout=0\.1"):
        checked(load_settings(tree, without))
    with pytest.raises(ModelError, match=r"it has no dropout, so both views"):
        checked(load_settings(tree, [*without, "corpus.positive_column=null", "corpus.negative_columns=[]"]))
    write_pairs(tmp_path / "pairs.jsonl", [row for row in make_pairs(40) if row["answer"]])
    assert len(checked(load_settings(tree, without))) == 34


def test_queries_of_dev_that_are_trained_on_are_said(tree: Tree, tmp_path: Path) -> None:
    questions = list(dict.fromkeys(row["question"] for row in make_pairs(40)))[:5]
    dev = tmp_path / "dev.tsv"
    section = {"suites": ["pairs"], "metric": "pairs/mrr", "pairs_dev": str(dev)}
    said = "queries of evaluation.pairs_dev that are trained on too: 5 of 8; its score flatters the trained model"
    for asked, notices in ((questions, [said]), ([], [])):
        others = make_sentences(3, seed=99)
        dev.write_text("query\tanswer\n" + "".join(f"{text}\ta {text}\n" for text in (*asked, *others)))
        heard = Heard()
        check_run(load_settings(tree | {"evaluation": section}), heard)  # type: ignore[arg-type]
        assert [event.text for event in heard if isinstance(event, Notice) and "flatters" in event.text] == notices


def test_prompts_of_unlike_length_that_are_not_pooled_are_refused(tree: Tree, tmp_path: Path) -> None:
    model = unpooled(tree["encoder"]["model"], tmp_path / "unpooled")
    tree["encoder"] |= {"model": model, "pooling": "auto"}
    unlike = "encoder.prompts={query: 'the one ', document: 'every '}"
    with pytest.raises(ModelError, match=r"leaves prompts out of its pooling.*differ in length.*encoder\.prompts"):
        checked(load_settings(tree, [unlike]))
    alike = "encoder.prompts={query: 'the one ', document: 'every garden '}"
    assert len(checked(load_settings(tree, [alike]))) == 40
    assert len(checked(load_settings(tree, [unlike, "corpus.positive_column=null", "corpus.negative_columns=[]"]))) > 30
    tree["encoder"] |= {"model": str(tree["encoder"]["model"]), "pooling": "mean"}


def test_documents_are_judged_by_themselves_and_sentences_cannot_be(small_run: Tree, tmp_path: Path) -> None:
    plain = dict(small_run["corpus"])
    small_run["corpus"]["path"] = str(make_topics(tmp_path / "texts", 60))
    del small_run["evaluation"]
    assert len(checked(load_settings(small_run))) == 60
    with pytest.raises(DataError, match=r"has 48 passages beside 12 held out, fewer than"):
        checked(load_settings(small_run, ["train.batch_size=50"]))
    with pytest.raises(DataError, match=r"only 3 sentences can ask.*evaluation\.suites"):
        checked(load_settings(small_run, ["corpus.max_sentences=18"]))
    small_run |= {"corpus": plain, "evaluation": {"suites": ["cloze"], "metric": "cloze/mrr"}}
    with pytest.raises(DataError, match=r"has no documents.*'cloze'.*corpus\.source=documents"):
        checked(load_settings(small_run))


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["corpus.positive_column=answers"], "has no column 'answers'"),
        (["corpus.negative_columns=[wrong, bad]"], "has no column 'bad'"),
        (["corpus.document_column=doc"], "has no column 'doc'"),
        (["objective.name=own_losses:takes_no_negatives"], "corpus.negative_columns"),
        (
            ["encoder.prompts={query: the a one some every river mountain city}", "encoder.max_length=8"],
            "encoder.max_length",
        ),
    ],
)
def test_what_is_wrong_is_named(tree: Tree, overrides: list[str], said: str) -> None:
    with pytest.raises(HncseError) as caught:
        checked(load_settings(tree, overrides))
    assert said in str(caught.value)


# ------------------------------------------------------------------------------------------------ passages


def of_documents(small_run: Tree, folder: Path, **changes: str) -> Tree:
    """The run on documents, every one of them changed alike."""
    documents = [row | changes for row in make_documents(40)]
    small_run["corpus"] = documents_section(folder, documents, str(folder / "cache"))
    return small_run


def test_positives_of_passages_are_asked_for_where_there_are_some(small_run: Tree, tmp_path: Path) -> None:
    every = "views.mix={title: 1, crop: 1, cloze: 1, neighbour: 1, keywords: 1}"
    with pytest.raises(
        DataError, match=r"has no passages, which views\.mix makes positives of.*corpus\.source=documents"
    ):
        checked(load_settings(small_run, [every]))
    assert len(checked(load_settings(of_documents(small_run, tmp_path), [every]))) > 40
    tree = of_documents(small_run, tmp_path, title="")
    with pytest.raises(
        DataError,
        match=r"views\.mix\.title needs a title and a text.*: had by 0 of \d+ passages.*first line.*leave title out",
    ):
        checked(load_settings(tree, ["views.mix={title: 1}"]))
    told: list[str] = []
    corpus = checked(settings := load_settings(tree, ["views.mix={title: 1, cloze: 1}"]))
    check_views(settings, corpus, told.append)
    assert len(told) == 1 and told[0].endswith("or leave title out") and "first line" in told[0]
    tree = of_documents(small_run, tmp_path, text="one river")
    for kind, needed in {"cloze": "two sentences", "crop": "6 words", "neighbour": "another passage"}.items():
        with pytest.raises(DataError, match=f"views.mix.{kind} needs {needed}.*: had by 0 of"):
            checked(load_settings(tree, [f"views.mix={{{kind}: 1}}"]))
    with pytest.raises(ModelError, match="it has no dropout"):  # a row that does for no kind is two dropout passes
        checked(load_settings(of_documents(small_run, tmp_path), ["views.mix={title: 1}", "encoder.dropout=0"]))


def test_prompts_of_passages_that_are_not_pooled_must_be_alike(small_run: Tree, tmp_path: Path) -> None:
    tree = of_documents(small_run, tmp_path)
    tree["encoder"] |= {"model": unpooled(tree["encoder"]["model"], tmp_path / "unpooled"), "pooling": "auto"}
    unlike = "encoder.prompts={query: 'the one ', document: 'every '}"
    for mix in ([], ["views.mix={title: 1}"]):
        with pytest.raises(ModelError, match=r"leaves prompts out of its pooling"):
            checked(load_settings(tree, [unlike, *mix]))
    alike = "encoder.prompts={query: 'the one ', document: 'every garden '}"
    assert len(checked(load_settings(tree, [alike, "views.mix={title: 1}"]))) > 40


def test_what_takes_effect_only_after_the_end_is_said(small_run: Tree, tmp_path: Path) -> None:
    said: list[str] = []

    class Said:
        def on(self, event: Any) -> None:
            said.extend([event.text] if isinstance(event, Notice) else [])

    for size, late in ((193, True), (192, False)):  # 12 steps of 16
        small_run["objective"] = {"name": "instance_smoothing", "buffer_size": size, "group_size": 4}
        check_run(load_settings(small_run), Said())  # type: ignore[arg-type]
        text = f"objective.buffer_size = {size} is more than the 192 anchors of this run: nothing is smoothed"
        assert said == [text] * late
        said.clear()
    small_run["objective"] = {"name": "info_nce"}
    of_documents(small_run, tmp_path)["negatives"] = {"source": "in_process", "candidates": 12}
    for steps, late in ((12, True), (11, False)):
        small_run["views"] = {"mix": {"crop": 1}, "agreement": 5, "agreement_after_steps": steps}
        check_run(load_settings(small_run), Said())  # type: ignore[arg-type]
        assert sum("views.agreement_after_steps = 12 is not less than the 12 steps" in text for text in said) == late
        said.clear()
