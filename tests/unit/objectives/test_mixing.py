"""HNCSE: the cases of positive mixing, its guards, and how negatives are paired and mixed."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from hncse_ray.objectives import hard_negative_mixing, hybrid, info_nce, positive_mixing
from hncse_ray.objectives.pairs import draw_pairs

torch.set_num_threads(1)

WEIGHTS = {"w_pos": 1.3, "w_neg": 0.7}


def at_angles(*degrees: float) -> Tensor:
    """Unit vectors of the plane."""
    radians = torch.deg2rad(torch.tensor(degrees, dtype=torch.float64))
    return torch.stack([radians.cos(), radians.sin()], dim=1)


def random_views(B: int, D: int, noise: float, seed: int = 0) -> tuple[Tensor, Tensor]:
    rng = torch.Generator().manual_seed(seed)
    z1 = F.normalize(torch.randn(B, D, generator=rng, dtype=torch.float64), dim=1)
    return z1, F.normalize(z1 + noise * torch.randn(B, D, generator=rng, dtype=torch.float64), dim=1)


def finite_gradients(loss: Tensor, *inputs: Tensor) -> bool:
    return all(bool(torch.isfinite(g).all()) for g in torch.autograd.grad(loss, inputs))


def test_no_mixing_is_info_nce() -> None:
    z1, z2 = random_views(8, 32, noise=0.01)
    for z in (z1, z2):
        z.requires_grad_()
    loss, metrics = positive_mixing(z1, z2, temperature=0.05, margin=0.0, **WEIGHTS)
    expected, _ = info_nce(z1, z2, temperature=0.05)
    assert metrics["share_kept"] == 1
    torch.testing.assert_close(loss, expected, atol=0, rtol=1e-14)
    for mine, other in zip(torch.autograd.grad(loss, (z1, z2)), torch.autograd.grad(expected, (z1, z2)), strict=True):
        torch.testing.assert_close(mine, other)


def test_each_case_by_hand() -> None:
    # Anchor 0: positive at 10 degrees, hardest candidate z2_1 at 60: far apart, kept for a margin of 0.1.
    # Anchor 1 (at 90): positive at 60 (cos 30 = 0.866), own negative at 120.5 (0.862): a gap of 0.5 %.
    # Anchor 2 (at 180): positive at 240 (cos 60 = 0.5), own negative at 170 (0.985): closer than it.
    z1, z2 = at_angles(0, 90, 180), at_angles(10, 60, 240)
    g = at_angles(-90, 120.5, 170)[:, None]
    loss, metrics = positive_mixing(z1, z2, g, temperature=0.5, margin=0.1, **WEIGHTS)
    p, q = z1[2] @ z2[2], z1[2] @ g[2, 0]
    mixed = torch.stack([z2[0], 1.3 * z2[1] + 0.7 * g[1, 0], (p * z2[2] + q * g[2, 0]) / (p + q)])
    mixed = mixed / mixed.norm(dim=1, keepdim=True)
    logits = torch.cat([z1 @ mixed.T, (z1 * g[:, 0]).sum(1, keepdim=True)], dim=1) / 0.5
    torch.testing.assert_close(loss, F.cross_entropy(logits, torch.arange(3)))
    for share in ("share_kept", "share_weighted_mix", "share_similarity_mix"):
        assert metrics[share] == pytest.approx(1 / 3)


@pytest.mark.parametrize(
    ("margin", "case"), [(0.39, "share_kept"), (0.41, "share_weighted_mix"), (1.0, "share_weighted_mix")]
)
def test_the_margin_is_relative_to_the_positive(margin: float, case: str) -> None:
    # p = 0.5 and q = 0.3 for both anchors: the gap is 0.2 but 40 % of p.
    z1 = torch.eye(2, 4, dtype=torch.float64)
    z2 = torch.tensor([[0.5, 0.3, 0, 0], [0.3, 0.5, 0, 0]], dtype=torch.float64)
    z2[0, 2] = z2[1, 3] = (1 - 0.34) ** 0.5
    _, metrics = positive_mixing(z1, z2, temperature=0.05, margin=margin, **WEIGHTS)
    assert metrics[case] == 1


@pytest.mark.parametrize("scale", [0.1, 0.5, 1.5])
def test_only_the_ratio_of_the_weights_matters(scale: float) -> None:
    z1, z2 = random_views(8, 16, noise=0.1)
    settings = {"temperature": 0.05, "margin": 5.0}
    loss, metrics = positive_mixing(z1, z2, w_pos=1.3, w_neg=0.7, **settings)
    scaled, _ = positive_mixing(z1, z2, w_pos=1.3 * scale, w_neg=0.7 * scale, **settings)
    other, _ = positive_mixing(z1, z2, w_pos=0.7, w_neg=1.3, **settings)
    assert metrics["share_weighted_mix"] == 1
    torch.testing.assert_close(loss, scaled)
    assert abs(float(loss - other)) > 1e-3


@pytest.mark.parametrize(
    ("z1", "z2"),
    [
        pytest.param(at_angles(0, 180), at_angles(100, 280), id="p below 0, q above it"),
        pytest.param(at_angles(0, 0), at_angles(120, 170), id="p and q below 0"),
        pytest.param(at_angles(0, 180), at_angles(180, 0), id="p = -1, q = 1, their sum 0"),
        pytest.param(torch.eye(2, 4).double(), torch.eye(4).double()[2:], id="p and q exactly 0"),
    ],
)
def test_a_positive_that_points_away_is_kept(z1: Tensor, z2: Tensor) -> None:
    z1, z2 = z1.clone().requires_grad_(), z2.clone().requires_grad_()
    loss, metrics = positive_mixing(z1, z2, temperature=0.5, margin=0.1, **WEIGHTS)
    assert metrics["share_kept"] == 1
    torch.testing.assert_close(loss, info_nce(z1, z2, temperature=0.5)[0])
    assert finite_gradients(loss, z1, z2)


def test_a_vanishing_sum_of_similarities_keeps_the_positive() -> None:
    tiny = 1e-7
    z1 = torch.eye(2, 4, dtype=torch.float64)
    z2 = torch.tensor([[tiny, tiny, 1, 0], [tiny, tiny, 0, 1]], dtype=torch.float64)  # p = q = 1e-7
    inputs = z1.requires_grad_(), z2.requires_grad_()
    loss, metrics = positive_mixing(*inputs, temperature=0.5, margin=0.1, **WEIGHTS)
    assert metrics["share_kept"] == 1 and finite_gradients(loss, *inputs)


@pytest.mark.parametrize(
    "weights", [{"w_pos": 1.0, "w_neg": 1.0}, {"w_pos": 0.0, "w_neg": 0.0}], ids=["opposite", "no weights"]
)
def test_a_mix_without_length_keeps_the_positive(weights: dict[str, float]) -> None:
    # Each anchor agrees with its positive and is opposed by the other's: p = 1, q = -1, a margin above 2.
    z1 = at_angles(30, 210).requires_grad_()
    z2 = at_angles(30, 210).requires_grad_()
    loss, metrics = positive_mixing(z1, z2, temperature=0.5, margin=3.0, **weights)
    assert metrics["share_kept"] == 1
    torch.testing.assert_close(loss, info_nce(z1, z2, temperature=0.5)[0])
    assert finite_gradients(loss, z1, z2)


@pytest.mark.parametrize(("alpha", "which"), [(1.0, 0), (0.0, 1)])
def test_an_extreme_alpha_repeats_a_candidate(alpha: float, which: int) -> None:
    z1, z2 = random_views(5, 6, noise=1.0)
    pairs = torch.tensor([[0, 2], [1, 3]]).expand(5, 2, 2)
    loss, _ = hard_negative_mixing(z1, z2, temperature=0.2, k=4, n_mixes=2, alpha=alpha, pairs=pairs)
    sims = z1 @ z2.T
    hardest = sims.masked_fill(torch.eye(5, dtype=torch.bool), -2).sort(dim=1, descending=True).values
    columns = torch.cat([sims, hardest[:, pairs[0, :, which]]], dim=1) / 0.2
    torch.testing.assert_close(loss, F.cross_entropy(columns, torch.arange(5)))


def test_a_pair_may_repeat_a_rank_and_run_either_way() -> None:
    z1, z2 = random_views(5, 6, noise=1.0)
    settings = {"temperature": 0.2, "k": 4, "n_mixes": 1}

    def loss(alpha: float, a: int, b: int) -> Tensor:
        pairs = torch.tensor([a, b]).expand(5, 1, 2)
        return hard_negative_mixing(z1, z2, alpha=alpha, pairs=pairs, **settings)[0]

    torch.testing.assert_close(loss(0.3, 2, 2), loss(1.0, 2, 0))
    torch.testing.assert_close(loss(0.3, 1, 3), loss(0.7, 3, 1))
    assert abs(float(loss(0.3, 1, 3) - loss(0.7, 1, 3))) > 1e-4


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_opposite_candidates_have_no_mix(dtype: torch.dtype) -> None:
    z1 = at_angles(90, 90, 90).to(dtype).requires_grad_()
    z2 = at_angles(0, 0, 180).to(dtype).requires_grad_()
    settings = {"temperature": 0.5, "k": 2, "alpha": 0.5}
    loss, metrics = hard_negative_mixing(z1, z2, n_mixes=1, **settings)
    # Anchors 0 and 1 see 0 and 180 degrees: nothing to mix. Anchor 2 sees 0 twice: a fourth column.
    expected = (2 * torch.tensor(3.0).log() + torch.tensor(4.0).log()) / 3
    torch.testing.assert_close(loss, expected.to(dtype))
    assert metrics["mixed_negative_similarity"] == pytest.approx(0.0, abs=1e-6)
    assert finite_gradients(loss, z1, z2)


def test_the_positive_is_never_a_candidate() -> None:
    z1, z2 = random_views(4, 300, noise=0.001)
    _, metrics = hard_negative_mixing(z1, z2, temperature=0.05, k=50, n_mixes=40, alpha=0.5)
    assert metrics["positive_similarity"] > 0.9
    assert metrics["mixed_negative_similarity"] < 0.3
    assert metrics["candidates_used"] == 3


def test_one_candidate_gives_no_mix() -> None:
    z1, z2 = random_views(2, 8, noise=0.5)
    settings = {"temperature": 0.2, "k": 10, "n_mixes": 6, "alpha": 0.5}
    for pairs in (None, torch.zeros(2, 6, 2, dtype=torch.int64)):
        loss, metrics = hard_negative_mixing(z1, z2, pairs=pairs, **settings)
        torch.testing.assert_close(loss, info_nce(z1, z2, temperature=0.2)[0])
        assert metrics["mixed_negative_similarity"] == 0 and metrics["candidates_used"] == 1


def test_no_mixes_at_all_is_info_nce() -> None:
    z1, z2 = random_views(4, 8, noise=0.5)
    loss, _ = hard_negative_mixing(z1, z2, temperature=0.2, k=3, n_mixes=0, alpha=0.5)
    torch.testing.assert_close(loss, info_nce(z1, z2, temperature=0.2)[0])


def test_rows_draw_only_from_the_candidates_they_have() -> None:
    """Row 0 has one candidate and no mix; row 1 has two, so each of its mixes is the same one."""
    z1, z2 = random_views(2, 8, noise=0.5)
    g = random_views(2 * 3, 8, noise=0.0, seed=3)[0].reshape(2, 3, 8)
    usable = torch.tensor([[False, False, False], [False, True, False]])
    loss, metrics = hard_negative_mixing(z1, z2, g, temperature=0.2, k=4, n_mixes=30, alpha=0.5, negatives_mask=usable)
    mix = F.normalize(z2[0] + g[1, 1], dim=0)
    row_0 = torch.stack([z1[0] @ z2[0], z1[0] @ z2[1]])
    row_1 = torch.stack([z1[1] @ z2[0], z1[1] @ z2[1], z1[1] @ g[1, 1], *[z1[1] @ mix] * 30])
    expected = [F.cross_entropy(row / 0.2, torch.tensor(i)) for i, row in enumerate((row_0, row_1))]
    torch.testing.assert_close(loss, (expected[0] + expected[1]) / 2)
    assert metrics["candidates_used"] == 1.5


def test_hybrid_mixes_negatives_from_the_unmixed_positives() -> None:
    z1, z2 = random_views(6, 8, noise=1.0)
    pairs = torch.tensor([[0, 1], [1, 2]]).expand(6, 2, 2)
    positive, negative = {"margin": 1.0, **WEIGHTS}, {"k": 4, "n_mixes": 2, "alpha": 0.5, "pairs": pairs}
    _, metrics = hybrid(z1, z2, temperature=0.2, **positive, **negative)
    _, of_positives = positive_mixing(z1, z2, temperature=0.2, **positive)
    _, of_negatives = hard_negative_mixing(z1, z2, temperature=0.2, **negative)
    assert metrics["share_kept"] < 1
    assert metrics["mixed_negative_similarity"] == of_negatives["mixed_negative_similarity"]
    shared = of_positives.keys() - {"contrastive_accuracy"}
    assert all(metrics[name] == of_positives[name] for name in shared)
    assert metrics.keys() == of_positives.keys() | of_negatives.keys()


def test_equal_generators_give_equal_losses() -> None:
    z1, z2 = random_views(8, 16, noise=1.0)

    def losses(seed: int, dtype: torch.dtype = torch.float64) -> list[float]:
        generator = torch.Generator().manual_seed(seed)
        settings = {"temperature": 0.2, "k": 5, "n_mixes": 3, "alpha": 0.5, "generator": generator}
        return [float(hard_negative_mixing(z1.to(dtype), z2.to(dtype), **settings)[0]) for _ in range(2)]

    first, second = losses(0), losses(0)
    assert first == second and first[0] != first[1]
    assert losses(1) != first
    assert losses(0, torch.float32) == pytest.approx(first, abs=1e-5)


def test_given_pairs_leave_the_generator_alone() -> None:
    z1, z2 = random_views(4, 8, noise=1.0)
    generator = torch.Generator().manual_seed(0)
    state = generator.get_state()
    pairs = torch.zeros(4, 3, 2, dtype=torch.int64)
    settings = {"temperature": 0.2, "k": 3, "n_mixes": 3, "alpha": 0.5, "generator": generator}
    hard_negative_mixing(z1, z2, pairs=pairs, **settings)
    assert torch.equal(generator.get_state(), state)


def test_what_is_drawn_depends_on_shapes_and_not_on_the_rows() -> None:
    few, many = torch.full((4,), 2), torch.full((4,), 9)
    generators = [torch.Generator().manual_seed(0) for _ in range(2)]
    for generator, used in zip(generators, (few, many), strict=True):
        draw_pairs(used, k=9, n_mixes=5, generator=generator)
    assert torch.equal(generators[0].get_state(), generators[1].get_state())


@pytest.mark.parametrize("used", [2, 3, 7])
def test_pairs_are_uniform_over_the_ranks_a_row_has(used: int) -> None:
    generator = torch.Generator().manual_seed(0)
    rows, draws = 20, 3000
    pairs = draw_pairs(torch.full((rows,), used), k=7, n_mixes=draws, generator=generator)
    assert pairs.shape == (rows, draws, 2) and pairs.dtype == torch.int64
    a, b = pairs.unbind(2)
    assert (a >= 0).all() and (a < b).all() and (b < used).all()
    counts = torch.bincount((a * used + b).flatten(), minlength=used * used)
    n_pairs = used * (used - 1) // 2
    expected = rows * draws / n_pairs
    assert (counts > 0).sum() == n_pairs
    chi_squared = ((counts[counts > 0] - expected) ** 2 / expected).sum()
    assert chi_squared < n_pairs - 1 + 5 * (2 * n_pairs) ** 0.5  # five standard deviations


def test_each_row_keeps_to_its_own_number_of_candidates() -> None:
    used = torch.tensor([0, 1, 2, 5])
    pairs = draw_pairs(used, k=5, n_mixes=500, generator=None)
    assert pairs[:3].unique(dim=1).tolist() == [[[0, 1]]] * 3
    assert pairs[3].max() == 4
