"""An objective of the user's: the documented example, what it is given, what is made of what it returns."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import own_losses
import pytest
import torch
from torch import Tensor
from torch.nn.functional import normalize

from hncse_ray.config import Settings, load_settings
from hncse_ray.errors import SettingsError
from hncse_ray.training.objective import Neighbours, Objective
from hncse_ray.training.objective_check import check_objective

B, D, M = 6, 8, 3
DOCUMENT = Path(__file__).parents[3] / "docs" / "own-objective.md"


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The folder that the command is started in; a command of its own would forget what it imported from there."""
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.chdir(tmp_path)
    known = set(sys.modules)
    yield tmp_path
    for name in set(sys.modules) - known:
        if str(getattr(sys.modules[name], "__file__", None)).startswith(str(tmp_path)):
            del sys.modules[name]


def settings_of(*overrides: str) -> Settings:
    return load_settings({"corpus": {"path": "x"}, "train": {"batch_size": B}}, overrides)


def objective_of(*overrides: str) -> Objective:
    return Objective(settings_of(*overrides).objective, dimension=D, device=torch.device("cpu"))


def views() -> list[Tensor]:
    draw = torch.Generator().manual_seed(0)
    z1 = torch.randn(B, D, generator=draw)
    return [normalize(z1, dim=1), normalize(z1 + torch.randn(B, D, generator=draw), dim=1)]


def neighbours() -> Neighbours:
    draw = torch.Generator().manual_seed(1)
    mask_Bm = torch.rand(B, M, generator=draw) < 0.7
    vectors_BmD = normalize(torch.randn(B, M, D, generator=draw), dim=2) * mask_Bm[..., None]
    return Neighbours(vectors_BmD, mask_Bm, None)


def call(objective: Objective, found: Neighbours | None = None, step: int = 0) -> tuple[Tensor, dict[str, Tensor]]:
    draws = torch.Generator().manual_seed(7)
    return objective(views(), found, step=step, total_steps=100, generator=draws)


# ------------------------------------------------------------------------------------------------ the document


def examples(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", DOCUMENT.read_text(encoding="utf-8"), flags=re.DOTALL)


@pytest.mark.skipif(not DOCUMENT.is_file(), reason="not a checkout")
class TestTheDocument:
    @pytest.fixture(autouse=True)
    def my_losses(self, here: Path) -> None:
        (code,) = (text for text in examples("python") if "def focal" in text)
        (here / "my_losses.py").write_text(code)

    @pytest.mark.parametrize("found", [None, neighbours()])
    def test_the_example_is_info_nce_where_it_says_so(self, found: Neighbours | None) -> None:
        plain, _ = call(objective_of(), found)
        same, metrics = call(objective_of("objective.name=my_losses:focal", "objective.settings.gamma=0"), found)
        torch.testing.assert_close(same, plain)
        assert metrics["focal_weight"] == 1
        focal, _ = call(objective_of("objective.name=my_losses:focal", "objective.settings.gamma=2.0"), found)
        assert 0 < focal < plain  # every weight is below one

    @pytest.mark.parametrize("source", ["none", "pool"])
    def test_its_recipe_can_be_used(self, source: str) -> None:
        import yaml

        (recipe,) = (yaml.safe_load(text) for text in examples("yaml") if text.startswith("objective:"))
        settings = load_settings({"corpus": {"path": "x"}, **recipe}, [f"negatives.source={source}"])
        check_objective(settings, dimension=384, batch_size=64)
        assert load_settings(yaml.safe_load(settings.to_yaml())) == settings

    def test_its_space_can_be_searched(self) -> None:
        import yaml

        from hncse_ray.tuning.space import apply_values, parse_space

        (tree,) = (yaml.safe_load(text) for text in examples("yaml") if text.startswith("parameters:"))
        space, base = parse_space(tree, "own-objective.md"), settings_of("objective.temperature=0.1")
        space.check(base)
        found = [apply_values(base, values).objective for values, _ in space.extremes(base)]
        assert {objective.name for objective in found} == {"info_nce", "my_losses:focal"}
        assert {o.settings.get("gamma") for o in found if o.name == "my_losses:focal"} == {None, 0.0, 4.0}

    def test_it_names_all_that_a_function_is_given(self) -> None:
        from hncse_ray.training.objective import GIVEN

        table = DOCUMENT.read_text(encoding="utf-8").partition("## What it is given")[2].partition("## ")[0]
        rows = re.findall(r"^\| (`.*?) \|", table, flags=re.MULTILINE)
        assert [name for row in rows for name in re.findall(r"`(\w+)`", row)] == list(GIVEN)


# ------------------------------------------------------------------------------------------------ what goes in and out


@pytest.mark.parametrize("found", [None, neighbours()])
def test_it_gets_what_its_signature_names_and_its_settings(found: Neighbours | None) -> None:
    objective = objective_of(
        "objective.name=own_losses:remembers_what_it_is_given", "objective.settings={x: 3, y: [1, two]}"
    )
    own_losses.GIVEN.clear()
    loss, metrics = call(objective, found)
    (given,) = own_losses.GIVEN
    negatives = given.pop("negatives")
    assert negatives is None if found is None else torch.equal(negatives, found.vectors_BmD)
    assert given == {"seed": 7, "total_steps": 100, "x": 3, "y": [1, "two"]}
    z1, z2 = views()
    torch.testing.assert_close(loss, (z1 - z2).square().sum())
    expected = {"a_number": torch.tensor(2.0), "a_tensor": z1.sum(), "positive_similarity": (z1 * z2).sum(1).mean()}
    torch.testing.assert_close(metrics, expected)


def test_random_numbers_of_torch_hang_on_seed_and_batch_alone() -> None:
    noisy = objective_of("objective.name=own_losses:noisy", "objective.settings.noise=0.5")
    torch.manual_seed(1)
    first = call(noisy)[0]
    torch.manual_seed(2)
    assert torch.equal(call(noisy)[0], first)
    assert not torch.equal(call(noisy, step=3)[0], first)
    other = noisy(views(), None, step=0, total_steps=100, generator=torch.Generator().manual_seed(8))[0]
    assert not torch.equal(other, first)


def test_trying_a_function_leaves_the_caller_s_random_numbers_alone() -> None:
    settings = settings_of("objective.name=own_losses:noisy", "objective.settings.noise=0.5")
    torch.manual_seed(1)
    expected = torch.rand(3)
    torch.manual_seed(1)
    check_objective(settings, dimension=D, batch_size=B)
    assert torch.equal(torch.rand(3), expected)


def test_metrics_that_change_their_names_end_the_run(here: Path) -> None:
    (here / "changing.py").write_text(
        "def loss(z1, z2, *, step):\n    return (z1 - z2).square().sum(), {'a': 1} if step < 5 else {'a': 1, 'b': 2}\n"
    )
    objective = objective_of("objective.name=changing:loss")
    call(objective)
    with pytest.raises(SettingsError, match=r"its metrics were \['a'\], now they are \['a', 'b'\]"):
        call(objective, step=5)


def test_as_many_rows_are_tried_as_a_batch_has(here: Path) -> None:
    """One that needs ten rows is no mistake in batches of twelve, and is one in a last batch of three."""
    (here / "top.py").write_text("def loss(z1, z2):\n    return (z1 @ z2.T).topk(10, dim=1).values.mean(), {}\n")
    settings = settings_of("objective.name=top:loss", "train.batch_size=12")
    check_objective(settings, dimension=D, batch_size=12)
    with pytest.raises(SettingsError, match=r"on 3 random rows of 8 numbers it fails: .*\(top.py, line 2\)"):
        check_objective(settings, dimension=D, batch_size=3)


# ------------------------------------------------------------------------------------------------ settings


def test_the_name_comes_first_whatever_the_order_of_overrides() -> None:
    recipe: dict[str, Any] = {
        "corpus": {"path": "x"},
        "objective": {"name": "hybrid", "w_neg": 0.3, "temperature": 0.1},
    }
    found = load_settings(recipe, ["objective.settings.x=1", "objective.name=a.b:c", "objective.dimensions=64"])
    assert found.objective.model_dump() == {"name": "a.b:c", "dimensions": (64,), "settings": {"x": 1}}
    again = load_settings(found.model_dump(), ["objective.settings.y=2"])
    assert again.objective.settings == {"x": 1, "y": 2}
    other = load_settings(found.model_dump(), ["objective.settings.z=3", "objective.name=a.b:d"])
    assert other.objective.settings == {"z": 3}
    back = load_settings(found.model_dump(), ["objective.name=info_nce"])
    assert back.objective.model_dump() == {"name": "info_nce", "dimensions": (64,), "temperature": 0.05}
    assert recipe["objective"] == {"name": "hybrid", "w_neg": 0.3, "temperature": 0.1}


def test_a_given_mapping_is_not_changed_by_overrides() -> None:
    recipe = {"corpus": {"path": "x"}, "objective": {"name": "a:b", "settings": {"x": 1}}}
    load_settings(recipe, ["objective.settings.x=2"])
    assert recipe["objective"] == {"name": "a:b", "settings": {"x": 1}}


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (("objective.name=my_losses:2x",), "'my_losses:2x' is not MODULE:FUNCTION"),
        (("objective.name=my losses:x",), "is not MODULE:FUNCTION"),
        (("objective.name=losses.py",), "unknown objective.name 'losses.py'; choose from info_nce, .*MODULE:FUNCTION"),
        (
            ("objective.name=a:b", "objective.temperature=1"),
            "unknown setting 'objective.temperature'; .*objective.settin",
        ),
        (("objective.name=a:b", "objective.settings.x=1e999"), "objective.settings.x = inf: input should be a finite"),
        (("objective.settings.x=1",), "unknown setting 'objective.settings'; objective 'info_nce' knows name, dimens"),
        (("objective.dimensions=[16, 8, 16]",), "objective.dimensions: .* has a width twice"),
        (("objective.dimensions=[]",), "names no width"),
        (("objective.dimensions=[16, 1]",), "objective.dimensions.1 = 1: .*greater than or equal to 2"),
    ],
)
def test_settings_that_cannot_be(overrides: tuple[str, ...], said: str) -> None:
    with pytest.raises(SettingsError, match=said):
        settings_of(*overrides)
