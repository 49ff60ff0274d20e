"""Settings that can be looked up: all of the tree, with a meaning, under the names that others give them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from invoke import assert_refused, hncse
from pydantic import BaseModel

import hncse_ray
from hncse_ray.config import OBJECTIVES, OwnObjective, Settings, load_settings
from hncse_ray.config.reference import reference
from hncse_ray.config.synonyms import SYNONYMS
from hncse_ray.config.values import is_section, kinds_of
from hncse_ray.errors import SettingsError
from hncse_ray.recipe import shipped_folder

ROOT = Path(__file__).parents[3]


def keys_of(section: type[BaseModel], path: str) -> Iterator[str]:
    for name, field in section.model_fields.items():
        yield f"{path}.{name}"
        for inner in filter(is_section, kinds_of(field.annotation)):
            yield from keys_of(inner, f"{path}.{name}")


def keys_of_tree() -> set[str]:
    found = {key for own in [*OBJECTIVES.values(), OwnObjective] for key in keys_of(own, "objective")}
    for name, field in Settings.model_fields.items():
        if name != "objective":
            found.update(*(keys_of(cls, name) for cls in kinds_of(field.annotation) if is_section(cls)))
    return found


def looked_up(*args: str) -> list[dict]:
    return json.loads(hncse("settings", *args, "--json").stdout)["settings"]


def test_every_setting_of_the_tree_is_listed_once_with_its_meaning() -> None:
    listed = looked_up()
    assert {facts["key"] for facts in listed} == keys_of_tree()
    assert len({(facts["key"], *facts["objectives"]) for facts in listed}) == len(listed)
    assert [facts["key"] for facts in listed if not facts["meaning"]] == []


def test_the_reference_page_is_made_from_the_tree() -> None:
    page = hncse("settings", "--markdown").stdout
    assert page == (ROOT / "docs" / "settings.md").read_text(encoding="utf-8"), (
        "hncse settings --markdown > docs/settings.md"
    )
    assert all(f"`{key}`" in page for key in keys_of_tree())


def test_a_setting_is_shown_with_range_default_and_recipes() -> None:
    (facts,) = looked_up("train.learning_rate")
    assert (facts["type"], facts["range"], facts["default"]) == ("number", "above 0, at most 1", "3e-05")
    assert facts["recipes"]["simcse_bert_large"] == "1e-05" and facts["recipes"]["quickstart"] == "3e-05"
    (facts,) = looked_up("encoder.pooling")
    assert facts["type"].startswith("auto, cls, mean, max")
    (facts,) = looked_up("objective.dimensions")
    assert facts["type"] == "list of whole number or null" and facts["range"] == "at least 2, at most 65,536"
    assert {facts["key"] for facts in looked_up("encoder.lora")} == {k for k in keys_of_tree() if "lora." in k}
    shown = hncse("settings", "objective.margin").stdout
    assert "positive_mixing, hybrid" in shown and "0.1 in" in shown


def test_a_setting_is_found_by_what_others_call_it() -> None:
    assert [facts["key"] for facts in looked_up("lr")] == ["train.learning_rate"]
    assert [facts["key"] for facts in looked_up("num_train_epochs")] == ["train.epochs"]
    assert_refused(hncse("settings", "quux"), "quux: is neither a section nor a setting", "Sections are run, corpus")
    assert_refused(hncse("settings", "train", "--markdown"), "--markdown")


def test_other_names_are_of_settings_and_of_one_each() -> None:
    assert set(SYNONYMS) <= keys_of_tree()
    names = [name for others in SYNONYMS.values() for name in others]
    assert len(set(names)) == len(names)
    assert not set(names) & {key.rpartition(".")[2] for key in keys_of_tree()}


@pytest.mark.parametrize(
    ("wrong", "right"),
    [
        *((name, key) for key, names in SYNONYMS.items() for name in names[:1]),
        ("train.lr", "train.learning_rate"),
        ("epochs", "train.epochs"),
        ("train.bs", "train.batch_size"),
        ("seed", "run.seed"),
        ("model", "encoder.model"),
        ("objective.temp", "objective.temperature"),
        ("data", "corpus.path"),
        ("optim.lr", "train.learning_rate"),
        ("optim.warmUp", "train.warmup_steps"),
        ("train.patience", "train.early_stopping_evaluations"),
        ("encoder.adapters", "encoder.lora"),
        ("shards", "negatives.num_shards"),
        ("train.norms", "train.weight_decay"),
    ],
)
def test_a_wrong_key_names_the_setting_that_is_meant(wrong: str, right: str) -> None:
    with pytest.raises(SettingsError, match=rf"unknown setting .* \(did you mean '{right}'"):
        load_settings({"corpus": {"source": "python-docs"}}, [f"{wrong}=1"])


def test_recipes_and_spaces_are_listed() -> None:
    recipes = json.loads(hncse("recipes", "--json").stdout)["recipes"]
    assert [r["name"] for r in recipes] == sorted(p.stem for p in shipped_folder("recipes").glob("*.yaml"))
    assert {"name": "simcse_bert_base", "what": "Unsupervised SimCSE on BERT-base.", "objective": "info_nce",
            "model": "bert-base-uncased", "text": "wiki1m_for_simcse.txt"} in recipes  # fmt: skip
    listed = hncse("recipes").stdout  # 80 columns wide
    assert all(recipe[what] in listed for recipe in recipes for what in ("name", "objective", "model", "text"))
    spaces = json.loads(hncse("spaces", "--json").stdout)["spaces"]
    assert [s["name"] for s in spaces] == sorted(p.stem for p in shipped_folder("search_spaces").glob("*.yaml"))
    assert {"objective.temperature", "train.learning_rate"} == set(
        next(s for s in spaces if s["name"] == "info_nce")["varies"]
    )


def test_the_version_is_said() -> None:
    assert hncse("--version").stdout == f"hncse_ray {hncse_ray.__version__}\n"


@pytest.mark.parametrize(
    ("line", "offered"),
    [
        ("hncse train quick", ["quickstart"]),
        ("hncse train quickstart train.learn", ["train.learning_rate="]),
        ("hncse settings encoder.lora.a", ["encoder.lora.alpha"]),
        ("hncse spac", ["spaces"]),
    ],
)
def test_the_shell_completes_commands_recipes_and_settings(line: str, offered: list[str]) -> None:
    asked = {"_HNCSE_COMPLETE": "complete_bash", "COMP_WORDS": line, "COMP_CWORD": str(len(line.split()) - 1)}
    code = "from hncse_ray.cli import app; app(prog_name='hncse')"
    found = subprocess.run([sys.executable, "-c", code], env=os.environ | asked, capture_output=True, text=True)
    assert found.stdout.split() == offered, found.stderr


def test_sections_come_in_the_order_of_the_tree() -> None:
    assert [s.key for s in reference() if "." not in s.key] == list(Settings.model_fields)
