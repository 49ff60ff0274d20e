"""Search spaces: what is refused, what is sampled."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import optuna
import pytest
import yaml

from hncse_ray.config import Settings, load_settings
from hncse_ray.errors import SettingsError
from hncse_ray.recipe import find_space, parse_yaml, read_yaml, shipped_folder, write_yaml
from hncse_ray.tuning import SearchSpace, apply_values, parse_space

SPACES = sorted(path.stem for path in shipped_folder("search_spaces").glob("*.yaml"))
CONDITIONAL = """
parameters:
  objective.k:
    int: [2, 20]
    step: 3
    when: {objective.name: [hard_negative_mixing, hybrid]}
  objective.w_neg:
    uniform: [0, 1]
    step: 0.25
    when: {objective.name: hybrid}
  objective.name:
    categorical: [info_nce, hard_negative_mixing, hybrid]
  objective.temperature:
    loguniform: [0.01, 1]
first:
  - {objective.name: hybrid, objective.k: 5, objective.w_neg: 0.25}
"""
HYBRID = "parameters: {objective.name: {categorical: [hybrid]}, "


def base(*overrides: str) -> Settings:
    return load_settings({"corpus": {"source": "python-docs"}}, overrides)


def space(text: str) -> SearchSpace:
    return parse_space(parse_yaml(text, "space.yaml"), "space.yaml")


def test_values_are_sampled_from_their_ranges_and_only_where_their_condition_holds() -> None:
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0))
    seen: Counter[str] = Counter()
    for _ in range(200):
        values = space(CONDITIONAL).suggest(study.ask())
        name = values["objective.name"]
        seen[str(name)] += 1
        assert 0.01 <= values["objective.temperature"] <= 1  # type: ignore[operator]
        assert ("objective.k" in values) == (name != "info_nce")
        assert ("objective.w_neg" in values) == (name == "hybrid")
        assert values.get("objective.k", 2) in (2, 5, 8, 11, 14, 17, 20)
        assert values.get("objective.w_neg", 0.0) in (0.0, 0.25, 0.5, 0.75, 1.0)
        assert apply_values(base(), values).objective.name == name
    assert set(seen) == {"info_nce", "hard_negative_mixing", "hybrid"} and min(seen.values()) > 30


def test_loguniform_is_uniform_in_the_logarithm() -> None:
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0))
    text = "parameters: {objective.temperature: {loguniform: [0.01, 1.0]}}"
    values = [space(text).suggest(study.ask())["objective.temperature"] for _ in range(400)]
    assert sum(v < 0.1 for v in values) == pytest.approx(200, abs=40)  # type: ignore[operator]


def test_numbers_and_choices_are_read_as_their_settings_are() -> None:
    found = space("""
parameters:
  train.learning_rate: {loguniform: [1e-5, 1e-3]}
  train.max_steps: {categorical: [1e2, 200]}
  negatives.source: {categorical: [none, pool]}
  negatives.max_score: {categorical: [none, 0.7], when: {negatives.source: pool}}
  negatives.skip_hardest: {int: [0, 1e1], when: {negatives.max_score: null}}
  corpus.split: {categorical: [1.10, 007, on]}
first:
  - {train.learning_rate: 3e-5, train.max_steps: 1E2, negatives.source: none, corpus.split: 1.10}
  - {train.learning_rate: 1e-3, train.max_steps: 200, negatives.source: pool, negatives.max_score: None,
     negatives.skip_hardest: 1e1, corpus.split: 007}
""")
    found.check(base())
    choices = {p.key: p.ends() for p in found.parameters}
    assert choices == {
        "train.learning_rate": (1e-5, 1e-3), "train.max_steps": (100, 200), "negatives.source": ("none", "pool"),
        "negatives.max_score": (None, 0.7), "negatives.skip_hardest": (0, 10), "corpus.split": ("1.10", "007", "on"),
    }  # fmt: skip
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0))
    for point in found.first:
        study.enqueue_trial(point)
        assert found.suggest(study.ask()) == point
    again = write_yaml(found.to_tree())
    assert parse_space(parse_yaml(again, ""), "") == parse_space(yaml.safe_load(again), "") == found


LOWS, STEPS = (0, 0.05, 0.1, 0.2, 0.5, 1), (0.01, 0.05, 0.1, 0.15, 0.2, 0.25, 0.3)


@pytest.mark.parametrize("low", LOWS)
@pytest.mark.parametrize("step", STEPS)
def test_a_range_in_steps_is_sampled_to_its_top(low: float, step: float) -> None:
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0))
    for count in range(1, 16):
        grid = [round(low + k * step, 9) for k in range(count + 1)]
        text = f"parameters: {{train.epochs: {{uniform: [{low}, {grid[-1]}], step: {step}}}}}"
        (parameter,) = space(text).parameters
        assert parameter.ends() == (low, grid[-1])
        study.enqueue_trial({"train.epochs": grid[-1]})
        seen = {parameter.suggest(study.ask()) for _ in range(60)}
        assert seen <= set(grid) and grid[-1] in seen
        between = f"parameters: {{train.epochs: {{uniform: [{low}, {round(grid[-1] + step / 2, 9)}], step: {step}}}}}"
        assert space(between).parameters[0].ends() == (low, grid[-1])


@pytest.mark.parametrize("name", SPACES)
def test_every_space_that_comes_with_the_package_fits_the_quickstart(name: str) -> None:
    path = find_space(name)
    objective = name if name not in ("hncse_full", "negatives") else "hybrid"
    settings = load_settings("quickstart", [f"objective.name={objective}"])
    found = parse_space(read_yaml(path), str(path))
    found.check(settings)
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=1))
    for _ in range(50):
        apply_values(settings, found.suggest(study.ask()))
    for point in found.first:
        study.enqueue_trial(point)
        assert found.suggest(study.ask()) == point  # the published settings are complete: nothing is sampled


def test_there_is_a_space_for_every_objective() -> None:
    from hncse_ray.config import OBJECTIVES

    assert set(OBJECTIVES) | {"negatives", "hncse_full"} == set(SPACES)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("parameters: {}", "varies nothing"),
        ("first: []", "parameters: field required"),
        ("parameters: {train.learning_rat: {uniform: [0.1, 0.2]}}", "did you mean 'train.learning_rate'?"),
        ("parameters: {train.learning_rate: {uniform: [0.2, 0.2]}}", "range [0.2, 0.2] is empty"),
        ("parameters: {train.learning_rate: {uniform: [0.2, 0.1]}}", "is empty"),
        ("parameters: {train.learning_rate: {uniform: [0.1]}}", "takes [low, high]"),
        ("parameters: {train.learning_rate: {loguniform: [0, 0.1]}}", "no logarithm"),
        ("parameters: {train.learning_rate: {loguniform: [1.0e-5, 0.1], step: 0.1}}", "takes no step"),
        ("parameters: {train.learning_rate: {uniform: [0.1, 0.2], step: 0.5}}", "step 0.5 does not fit"),
        ("parameters: {train.learning_rate: {uniform: [0.5, 2.0]}}", "train.learning_rate = 2.0: input should be less"),
        ("parameters: {train.learning_rate: {normal: [0, 1]}}", "known are uniform, loguniform, int, categorical"),
        ("parameters: {train.learning_rate: {}}", "has no distribution"),
        ("parameters: {train.learning_rate: {uniform: [0.1, 0.2], int: [1, 2]}}", "has 2 distributions"),
        ("parameters: {train.batch_size: {int: [8, 16], step: 1.5}}", "not whole"),
        ("parameters: {train.batch_size: {int: [8.5, 16]}}", "parameters.train.batch_size.int.0"),
        ("parameters: {train.batch_size: {categorical: []}}", "empty or given twice"),
        ("parameters: {train.batch_size: {uniform: [32, 64]}}", "train.batch_size: is an integer, and uniform draws"),
        ("parameters: {train.batch_size: {loguniform: [32, 64]}}", "Use int, or categorical"),
        ("parameters: {train.max_steps: {uniform: [1, 9], step: 1}}", "train.max_steps: is an integer"),
        ("parameters: {train.batch_size: {int: [2, 0100]}}", "parameters.train.batch_size.int: input should be"),
        ("parameters: {train.epochs: {uniform: [1, 12:30]}}", "parameters.train.epochs.uniform: input should be"),
        ("parameters: {train.batch_size: {int: [2, 1e30]}}", "less than or equal to 9007199254740992"),
        ("parameters: {train.batch_size: {categorical: [8, 1e1, 0x20]}}", "train.batch_size: '0x20': input should be"),
        ("parameters: {corpus.subset: {categorical: [[a, b]]}}", "is not a single value"),
        ("parameters: {train.batch_size: {categorical: [8, 8]}}", "empty or given twice"),
        ("parameters: {train.batch_size: {categorical: [8], step: 1}}", "has no step"),
        ("parameters: {objective.k: {int: [2, 9]}}", "unknown setting 'objective.k'"),
        ("parameters: {run.seed: {int: [0, 9]}}", "is the same for all trials"),
        ("parameters: {evaluation.metric: {categorical: [a, b]}}", "is the same for all trials"),
        (
            HYBRID + "objective.k: {int: [2, 9], when: {objective.nam: hybrid}}}",
            "'objective.nam', which is not a parameter (did you mean 'objective.name'?)",
        ),
        (
            HYBRID + "objective.k: {int: [2, 9], when: {objective.name: hybird}}}",
            "objective.name = 'hybird', which is no choice of it",
        ),
        (
            "parameters: {objective.name: {categorical: [hybrid, info_nce]}, objective.k: {int: [2, 9]}}",
            "unknown setting 'objective.k'",
        ),
        (
            "parameters: {train.batch_size: {int: [8, 16]}, train.epochs: {int: [1, 2], when: {train.batch_size: 8}}}",
            "is not categorical",
        ),
        (
            "parameters: {train.schedule: {categorical: [linear], when: {train.schedule: linear}}}",
            "depends on itself",
        ),
        ("parameters: {objective.name: {categorical: [simcse]}}", "unknown objective.name 'simcse'"),
        (CONDITIONAL + "  - {objective.temperature: 2.0}", "objective.temperature = 2.0 lies outside the space"),
        (
            CONDITIONAL + "  - {objective.name: info_nce, objective.k: 5}",
            "objective.k exists only where objective.name",
        ),
        (CONDITIONAL + "  - {objective.name: hybrid, objective.k: 6}", "It goes from 2 to 20 in steps of 3"),
        (CONDITIONAL + "  - {objective.margin: 0.1}", "'objective.margin' is not a parameter of the space"),
    ],
)
def test_what_cannot_be_sampled_is_refused(text: str, said: str) -> None:
    with pytest.raises(SettingsError) as caught:
        space(text).check(base())
    assert said in str(caught.value), str(caught.value)


def test_the_error_names_the_parameter_and_the_file(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match=r"^space.yaml: objective.temperature: its range"):
        space("parameters: {objective.temperature: {uniform: [1, 0]}}")
    with pytest.raises(SettingsError, match=r"^parameters.objective.temperature: .* Tried: objective.temperature = 11"):
        space("parameters: {objective.temperature: {uniform: [1, 11]}}").check(base())


def test_another_objective_keeps_of_the_recipe_what_it_knows() -> None:
    settings = base("objective.name=hybrid", "objective.temperature=0.2", "objective.k=7")
    changed = apply_values(settings, {"objective.name": "info_nce"})
    assert changed.objective.model_dump() == {"name": "info_nce", "dimensions": None, "temperature": 0.2}
