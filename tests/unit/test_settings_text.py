"""What is written is what a setting gets: texts as they are, numbers in decimal digits, null where it is allowed."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

import pytest
from annotated_types import Le, Lt
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from hncse_ray.config import OBJECTIVES, Settings, load_settings
from hncse_ray.errors import SettingsError
from hncse_ray.recipe import Plain, parse_yaml, write_yaml

BASE = {"corpus": {"source": "python-docs"}}
NAMES = ["1.10", "007", "1_000", "2024-01-01", "on", "no", "1e3", "null", "None", "0x10", "0o17", "True", "1.0"]
PATHS = [
    *NAMES,
    "12:30",
    "my #1.txt",
    "a: b",
    "[1].txt",
    "[a",
    "{a,b}.txt",
    "{a, b}",
    "*.txt",
    "&x",
    "%20",
    "it's",
    "- a",
]


def of_override(setting: str, text: str) -> Any:
    section, _, key = setting.rpartition(".")
    base = {"corpus": {"source": "hub", "path": "x"}}
    return getattr(getattr(load_settings(base, [f"{setting}={text}"]), section), key)


def of_recipe(folder: Path, setting: str, text: str) -> Any:
    section, _, key = setting.rpartition(".")
    path = folder / "recipe.yaml"
    tree = "corpus: {source: hub, path: x}\n" if section != "corpus" else ""
    own = "  source: hub\n  path: x\n" if section == "corpus" and key != "path" else ""
    own = "  source: hub\n" if key == "path" else own
    path.write_text(f"{tree}{section}:\n{own}  {key}: {text}\n", encoding="utf-8")
    return getattr(getattr(load_settings(path), section), key)


@pytest.mark.parametrize("text", NAMES)
def test_the_name_of_a_run_is_as_typed(text: str, tmp_path: Path) -> None:
    assert of_override("run.name", text) == text
    assert of_recipe(tmp_path, "run.name", text) == text


@pytest.mark.parametrize("text", PATHS)
def test_a_path_is_as_typed(text: str, tmp_path: Path) -> None:
    assert of_override("corpus.path", text) == (text,)
    assert of_override("run.storage_path", text) == text
    if "'" not in text and not text.startswith(("[", "{", "*", "&", "%", "-")) and not {"#", ": "} & {*text, text[1:3]}:
        assert of_recipe(tmp_path, "corpus.path", text) == (text,)
    quoted = text.replace("'", "''")
    assert of_recipe(tmp_path, "corpus.path", f"'{quoted}'") == (text,)
    assert of_override("corpus.path", f"'{quoted}'") == (text,)


@pytest.mark.parametrize("text", ["2023_11_01", "20231101.en", "1.0", "no"])
def test_the_subset_of_a_data_set_is_as_typed(text: str, tmp_path: Path) -> None:
    assert of_override("corpus.subset", text) == text
    assert of_recipe(tmp_path, "corpus.subset", text) == text


@pytest.mark.parametrize("text", ["none", "None", "null", "~", ""])
def test_null_and_its_like_mean_no_value_where_that_is_allowed(text: str, tmp_path: Path) -> None:
    for setting in ("corpus.subset", "negatives.max_score", "train.max_steps"):
        assert of_override(setting, text) is None
        assert of_recipe(tmp_path, setting, text) is None
    if text:
        assert of_override("corpus.subset", f'"{text}"') == text
        assert of_recipe(tmp_path, "corpus.subset", f'"{text}"') == text


def test_none_stays_a_word_where_it_is_one_of_the_choices(tmp_path: Path) -> None:
    assert of_override("negatives.source", "none") == of_recipe(tmp_path, "negatives.source", "none") == "none"


@pytest.mark.parametrize(
    ("text", "number"), [("1e3", 1000), ("1_000", 1000), ("64.0", 64), ("+8", 8), ("2.5e2", 250), ('"16"', 16)]
)
def test_an_integer_is_one_however_it_is_written(text: str, number: int, tmp_path: Path) -> None:
    assert of_override("train.batch_size", text) == number
    assert of_recipe(tmp_path, "train.batch_size", text) == number


@pytest.mark.parametrize("text", ["1e-5", "1.0e-5", "1E-5", "0.00001", ".00001"])
def test_a_number_is_one_however_it_is_written(text: str, tmp_path: Path) -> None:
    assert of_override("train.learning_rate", text) == 1e-5
    assert of_recipe(tmp_path, "train.learning_rate", text) == 1e-5


@pytest.mark.parametrize("setting", ["train.batch_size", "train.epochs", "train.max_steps"])
@pytest.mark.parametrize("text", ["0100", "12:30", "0x40", "0o100", "0b1000", "true", "1__0", "٣", "1e99999", ".inf"])
def test_octal_sexagesimal_and_other_readings_are_refused(setting: str, text: str, tmp_path: Path) -> None:
    for read in (lambda: of_override(setting, text), lambda: of_recipe(tmp_path, setting, text)):
        with pytest.raises(SettingsError, match=rf"{setting} = '{re.escape(text)}': input should be a valid") as caught:
            read()
        assert "decimal digits" in str(caught.value)


@pytest.mark.parametrize(("text", "value"), [("true", True), ("No", False), ("on", True), ("FALSE", False)])
def test_switches(text: str, value: bool, tmp_path: Path) -> None:
    for setting in ("encoder.gradient_checkpointing", "cluster.use_gpu"):
        assert of_override(setting, text) is value
        assert of_recipe(tmp_path, setting, text) is value


def test_what_a_list_or_a_mapping_holds_is_read_in_the_same_way(tmp_path: Path) -> None:
    assert of_override("corpus.path", "x") == ("x",)
    listed = load_settings({"corpus": {}}, ["corpus.path=[007, 1.10, none, 'a, b']"])
    assert listed.corpus.path == ("007", "1.10", "none", "a, b")
    labelled = load_settings(BASE, ["cluster.trainer_labels={zone: 1a, rack: 07, on: yes}", "cluster.pool_labels.n=08"])
    assert labelled.cluster.trainer_labels == {"zone": "1a", "rack": "07", "on": "yes"}
    assert labelled.cluster.pool_labels == {"n": "08"}
    added = load_settings(BASE, ["cluster.trainer_labels={zone: 1a}", "cluster.trainer_labels.rack=07"])
    assert added.cluster.trainer_labels == {"zone": "1a", "rack": "07"}
    section = load_settings(BASE, ["train={batch_size: 1e2, warmup_steps: 3}", "train.epochs=2"]).train
    assert (section.batch_size, section.warmup_steps, section.epochs) == (100, 3, 2)


def test_the_settings_of_an_objective_of_ones_own_are_what_yaml_says(tmp_path: Path) -> None:
    text = "objective.settings={a: null, b: none, c: 1e3, d: on, e: true, f: [007, 0.5, {g: ~}], h: '1'}"
    read = load_settings(BASE, ["objective.name=my:loss", text, "objective.settings.i=[1, x]"]).objective
    own = {"a": None, "b": "none", "c": 1000, "d": "on", "e": True, "f": ["007", 0.5, {"g": None}], "h": "1"}
    assert read.settings == own | {"i": [1, "x"]}  # type: ignore[union-attr]
    path = tmp_path / "settings.yaml"
    path.write_text(load_settings(BASE, ["objective.name=my:loss", text]).to_yaml())
    assert load_settings(path).objective.settings == own  # type: ignore[union-attr]


def test_one_number_stands_for_a_list_of_one(tmp_path: Path) -> None:
    assert load_settings(BASE, ["objective.dimensions=1e2"]).objective.dimensions == (100,)
    for text in ("0100", "[0100]"):
        with pytest.raises(SettingsError, match=r"objective.dimensions = .*in decimal digits"):
            load_settings(BASE, [f"objective.dimensions={text}"])


def test_an_override_leaves_the_mapping_of_the_caller_alone() -> None:
    recipe: dict[str, Any] = {**BASE, "cluster": {"trainer_labels": {"zone": "a"}}}
    load_settings(recipe, ["cluster.trainer_labels.zone=b", "train.epochs=2"])
    assert recipe == {**BASE, "cluster": {"trainer_labels": {"zone": "a"}}}


def test_an_empty_section_is_as_by_default(tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text("run:\ncorpus: {source: python-docs}\nobjective:\ntrain:  # nothing yet\nnegatives: ~\n")
    assert load_settings(path) == load_settings(BASE)
    assert load_settings(path, ["train.batch_size=8"]).train.batch_size == 8
    path.write_text("corpus:\n")
    with pytest.raises(SettingsError, match="needs a path"):
        load_settings(path)


@pytest.mark.parametrize("setting", ["run.name", "train.batch_size", "corpus.path", "encoder.pooling"])
def test_a_setting_without_a_value_is_named(setting: str, tmp_path: Path) -> None:
    for read in (lambda: of_override(setting, ""), lambda: of_recipe(tmp_path, setting, "")):
        with pytest.raises(SettingsError, match=f"{setting} = '': it has no value"):
            read()


@pytest.mark.parametrize("text", ["a\udce9.txt", "a\0b"])
def test_what_no_file_can_be_called_is_refused(text: str) -> None:
    for setting in ("corpus.path", "run.storage_path", "evaluation.senteval_path"):
        with pytest.raises(SettingsError, match=f"{setting} = .*not valid UTF-8"):
            load_settings({"corpus": {}}, [f"{setting}={text}"])


TREES = [
    "a: &x [1]\nb: *x",
    "a: &x [*x]",
    "a: !!int 3",
    'a: "\\UFFFFFFFF"',
    "[" * 5000,
    "a: 1\n---\nb: 2",
    "? [a]\n: b",
]


@pytest.mark.parametrize("text", TREES)
def test_yaml_that_is_none_or_never_ends_is_refused(text: str, tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(text)
    with pytest.raises(SettingsError, match=r"recipe.yaml: is not valid YAML"):
        load_settings(path)


def test_stored_settings_read_back_whatever_their_texts_are(tmp_path: Path) -> None:
    words = [*PATHS, "~", "", "nOne", "x\n", "\u2028", "é", "#", "true", "!!int 3", "*a"]
    tree = {"texts": words, "nothing": None, "number": 1e-5, "flag": True}
    back = parse_yaml(write_yaml(tree), "")
    assert [str(text) for text in back["texts"]] == words
    assert not any(isinstance(text, Plain) and text.is_nothing for text in back["texts"])
    for word in [word for word in words if word]:
        settings = load_settings({"corpus": {"source": "hub", "path": word, "subset": word}})
        path = tmp_path / "settings.yaml"
        path.write_text(settings.to_yaml(), encoding="utf-8")
        assert load_settings(path) == settings


def bounds(metadata: list[Any]) -> list[Any]:
    return [limit for m in metadata for limit in (m.metadata if isinstance(m, FieldInfo) else [m])]


def limits(annotation: Any, metadata: list[Any]) -> Iterator[list[Any]]:
    """The limits of each integer that a type is made of."""
    if annotation is int:
        yield metadata
    for inner in get_args(annotation):
        yield from limits(inner, [*metadata, *getattr(annotation, "__metadata__", ())])


def integers(section: type[BaseModel], path: str = "") -> Iterator[tuple[str, list[Any]]]:
    """Every integer setting with its limits, by path."""
    for name, field in section.model_fields.items():
        yield from ((path + name, found) for found in limits(field.annotation, field.metadata))
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            yield from integers(field.annotation, f"{path}{name}.")


def test_every_integer_has_a_greatest_value_and_what_is_above_it_is_refused() -> None:
    found = [*integers(Settings), *(pair for cls in OBJECTIVES.values() for pair in integers(cls, "objective."))]
    assert len(found) > 30 and {"train.batch_size", "objective.k", "objective.dimensions"} <= {
        path for path, _ in found
    }
    unbounded = {path for path, metadata in found if not any(isinstance(m, Le | Lt) for m in bounds(metadata))}
    assert unbounded == set()
    with pytest.raises(SettingsError, match=r"corpus.max_chars = 1000.*: input should be less than or equal to"):
        load_settings(BASE, ["corpus.max_chars=10000000000000000000"])
