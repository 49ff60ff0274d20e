"""Whatever is given for settings is taken, and then written and read back to the same, or refused by one message."""

from __future__ import annotations

from pathlib import Path

import optuna
import pytest
import yaml
from hypothesis import strategies as st
from odd_input import overrides, texts, trees, try_out

from hncse_ray.config import Settings, load_settings
from hncse_ray.errors import SettingsError
from hncse_ray.recipe import parse_yaml, read_yaml
from hncse_ray.tuning import parse_space

BASE = {"corpus": {"path": "a.txt"}}
EXAMPLES = [150, pytest.param(10_000, marks=[pytest.mark.slow, pytest.mark.timeout(1200)])]


def assert_one_message(error: SettingsError) -> None:
    assert 10 < len(str(error)) < 20_000
    assert "Traceback" not in str(error) and "object at 0x" not in str(error) and "<class" not in str(error)


def assert_written_and_read_back(settings: Settings, path: Path) -> None:
    path.write_text(settings.to_yaml(), encoding="utf-8")
    assert load_settings(path) == settings
    assert load_settings(yaml.safe_load(path.read_text(encoding="utf-8"))) == settings


@pytest.mark.parametrize("examples", EXAMPLES)
def test_overrides(examples: int, tmp_path: Path) -> None:
    taken = []

    def check(given: list[str]) -> None:
        try:
            settings = load_settings(BASE, given)
        except SettingsError as error:
            assert_one_message(error)
        else:
            taken.append(given)
            assert_written_and_read_back(settings, tmp_path / "settings.yaml")

    try_out(check, examples, st.lists(overrides(), max_size=3))
    assert len(taken) > examples / 50


@pytest.mark.parametrize("examples", EXAMPLES)
def test_recipes(examples: int, tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"

    def check(content: bytes) -> None:
        path.write_bytes(content)
        try:
            settings = load_settings(path)
        except SettingsError as error:
            assert_one_message(error)
            assert "recipe.yaml" in str(error)
        else:
            assert_written_and_read_back(settings, tmp_path / "settings.yaml")

    def encoded(text: str) -> bytes:
        return text.encode("utf-8", "surrogatepass")

    files = st.one_of(
        st.binary(max_size=60),
        texts(60).map(encoded),
        trees().map(lambda tree: yaml.safe_dump(tree).encode()),
        st.dictionaries(st.sampled_from([*Settings.model_fields]), trees(), max_size=4).map(
            lambda tree: yaml.safe_dump({"corpus": {"path": "x"}} | tree, allow_unicode=True).encode("utf-8", "replace")
        ),
        st.lists(st.tuples(st.sampled_from([*Settings.model_fields]), texts()), max_size=4).map(
            lambda pairs: encoded("corpus: {path: a}\n" + "".join(f"{key}: {text}\n" for key, text in pairs))
        ),
    )
    try_out(check, examples, files)


@pytest.mark.parametrize("examples", EXAMPLES)
def test_search_spaces(examples: int, tmp_path: Path) -> None:
    path, base, sampled = tmp_path / "space.yaml", load_settings(BASE), []
    optuna.logging.set_verbosity(optuna.logging.WARNING)

    def check(tree: object) -> None:
        path.write_text(yaml.safe_dump(tree), encoding="utf-8")
        try:
            space = parse_space(read_yaml(path), "space.yaml")
            space.check(base)
        except SettingsError as error:
            assert_one_message(error)
            return
        sampled.append(space.suggest(optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0)).ask()))
        text = yaml.safe_dump(space.to_tree())
        assert parse_space(yaml.safe_load(text), "") == parse_space(parse_yaml(text, ""), "") == space

    numbers = st.one_of(st.integers(-5, 200), st.floats(0, 2), st.sampled_from(["1e-5", "1e3", "0.3", "0100", "none"]))
    keys = st.sampled_from(["train.batch_size", "train.epochs", "train.max_steps", "objective.temperature",
                            "corpus.subset", "negatives.source", "negatives.max_score", "objective.name",
                            "encoder.gradient_checkpointing"])  # fmt: skip
    values = st.one_of(numbers, st.sampled_from(["none", "pool", "hybrid", "info_nce", "7", "on", ""]))
    spec = st.fixed_dictionaries(
        {},
        optional={
            "uniform": st.lists(numbers, min_size=1, max_size=3),
            "int": st.lists(st.integers(-5, 200) | numbers, min_size=2, max_size=2),
            "step": numbers,
            "categorical": st.lists(values, max_size=4),
            "when": st.dictionaries(keys, values | st.lists(values, max_size=2), max_size=1),
        },
    )
    one = st.one_of(
        st.lists(st.floats(0.01, 1), min_size=2, max_size=2).map(lambda ends: {"uniform": sorted(ends)}),
        st.lists(st.integers(2, 200), min_size=2, max_size=2).map(lambda ends: {"int": sorted(ends)}),
        st.lists(values, max_size=3).map(lambda choices: {"categorical": choices}),
        spec,
    )
    spaces = st.fixed_dictionaries(
        {"parameters": st.dictionaries(keys, one, max_size=3)},
        optional={"first": st.lists(st.dictionaries(keys, values, max_size=2), max_size=2)},
    )
    try_out(check, examples, st.one_of(spaces, spaces, trees()))
    assert len(sampled) > examples / 100
