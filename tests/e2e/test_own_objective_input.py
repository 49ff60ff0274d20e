"""What a user can get wrong with an objective: one message, status 2, before Ray starts, and nothing left behind."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from invoke import assert_refused, hncse

HEAD = "import torch\nfrom hncse_ray.objectives import info_nce\n\n\n"
GOOD = (
    "def loss(z1, z2, negatives=None, *, temperature=0.05, negatives_mask=None):\n"
    "    return info_nce(z1, z2, temperature=temperature)\n"
)


def returns(what: str) -> str:
    return f"def loss(z1, z2, negatives=None):\n    return {what}\n"


POOL = ("negatives.source=pool", "negatives.max_score=null")
# What the file says (None: there is none), further overrides, what the message says.
BAD: dict[str, tuple[str | None, tuple[str, ...], tuple[str, ...]]] = {
    "no such module": (None, (), ("there is no module 'my_losses'", "Start the command in the folder with it")),
    "no such package": (
        None,
        ("objective.name=nowhere.losses:loss",),
        ("objective.name = nowhere.losses:loss: there is no module 'nowhere'",),
    ),
    "a name that a terminal might draw": (
        None,
        ("objective.name=no_losses:x",),
        ("objective.name = no_losses:x: there is no module 'no_losses'",),
    ),
    "a module that needs another": (
        "import nowhere_to_be_found\n",
        (),
        ("my_losses cannot be imported: No module named 'nowhere_to_be_found'",),
    ),
    "a syntax error": ("def loss(z1, z2:\n", (), ("my_losses cannot be imported: SyntaxError", "my_losses.py, line 5")),
    "an error in the module": (
        "x = 1\ny = x / 0\n",
        (),
        ("my_losses cannot be imported: ZeroDivisionError in", "my_losses.py, line 6"),
    ),
    "a module that exits": ("raise SystemExit(0)\n", (), ("my_losses cannot be imported: SystemExit",)),
    "no such function": (GOOD, ("objective.name=my_losses:los",), ("has no 'los'", "Did you mean 'loss'?")),
    "not a function": ("loss = 3\n", (), ("it is of type int, not a function",)),
    "a coroutine": ("async " + returns("1"), (), ("returns of type coroutine, not (loss, metrics)",)),
    "one view": ("def loss(z1, *, z2=None):\n    return z1\n", (), ("so it cannot take (z1, z2)", "(z1, *, z2=None)")),
    "a setting that it does not take": (
        GOOD,
        ("objective.settings.temprature=0.1",),
        ("objective.settings.temprature: my_losses:loss takes no 'temprature'", "Did you mean 'temperature'?"),
    ),
    "a setting of another": (
        returns("z1.sum(), {}"),
        ("objective.settings.x=1",),
        ("takes no 'x'", "It takes no settings"),
    ),
    "a setting that it needs": (
        "def loss(z1, z2, *, margin):\n    return z1.sum(), {}\n",
        (),
        ("it needs 'margin'", "Set objective.settings.margin"),
    ),
    "a setting that the run gives": (
        "def loss(z1, z2, *, step):\n    return z1.sum(), {}\n",
        ("objective.settings.step=3",),
        ("objective.settings.step: is given by the run",),
    ),
    "a setting of another type": (
        GOOD,
        ("objective.settings.temperature=cold",),
        ("on 16 random rows of 32 numbers it fails: TypeError", "(my_losses.py, line 6)"),
    ),
    "a setting beside the name": (
        GOOD,
        ("objective.temperature=0.1",),
        ("unknown setting 'objective.temperature'", "has its settings in objective.settings"),
    ),
    "no metrics": (
        returns("z1.sum()"),
        (),
        ("it returns a tensor of shape [] and torch.float32, not (loss, metrics)",),
    ),
    "a loss for each row": (
        returns("z1.sum(dim=1), {}"),
        (),
        ("its loss is a tensor of shape [16]", "not a scalar tensor", "Take the mean over the rows"),
    ),
    "a loss that is a number": (returns("3.0, {}"), (), ("its loss is of type float",)),
    "a loss without gradient": (returns("z1.sum().detach(), {}"), (), ("no gradient flows from its loss to z1 or z2",)),
    "a loss that is infinite": (returns("z1.sum() / 0, {}"), (), ("on random vectors its loss is inf",)),
    "a gradient that is not finite": (
        returns("(z1 - z1).norm(dim=1).sqrt().sum(), {}"),
        (),
        ("on random vectors its loss is 0, and not all of that or its gradient is finite",),
    ),
    "metrics that are none": (returns("z1.sum(), [1]"), (), ("its metrics are of type list",)),
    "a metric that is no number": (returns("z1.sum(), {'rows': z1}"), (), ("its metric 'rows' is a tensor of shape",)),
    "a metric that the run has": (returns("z1.sum(), {'loss': 1}"), (), ("its metrics have the name 'loss'",)),
    "shapes that do not fit": (
        returns("(z1 @ z2).sum(), {}"),
        (),
        ("on 16 random rows of 32 numbers it fails: RuntimeError", "(my_losses.py, line 6)"),
    ),
    "a memory": (
        "calls = []\n\n\ndef loss(z1, z2):\n    calls.append(1)\n    return len(calls) * z1.sum(), {}\n",
        (),
        ("for the same vectors again", "may remember nothing between calls"),
    ),
    "negatives that it does not take": (
        "def loss(z1, z2):\n    return z1.sum(), {}\n",
        POOL,
        ("it takes no negatives, but negatives.source is pool", "set negatives.source=none"),
    ),
    "an error with negatives alone": (
        "def loss(z1, z2, negatives=None):\n    return (z1.sum() if negatives is None else negatives @ 1), {}\n",
        POOL,
        ("on 16 random rows of 32 numbers, 1 negatives each it fails: TypeError", "(my_losses.py, line 6)"),
    ),
    "columns that it does not take": (GOOD, (*POOL, "negatives.columns=all"), ("it takes no `columns`",)),
    "a last batch that is too small": (
        "def loss(z1, z2):\n    return (z1 @ z2.T).topk(16).values.sum(), {}\n",
        (),
        ("on 12 random rows of 32 numbers it fails: RuntimeError",),  # 300 = 18 x 16 + 12
    ),
    "a width above the model's": (
        None,
        ("objective={name: info_nce, dimensions: [64, 16]}",),
        ("objective.dimensions: 64 is more than the 32 numbers of an embedding",),
    ),
    "a width above the model's, of one's own": (
        GOOD,
        ("objective.dimensions=33",),
        ("33 is more than the 32 numbers",),
    ),
}


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The folder that the command is started in. A command that came as far as starting Ray would fail there."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setattr("ray.init", None)
    yield tmp_path
    sys.modules.pop("my_losses", None)


@pytest.fixture
def recipe(small_run: dict[str, Any], tmp_path: Path) -> Path:
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(small_run | {"objective": {"name": "my_losses:loss"}}))
    return path


@pytest.mark.parametrize("case", BAD)
def test_an_objective_that_cannot_be_used(recipe: Path, here: Path, case: str) -> None:
    text, changes, said = BAD[case]
    if text is not None:
        (here / "my_losses.py").write_text(HEAD + text)
    result = hncse("train", recipe, *changes)
    assert_refused(result, *said)
    assert not (here / "runs").exists()


def space(here: Path, parameters: dict[str, Any]) -> Path:
    path = here / "space.yaml"
    path.write_text(yaml.safe_dump({"parameters": parameters}))
    return path


@pytest.mark.parametrize(
    ("parameters", "said"),
    [
        ({"objective.settings.temprature": {"uniform": [0.1, 1]}}, "takes no 'temprature'"),
        ({"objective.settings.temperature": {"int": [0, 1]}}, "temperature is 0"),
        ({"objective.name": {"categorical": ["info_nce", "my_losses:los"]}}, "has no 'los'"),
        (
            {
                "objective.name": {"categorical": ["info_nce", "my_losses:loss"]},
                "objective.settings.temperature": {"uniform": [-1, 1], "when": {"objective.name": "my_losses:loss"}},
            },
            "temperature is -1",
        ),
        ({"objective.dimensions": {"categorical": [16, 64]}}, "64 is more than the 32 numbers"),
    ],
)
def test_a_sweep_over_what_it_does_not_take(recipe: Path, here: Path, parameters: dict[str, Any], said: str) -> None:
    (here / "my_losses.py").write_text(HEAD + GOOD)
    result = hncse("tune", recipe, "--space", space(here, parameters), "--out", here / "out")
    assert_refused(result, said)
    assert not (here / "out").exists()
