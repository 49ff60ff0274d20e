"""Every objective against Python loops written from its definition: values, metrics and gradients in fp64."""

import copy
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from hncse_ray.objectives import (
    hard_negative_mixing,
    hybrid,
    info_nce,
    instance_smoothing,
    positive_mixing,
    three_view,
)

torch.set_num_threads(1)

TOLERANCE = 1e-10
COLUMN_SHAPES = [(2, 3, 1), (2, 17, 5), (5, 768, 2), (9, 17, 3), (3, 3, 0)]
SHAPES = [(B, D, m) for B in (2, 3, 9) for D in (3, 17, 768) for m in (0, 1, 5)]


def unit(x: Tensor) -> Tensor:
    return x / x.norm(dim=-1, keepdim=True)


class Case:
    """Random embeddings whose positives range from opposite to identical, and settings to go with them."""

    def __init__(self, B: int, D: int, m: int, *, masked: bool, seed: int = 0, groups: list[int] | None = None) -> None:
        self.groups = groups or list(range(B))  # rows of one group do not repel each other
        of_row = torch.tensor(self.groups)
        self.batch_mask = of_row[:, None] != of_row if groups else None
        rng = torch.Generator().manual_seed(seed * 7919 + B * 1000 + D * 10 + m)

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=rng, dtype=torch.float64)

        self.z1 = unit(normal(B, D))
        pull = torch.linspace(-0.2, 1.0, B, dtype=torch.float64)[torch.randperm(B, generator=rng)]
        self.z2 = unit(pull[:, None] * self.z1 + unit(normal(B, D)))
        self.z3 = unit(self.z2 + 0.5 * unit(normal(B, D)))
        near = 2 * torch.rand(B, m, 1, generator=rng, dtype=torch.float64) - 0.5
        self.g = unit(near * self.z1[:, None] + unit(normal(B, m, D)))
        self.mask = torch.rand(B, m, generator=rng) < 0.6 if masked else None
        self.k, self.s = 4, 7
        available = self.k if masked else min(self.k, B - 1 + m)
        self.pairs = torch.randint(available, (B, self.s, 2), generator=rng)
        self.columns_mask = torch.rand(B, B * m, generator=rng) < 0.7 if masked else None
        self.inputs = [self.z1, self.z2, self.z3, self.g]
        for tensor in self.inputs:
            tensor.requires_grad_()

    def usable(self, i: int) -> list[Tensor]:
        """The usable negatives of anchor i."""
        return [g for j, g in enumerate(self.g[i]) if self.mask is None or self.mask[i, j]]

    def columns(self, i: int, columns: str | None) -> list[Tensor]:
        """The global negatives that anchor i repels, in the order of the columns."""
        if columns == "own":
            return self.usable(i)
        if columns in ("none", None):
            return []
        B, m = self.g.shape[:2]
        return [
            self.g[j, n]
            for j in range(B)
            for n in range(m)
            if self.mask is None or (self.mask[j, n] and self.columns_mask[i, j * m + n])
        ]

    def columns_keywords(self, columns: str) -> dict:
        """What an objective takes for the same."""
        return {"columns": columns} | ({"columns_mask": self.columns_mask} if columns == "all" else {})

    def candidates(self, i: int) -> list[Tensor]:
        """N_i, hardest first."""
        everything = [z for j, z in enumerate(self.z2) if self.groups[j] != self.groups[i]] + self.usable(i)
        return sorted(everything, key=lambda n: -dot(self.z1[i], n))


def dot(a: Tensor, b: Tensor) -> float:
    return float((a @ b).detach())


def row_loss(columns: list[Tensor], label: int, temperature: float) -> Tensor:
    logits = torch.stack(columns) / temperature
    return torch.logsumexp(logits, 0) - logits[label]


def naive_mixed_positive(case: Case, i: int, margin: float, w_pos: float, w_neg: float) -> tuple[Tensor, str]:
    z = case.z2[i]
    if not case.candidates(i):
        return z, "share_kept"
    h = case.candidates(i)[0]
    p, q = case.z1[i] @ z, case.z1[i] @ h
    if p <= 0 or (p > q and (p - q) / p > margin):
        return z, "share_kept"
    if p > q:
        return unit(w_pos * z + w_neg * h), "share_weighted_mix"
    return unit((p * z + q * h) / (p + q)), "share_similarity_mix"


def naive_mixed_negatives(case: Case, i: int, alpha: float) -> list[Tensor]:
    top = case.candidates(i)[: case.k]
    return [
        unit(alpha * top[a] + (1 - alpha) * top[b])
        for a, b in case.pairs[i].tolist()
        if len(top) >= 2 and max(a, b) < len(top)
    ]


def naive(
    case: Case,
    *,
    temperature: float,
    positive: dict | None = None,
    alpha: float | None = None,
    columns: str | None = "own",
) -> tuple[Tensor, dict[str, float]]:
    """InfoNCE with mixed positives if `positive` is given and mixed negatives if `alpha` is.

    `columns` is None where no negatives are given.
    """
    B = len(case.z1)
    positives, kinds = list(case.z2), []
    if positive is not None:
        mixed = [naive_mixed_positive(case, i, **positive) for i in range(B)]
        positives, kinds = [z for z, _ in mixed], [kind for _, kind in mixed]
    losses, hits, mix_cosines = [], [], []
    for i in range(B):
        mixes = [] if alpha is None else naive_mixed_negatives(case, i, alpha)
        others = [z for j, z in enumerate(positives) if case.groups[j] != case.groups[i]]
        cosines = [case.z1[i] @ n for n in [positives[i], *others, *case.columns(i, columns), *mixes]]
        losses.append(row_loss(cosines, 0, temperature))
        hits.append(all(cosines[0] > c for c in cosines[1:]))
        mix_cosines += [dot(case.z1[i], n) for n in mixes]
    hardest = [dot(case.z1[i], case.candidates(i)[0]) for i in range(B) if case.candidates(i)]
    metrics = {
        "positive_similarity": sum(dot(case.z1[i], case.z2[i]) for i in range(B)) / B,
        "hardest_negative_similarity": sum(hardest) / max(len(hardest), 1),
        "contrastive_accuracy": sum(hits) / B,
    }
    if columns is not None:
        own = [dot(case.z1[i], n) for i in range(B) for n in case.usable(i)]
        metrics["negative_similarity"] = sum(own) / max(len(own), 1)
    if positive is not None:
        for kind in ("share_kept", "share_weighted_mix", "share_similarity_mix"):
            metrics[kind] = kinds.count(kind) / B
    if alpha is not None:
        metrics["mixed_negative_similarity"] = sum(mix_cosines) / max(len(mix_cosines), 1)
        metrics["candidates_used"] = sum(min(case.k, len(case.candidates(i))) for i in range(B)) / B
    return torch.stack(losses).mean(), metrics


def assert_same(case: Case, got: tuple[Tensor, dict[str, Tensor]], expected: tuple[Tensor, dict[str, float]]) -> None:
    loss, metrics = got
    reference, reference_metrics = expected
    assert loss.dtype == torch.float64 and loss.ndim == 0
    assert abs(loss.item() - reference.item()) < TOLERANCE
    assert metrics.keys() == reference_metrics.keys()
    for name, value in metrics.items():
        assert value.dtype == torch.float32 and value.ndim == 0 and not value.requires_grad, name
        assert float(value) == pytest.approx(reference_metrics[name], abs=1e-6), name
    ours = torch.autograd.grad(loss, case.inputs, allow_unused=True)
    theirs = torch.autograd.grad(reference, case.inputs, allow_unused=True)
    for mine, other, tensor in zip(ours, theirs, case.inputs, strict=True):
        zero = torch.zeros_like(tensor)
        torch.testing.assert_close(
            zero if mine is None else mine, zero if other is None else other, atol=1e-9, rtol=1e-9
        )


POSITIVE = {"margin": 0.4, "w_pos": 1.3, "w_neg": 0.6}
ALPHAS = {"hard_negative_mixing": 0.8, "hybrid": 0.3}
OBJECTIVES = {each.__name__: each for each in (info_nce, positive_mixing, hard_negative_mixing, hybrid)}
# Without mixing, negatives that are no columns have no use and are refused: see test_errors.py.
COLUMNS = [(name, whose) for name in OBJECTIVES for whose in ("own", "all", "none")]
COLUMNS.remove(("info_nce", "none"))
GROUPS = [[0, 1, 0, 2, 0, 1, 3, 4, 5], [0, 1, 1], [0, 0], [0, 0, 0, 0, 1]]


def assert_as_defined(case: Case, name: str, *, columns: str = "own", batch_mask: Tensor | None = None) -> None:
    positive, alpha = POSITIVE if name in ("positive_mixing", "hybrid") else None, ALPHAS.get(name)
    mixing = {} if alpha is None else {"k": case.k, "n_mixes": case.s, "alpha": alpha, "pairs": case.pairs}
    masks = {"negatives_mask": case.mask, "batch_mask": batch_mask, **case.columns_keywords(columns)}
    got = OBJECTIVES[name](case.z1, case.z2, case.g, temperature=0.2, **(positive or {}), **mixing, **masks)
    assert_same(case, got, naive(case, temperature=0.2, positive=positive, alpha=alpha, columns=columns))


@pytest.fixture(params=[False, True], ids=["all-usable", "masked"])
def masked(request: pytest.FixtureRequest) -> bool:
    return request.param


@pytest.mark.parametrize("name", OBJECTIVES)
@pytest.mark.parametrize(("B", "D", "m"), SHAPES)
def test_any_shape(B: int, D: int, m: int, name: str, masked: bool) -> None:
    assert_as_defined(Case(B, D, m, masked=masked), name)


def test_the_random_cases_reach_every_branch_of_positive_mixing() -> None:
    shares = dict.fromkeys(("share_kept", "share_weighted_mix", "share_similarity_mix"), 0.0)
    guarded = 0
    for B, D, m in SHAPES:
        case = Case(B, D, m, masked=False)
        _, metrics = naive(case, temperature=0.2, positive=POSITIVE)
        shares = {kind: total + metrics[kind] for kind, total in shares.items()}
        guarded += int(((case.z1 * case.z2).sum(1) <= 0).sum())
    assert all(total > 0 for total in shares.values()) and guarded > 0


@pytest.mark.parametrize(("name", "columns"), COLUMNS)
@pytest.mark.parametrize(("B", "D", "m"), COLUMN_SHAPES)
def test_whose_negatives_are_columns(B: int, D: int, m: int, name: str, columns: str, masked: bool) -> None:
    assert_as_defined(Case(B, D, m, masked=masked), name, columns=columns)


@pytest.mark.parametrize(("name", "columns"), COLUMNS)
@pytest.mark.parametrize("groups", GROUPS)
@pytest.mark.parametrize("m", [0, 2])
def test_rows_that_do_not_repel_each_other(groups: list[int], m: int, name: str, columns: str, masked: bool) -> None:
    case = Case(len(groups), 5, m, masked=masked, groups=groups)
    assert_as_defined(case, name, columns=columns, batch_mask=case.batch_mask)


@pytest.mark.parametrize("groups", GROUPS)
def test_smoothing_of_rows_that_do_not_repel_each_other(groups: list[int]) -> None:
    case = Case(len(groups), 5, 0, masked=False, groups=groups)
    buffer = unit(torch.randn(12, 5, generator=torch.Generator().manual_seed(3), dtype=torch.float64))
    settings = {"temperature": 0.2, "group_size": 4, "attention_temperature": 0.7, "weight": 0.3}
    loss, metrics, _ = instance_smoothing(case.z1, case.z2, buffer, batch_mask=case.batch_mask, **settings)
    assert_same(case, (loss, metrics), naive_smoothing(case, buffer, **settings))


def test_the_random_masks_of_columns_matter() -> None:
    """They leave out usable columns, other anchors' and own ones, and columns of each kind remain."""
    case = Case(9, 17, 3, masked=True)
    usable = case.mask.reshape(1, 27).expand(9, 27)
    own = torch.eye(9, dtype=torch.bool).repeat_interleave(3, dim=1)
    for kept in (case.columns_mask, ~case.columns_mask):
        assert (usable & own & kept).any() and (usable & ~own & kept).any()


@given(
    B=st.integers(2, 7),
    D=st.integers(2, 24),
    m=st.integers(0, 4),
    masked=st.booleans(),
    temperature=st.floats(0.05, 2.0),
    margin=st.floats(0.0, 1.5),
    w_pos=st.floats(0.1, 2.0),
    w_neg=st.floats(0.0, 2.0),
    alpha=st.floats(0.0, 1.0),
    seed=st.integers(0, 10_000),
)
@settings(max_examples=40, deadline=None, derandomize=True)
def test_hybrid_for_any_shape_and_setting(
    B: int,
    D: int,
    m: int,
    masked: bool,
    temperature: float,
    margin: float,
    w_pos: float,
    w_neg: float,
    alpha: float,
    seed: int,
) -> None:
    case = Case(B, D, m, masked=masked, seed=seed)
    positive = {"margin": margin, "w_pos": w_pos, "w_neg": w_neg}
    loss, _ = hybrid(
        case.z1,
        case.z2,
        case.g,
        temperature=temperature,
        k=case.k,
        n_mixes=case.s,
        alpha=alpha,
        pairs=case.pairs,
        negatives_mask=case.mask,
        **positive,
    )
    reference, _ = naive(case, temperature=temperature, positive=positive, alpha=alpha)
    assert loss.item() == pytest.approx(reference.item(), rel=1e-9, abs=1e-9)


@pytest.mark.parametrize(("B", "D"), [(2, 3), (9, 17), (5, 768)])
def test_three_view(B: int, D: int) -> None:
    case = Case(B, D, 0, masked=False)
    got = three_view(case.z1, case.z2, case.z3, temperature=0.2)
    assert_same(case, got, naive_three_view(case, columns=None))


@pytest.mark.parametrize("columns", ["own", "all"])
@pytest.mark.parametrize("groups", GROUPS)
@pytest.mark.parametrize("m", [0, 2])
def test_three_views_of_rows_that_do_not_repel_each_other(
    groups: list[int], m: int, columns: str, masked: bool
) -> None:
    case = Case(len(groups), 5, m, masked=masked, groups=groups)
    keywords = {"negatives_mask": case.mask, "batch_mask": case.batch_mask, **case.columns_keywords(columns)}
    got = three_view(case.z1, case.z2, case.z3, case.g, temperature=0.2, **keywords)
    assert_same(case, got, naive_three_view(case, columns=columns))


@pytest.mark.parametrize("columns", ["own", "all"])
@pytest.mark.parametrize(("B", "D", "m"), COLUMN_SHAPES)
def test_three_view_with_negatives(B: int, D: int, m: int, masked: bool, columns: str) -> None:
    case = Case(B, D, m, masked=masked)
    keywords = {"negatives_mask": case.mask, **case.columns_keywords(columns)}
    got = three_view(case.z1, case.z2, case.z3, case.g, temperature=0.2, **keywords)
    assert_same(case, got, naive_three_view(case, columns=columns))


def naive_three_view(case: Case, *, columns: str | None) -> tuple[Tensor, dict[str, float]]:
    first, first_metrics = naive(case, temperature=0.2, columns=columns)
    later = copy.copy(case)
    later.z1, later.z2 = case.z2, case.z3
    second, second_metrics = naive(later, temperature=0.2, columns=columns)
    return first + second, {name: (first_metrics[name] + second_metrics[name]) / 2 for name in first_metrics}


def naive_smoothing(
    case: Case,
    buffer: Tensor,
    *,
    temperature: float,
    group_size: int,
    attention_temperature: float,
    weight: float,
) -> tuple[Tensor, dict[str, float]]:
    base, metrics = naive(case, temperature=temperature, columns=None)
    rows = [*buffer, *case.z2.detach()][-len(buffer) :]
    if not rows[0].any():
        return base, metrics | {"smoothing_active": 0.0, "smoothing_loss": 0.0}
    groups = []
    for z in case.z2:
        ordered = sorted(rows, key=lambda row, z=z: -dot(z, row))
        groups.append([z, *ordered[1 : 1 + group_size]])
    smoothed = naive_smoothed_term(case, groups, temperature, attention_temperature)
    metrics |= {"smoothing_active": 1.0, "smoothing_loss": float(smoothed.detach())}
    return base + weight * smoothed, metrics


def naive_smoothed_term(
    case: Case, groups: list[list[Tensor]], temperature: float, attention_temperature: float
) -> Tensor:
    """Each group begins with the positive itself; alone it is not normalised once more."""
    stars = []
    for group in groups:
        z = group[0]
        if len(group) == 1:
            stars.append(z)
            continue
        scores = torch.stack([z @ member for member in group]) / attention_temperature
        weights = [score.exp() / scores.exp().sum() for score in scores]
        stars.append(unit(sum(w * member for w, member in zip(weights, group, strict=True))))
    losses = []
    for i, z in enumerate(case.z1):
        others = [star for j, star in enumerate(stars) if case.groups[j] != case.groups[i]]
        losses.append(row_loss([z @ star for star in [stars[i], *others]], 0, temperature))
    return torch.stack(losses).mean()


@pytest.mark.parametrize(("B", "D", "K"), [(2, 3, 6), (5, 17, 12), (4, 768, 9), (9, 17, 9), (9, 17, 6)])
@pytest.mark.parametrize("filled", [0, 2, 100])
@pytest.mark.parametrize("group_size", [1, 5])
def test_instance_smoothing(B: int, D: int, K: int, filled: int, group_size: int) -> None:
    case = Case(B, D, 0, masked=False)
    buffer = unit(torch.randn(K, D, generator=torch.Generator().manual_seed(K), dtype=torch.float64))
    buffer[: max(K - filled, 0)] = 0
    settings = {"temperature": 0.2, "group_size": group_size, "attention_temperature": 0.7, "weight": 0.3}
    loss, metrics, new_buffer = instance_smoothing(case.z1, case.z2, buffer, **settings)
    expected_buffer = torch.cat([buffer, case.z2.detach()])[-K:]
    assert torch.equal(new_buffer, expected_buffer)
    assert math.isfinite(loss.item())
    assert_same(case, (loss, metrics), naive_smoothing(case, buffer, **settings))


@pytest.mark.parametrize(("B", "D", "g"), [(2, 3, 1), (5, 17, 4), (4, 768, 9), (9, 3, 3)])
@pytest.mark.parametrize("with_buffer", [False, True])
def test_instance_smoothing_with_neighbours(B: int, D: int, g: int, masked: bool, with_buffer: bool) -> None:
    case = Case(B, D, 0, masked=False)
    other = Case(B, D, g, masked=masked)
    neighbours, mask = unit(case.z2.detach()[:, None] + unit(other.g.detach())), other.mask
    if mask is not None:
        mask[0], mask[1] = True, False
    settings = {"attention_temperature": 0.7, "weight": 0.3, "neighbours": neighbours, "neighbours_mask": mask}
    buffer = torch.zeros(4, D) if with_buffer else None
    loss, metrics, same_buffer = instance_smoothing(case.z1, case.z2, buffer, temperature=0.2, group_size=2, **settings)
    assert same_buffer is buffer
    assert buffer is None or not buffer.any()

    groups = [
        [z, *(n for j, n in enumerate(neighbours[i]) if mask is None or mask[i, j])] for i, z in enumerate(case.z2)
    ]
    base, expected = naive(case, temperature=0.2, columns=None)
    smoothed = naive_smoothed_term(case, groups, 0.2, 0.7)
    expected["smoothing_active"] = sum(len(group) > 1 for group in groups) / B
    expected["smoothing_loss"] = float(smoothed.detach())
    assert (expected["smoothing_active"] == 1) == (mask is None)
    assert_same(case, (loss, metrics), (base + 0.3 * smoothed, expected))
