"""Wrong arguments are refused with a message that names the argument, its value and what is allowed."""

import functools
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch

from hncse_ray.objectives import (
    cosine_ramp,
    hard_negative_mixing,
    hybrid,
    info_nce,
    instance_smoothing,
    positive_mixing,
    three_view,
)

B, M, D = 4, 2, 3
VIEWS = {"z1": torch.ones(B, D), "z2": torch.ones(B, D)}
NEGATIVES = {"negatives": torch.ones(B, M, D)}
POSITIVE = {"margin": 0.1, "w_pos": 1.0, "w_neg": 1.0}
NEGATIVE = {"k": 4, "n_mixes": 5, "alpha": 0.5}
SMOOTHING = {"buffer": torch.ones(6, D), "group_size": 2, "attention_temperature": 2.0, "weight": 0.1}
OBJECTIVES: dict[str, tuple[Callable[..., Any], dict[str, Any]]] = {
    "info_nce": (info_nce, {}),
    "positive_mixing": (positive_mixing, POSITIVE),
    "hard_negative_mixing": (hard_negative_mixing, NEGATIVE),
    "hybrid": (hybrid, {**POSITIVE, **NEGATIVE}),
    "three_view": (three_view, {"z3": torch.ones(B, D)}),
    "instance_smoothing": (instance_smoothing, SMOOTHING),
}
WITH_NEGATIVES = ["info_nce", "positive_mixing", "hard_negative_mixing", "hybrid", "three_view"]
MIXES_NOTHING = ["info_nce", "three_view"]
MIXES_POSITIVES = ["positive_mixing", "hybrid"]
MIXES_NEGATIVES = ["hard_negative_mixing", "hybrid"]
NEIGHBOURS = {"neighbours": torch.ones(B, M, D)}
NAN, INF = float("nan"), float("inf")


def call(name: str, **changed: Any) -> Any:
    function, settings = OBJECTIVES[name]
    return function(**{"temperature": 0.05, **VIEWS, **settings, **changed})


def yes(*shape: int) -> torch.Tensor:
    return torch.ones(*shape, dtype=torch.bool)


def pairs(*shape: int, fill: int = 0, dtype: torch.dtype = torch.int64) -> torch.Tensor:
    return torch.full(shape, fill, dtype=dtype)


REFUSED: list[tuple[list[str], dict[str, Any], str]] = [
    (list(OBJECTIVES), {"temperature": 0.0}, "temperature is 0.0; it must be finite and above 0"),
    (list(OBJECTIVES), {"temperature": -1.0}, "temperature is -1.0"),
    (list(OBJECTIVES), {"temperature": NAN}, "temperature is nan"),
    (list(OBJECTIVES), {"temperature": INF}, "temperature is inf"),
    (list(OBJECTIVES), {"z2": torch.ones(B + 1, D)}, "z2 has shape (5, 3); it must be that of z1, (4, 3)"),
    (list(OBJECTIVES), {"z2": torch.ones(B, D + 1)}, "z2 has shape (4, 4)"),
    (list(OBJECTIVES), {"z1": torch.ones(D)}, "z1 has shape (3,); it must be [B, D]"),
    (list(OBJECTIVES), {"z1": torch.ones(1, D), "z2": torch.ones(1, D)}, "B >= 2"),
    (list(OBJECTIVES), {"z1": torch.ones(B, D, dtype=torch.int64)}, "z1 has dtype torch.int64"),
    (["three_view"], {"z3": torch.ones(B + 1, D)}, "z3 has shape (5, 3)"),
    (WITH_NEGATIVES, {"negatives": torch.ones(M, D)}, "negatives has shape (2, 3); it must be [B, m, D]"),
    (WITH_NEGATIVES, {"negatives": torch.ones(B + 1, M, D)}, "negatives has shape (5, 2, 3)"),
    (WITH_NEGATIVES, {"negatives": torch.ones(B, M, D + 1)}, "negatives has shape (4, 2, 4)"),
    (WITH_NEGATIVES, {"negatives": pairs(B, M, D)}, "negatives has dtype torch.int64"),
    (
        WITH_NEGATIVES,
        {"negatives_mask": torch.ones(B, M, dtype=torch.bool)},
        "negatives_mask has shape (4, 2) but negatives is None",
    ),
    (
        WITH_NEGATIVES,
        {**NEGATIVES, "negatives_mask": torch.ones(B, M + 1, dtype=torch.bool)},
        "negatives_mask has shape (4, 3); it must be [B, m] = (4, 2)",
    ),
    (
        WITH_NEGATIVES,
        {**NEGATIVES, "negatives_mask": torch.ones(B, M)},
        "negatives_mask has dtype torch.float32; it must be torch.bool",
    ),
    (WITH_NEGATIVES, {**NEGATIVES, "columns": "both"}, "columns is 'both'; it must be 'own', 'all' or 'none'"),
    (MIXES_NOTHING, {**NEGATIVES, "columns": "none"}, "columns is 'none'; it must be 'own' or 'all'"),
    (MIXES_NOTHING, {"columns": "none"}, "the negatives would have no use"),
    (
        WITH_NEGATIVES,
        {**NEGATIVES, "columns_mask": yes(B, B * M)},
        "columns_mask has shape (4, 8) but columns is 'own'; it is allowed only with 'all'",
    ),
    (
        [*MIXES_POSITIVES, "hard_negative_mixing"],
        {**NEGATIVES, "columns": "none", "columns_mask": yes(B, B * M)},
        "columns_mask has shape (4, 8) but columns is 'none'",
    ),
    (
        WITH_NEGATIVES,
        {"columns": "all", "columns_mask": yes(B, B * M)},
        "columns_mask has shape (4, 8) but negatives is None",
    ),
    (
        WITH_NEGATIVES,
        {**NEGATIVES, "columns": "all", "columns_mask": yes(B, M)},
        "columns_mask has shape (4, 2); it must be [B, B * m] = (4, 8)",
    ),
    (
        WITH_NEGATIVES,
        {**NEGATIVES, "columns": "all", "columns_mask": yes(1, B * M)},
        "columns_mask has shape (1, 8)",
    ),
    (
        WITH_NEGATIVES,
        {**NEGATIVES, "columns": "all", "columns_mask": torch.ones(B, B * M)},
        "columns_mask has dtype torch.float32; it must be torch.bool",
    ),
    (list(OBJECTIVES), {"batch_mask": yes(B, B + 1)}, "batch_mask has shape (4, 5); it must be [B, B] = (4, 4)"),
    (list(OBJECTIVES), {"batch_mask": torch.ones(B, B)}, "batch_mask has dtype torch.float32; it must be torch.bool"),
    (MIXES_POSITIVES, {"margin": -0.1}, "margin is -0.1; it must be finite and at least 0"),
    (MIXES_POSITIVES, {"margin": NAN}, "margin is nan"),
    (MIXES_POSITIVES, {"w_pos": -1.0}, "w_pos is -1.0"),
    (MIXES_POSITIVES, {"w_neg": -1.0}, "w_neg is -1.0"),
    (MIXES_POSITIVES, {"w_neg": INF}, "w_neg is inf"),
    (MIXES_NEGATIVES, {"alpha": 1.01}, "alpha is 1.01; it must lie in [0, 1]"),
    (MIXES_NEGATIVES, {"alpha": -0.01}, "alpha is -0.01"),
    (MIXES_NEGATIVES, {"alpha": NAN}, "alpha is nan"),
    (MIXES_NEGATIVES, {"k": 1}, "k is 1; it must be finite and at least 2"),
    (MIXES_NEGATIVES, {"n_mixes": -1}, "n_mixes is -1; it must be finite and at least 0"),
    (MIXES_NEGATIVES, {"pairs": pairs(B, 6, 2)}, "pairs has shape (4, 6, 2); it must be [B, n_mixes, 2]"),
    (MIXES_NEGATIVES, {"pairs": pairs(B + 1, 5, 2)}, "pairs has shape (5, 5, 2)"),
    (MIXES_NEGATIVES, {"pairs": pairs(B, 5, 3)}, "pairs has shape (4, 5, 3)"),
    (MIXES_NEGATIVES, {"pairs": pairs(B, 5, 2, dtype=torch.int32)}, "pairs has dtype torch.int32"),
    (MIXES_NEGATIVES, {"pairs": pairs(B, 5, 2, fill=-1)}, "pairs has ranks from -1 to -1"),
    # k = 4, but an anchor of a batch of 4 has only 3 candidates
    (MIXES_NEGATIVES, {"pairs": pairs(B, 5, 2, fill=3)}, "from 3 to 3; they must lie in [0, 3)"),
    (MIXES_NEGATIVES, {**NEGATIVES, "pairs": pairs(B, 5, 2, fill=4)}, "must lie in [0, 4)"),
    (
        MIXES_NEGATIVES,
        {**NEGATIVES, "negatives_mask": torch.zeros(B, M, dtype=torch.bool), "pairs": pairs(B, 5, 2, fill=4)},
        "must lie in [0, 4)",
    ),
    (["instance_smoothing"], {"attention_temperature": 0.0}, "attention_temperature is 0.0"),
    (["instance_smoothing"], {"weight": -0.1}, "weight is -0.1"),
    (["instance_smoothing"], {"group_size": 0}, "group_size is 0; it must lie in [1, K - 1] with K = 6"),
    (["instance_smoothing"], {"group_size": 6}, "group_size is 6"),
    (["instance_smoothing"], {"buffer": torch.ones(6, D + 1)}, "buffer has shape (6, 4); it must be [K, D]"),
    (["instance_smoothing"], {"buffer": torch.ones(D)}, "buffer has shape (3,)"),
    (["instance_smoothing"], {"buffer": pairs(6, D)}, "buffer has dtype torch.int64"),
    (["instance_smoothing"], {"buffer": None}, "buffer is None and neighbours is None; one of them must be given"),
    (
        ["instance_smoothing"],
        {"neighbours": torch.ones(M, D)},
        "neighbours has shape (2, 3); it must be [B, g, D] with B = 4 and D = 3",
    ),
    (["instance_smoothing"], {"neighbours": torch.ones(B + 1, M, D)}, "neighbours has shape (5, 2, 3)"),
    (["instance_smoothing"], {"neighbours": torch.ones(B, M, D + 1)}, "neighbours has shape (4, 2, 4)"),
    (["instance_smoothing"], {"neighbours": pairs(B, M, D)}, "neighbours has dtype torch.int64"),
    (
        ["instance_smoothing"],
        {"neighbours_mask": yes(B, M)},
        "neighbours_mask has shape (4, 2) but neighbours is None; a mask is allowed only with neighbours",
    ),
    (
        ["instance_smoothing"],
        {**NEIGHBOURS, "neighbours_mask": yes(B, M + 1)},
        "neighbours_mask has shape (4, 3); it must be [B, g] = (4, 2)",
    ),
    (
        ["instance_smoothing"],
        {**NEIGHBOURS, "neighbours_mask": torch.ones(B, M)},
        "neighbours_mask has dtype torch.float32; it must be torch.bool",
    ),
    (["instance_smoothing"], {**NEIGHBOURS, "buffer": None, "weight": -0.1}, "weight is -0.1"),
]


@pytest.mark.parametrize("name", OBJECTIVES)
def test_the_unchanged_arguments_are_accepted(name: str) -> None:
    assert torch.isfinite(call(name)[0])
    if name in WITH_NEGATIVES:
        call(name, **NEGATIVES, negatives_mask=yes(B, M))
        call(name, **NEGATIVES, negatives_mask=yes(B, M), columns="all", columns_mask=yes(B, B * M))
    if name == "instance_smoothing":
        call(name, **NEIGHBOURS, neighbours_mask=yes(B, M), buffer=None)
        call(name, **NEIGHBOURS, group_size=0)  # which does not matter here
    if name in MIXES_POSITIVES or name in MIXES_NEGATIVES:
        call(name, **NEGATIVES, columns="none")


@pytest.mark.parametrize(
    ("name", "changed", "message"),
    [
        pytest.param(name, changed, message, id=f"{name}-{message[:40]}")
        for names, changed, message in REFUSED
        for name in names
    ],
)
def test_refused(name: str, changed: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        call(name, **changed)


@pytest.mark.parametrize("name", MIXES_NEGATIVES)
def test_with_a_mask_a_rank_beyond_a_row_is_left_out(name: str) -> None:
    generator = torch.Generator().manual_seed(0)
    z1, z2 = (torch.nn.functional.normalize(torch.randn(B, D, generator=generator), dim=1) for _ in range(2))
    nothing = {"negatives": torch.ones(B, M, D), "negatives_mask": torch.zeros(B, M, dtype=torch.bool)}
    objective = functools.partial(call, name, z1=z1, z2=z2)
    beyond, _ = objective(**nothing, pairs=pairs(B, 5, 2, fill=3))
    none, _ = objective(n_mixes=0)
    torch.testing.assert_close(beyond, none)


@pytest.mark.parametrize(
    ("step", "total", "message"), [(-1, 10, "step is -1"), (0, 0, "total_steps is 0"), (5, -1, "total_steps")]
)
def test_the_ramp_refuses_impossible_steps(step: int, total: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        cosine_ramp(step, total, start=0.0, end=1.0)
