"""IS-CSE: the buffer's order, when smoothing begins, and where gradient flows."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from hncse_ray.objectives import cosine_ramp, info_nce, instance_smoothing

torch.set_num_threads(1)

SETTINGS = {"temperature": 0.05, "group_size": 2, "attention_temperature": 2.0, "weight": 0.1}


def rows(n: int, D: int = 5, seed: int = 0) -> Tensor:
    rng = torch.Generator().manual_seed(seed)
    return F.normalize(torch.randn(n, D, generator=rng, dtype=torch.float64), dim=1)


def test_the_buffer_is_first_in_first_out() -> None:
    batches = [rows(3, seed=seed) for seed in range(4)]
    buffer = torch.zeros(8, 5, dtype=torch.float64)
    for batch in batches:
        _, _, buffer = instance_smoothing(batch, batch, buffer, **SETTINGS)
    assert torch.equal(buffer, torch.cat([batches[1][1:], batches[2], batches[3]]))


def test_the_positives_and_not_the_anchors_enter_the_buffer() -> None:
    z1, z2 = rows(3, seed=1), rows(3, seed=2)
    _, _, buffer = instance_smoothing(z1, z2, torch.zeros(3, 5, dtype=torch.float64), **SETTINGS)
    assert torch.equal(buffer, z2)


def test_nothing_is_added_until_the_buffer_is_full() -> None:
    buffer = torch.zeros(7, 5, dtype=torch.float64)
    for step in range(3):
        z1, z2 = rows(3, seed=10 + step), rows(3, seed=step)
        loss, metrics, buffer = instance_smoothing(z1, z2, buffer, **SETTINGS)
        base, _ = info_nce(z1, z2, temperature=0.05)
        full = step == 2
        assert metrics["smoothing_active"] == full
        assert (metrics["smoothing_loss"] > 0) == full
        assert torch.equal(loss, base) != full


def test_no_gradient_of_the_smoothed_term_leaks_before_the_buffer_is_full() -> None:
    z1, z2 = rows(3, seed=1).requires_grad_(), rows(3, seed=2).requires_grad_()
    loss, _, _ = instance_smoothing(z1, z2, torch.zeros(9, 5, dtype=torch.float64), **SETTINGS)
    base, _ = info_nce(z1, z2, temperature=0.05)
    for mine, other in zip(torch.autograd.grad(loss, (z1, z2)), torch.autograd.grad(base, (z1, z2)), strict=True):
        assert torch.equal(mine, other)


def test_a_batch_larger_than_the_buffer_leaves_its_last_rows() -> None:
    z1, z2 = rows(6, seed=1), rows(6, seed=2)
    loss, metrics, buffer = instance_smoothing(z1, z2, torch.zeros(4, 5, dtype=torch.float64), **SETTINGS)
    assert torch.equal(buffer, z2[-4:])
    assert metrics["smoothing_active"] == 1 and torch.isfinite(loss)


def test_the_buffer_is_neither_changed_nor_shared_nor_part_of_the_graph() -> None:
    z1, z2 = rows(3, seed=1).requires_grad_(), rows(3, seed=2).requires_grad_()
    buffer = rows(8, seed=3).requires_grad_()
    before = buffer.detach().clone()
    loss, _, new_buffer = instance_smoothing(z1, z2, buffer, **SETTINGS)
    loss.backward()
    assert torch.equal(buffer, before) and buffer.grad is None
    assert not new_buffer.requires_grad
    assert new_buffer.untyped_storage().nbytes() == before.untyped_storage().nbytes()
    new_buffer.zero_()
    assert torch.equal(buffer, before) and z2.abs().sum() > 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("of_rows", [torch.float32, torch.bfloat16])
def test_the_buffer_keeps_its_dtype(dtype: torch.dtype, of_rows: torch.dtype) -> None:
    z = rows(3).to(of_rows)
    loss, _, buffer = instance_smoothing(z, z, rows(8).to(dtype), **SETTINGS)
    assert buffer.dtype == dtype and loss.dtype == torch.float32


@pytest.mark.parametrize(("group_size", "members"), [(1, 2), (2, 3)])
def test_a_group_is_the_row_and_the_nearest_after_its_own_copy(group_size: int, members: int) -> None:
    """Very hot attention averages a group evenly, which tells its members."""
    e = torch.eye(6, dtype=torch.float64)
    z = e[:2]
    groups = [
        torch.stack([e[0], 0.8 * e[0] + 0.6 * e[2], 0.6 * e[0] + 0.8 * e[3]]),
        torch.stack([e[1], 0.8 * e[1] + 0.6 * e[4], 0.6 * e[1] + 0.8 * e[5]]),
    ]
    leaving = -e[:2]
    buffer = torch.cat([leaving, groups[0][1:], groups[1][1:]])
    settings = {"temperature": 0.5, "group_size": group_size, "attention_temperature": 1e9, "weight": 0.5}
    loss, metrics, _ = instance_smoothing(z, z, buffer, **settings)
    stars = F.normalize(torch.stack([group[:members].mean(0) for group in groups]), dim=1)
    smoothed, _ = info_nce(z, stars, temperature=0.5)
    torch.testing.assert_close(loss, info_nce(z, z, temperature=0.5)[0] + 0.5 * smoothed)
    assert metrics["smoothing_loss"] == pytest.approx(float(smoothed))


def test_cold_attention_leaves_the_row_itself() -> None:
    z1, z2 = rows(3, seed=1), rows(3, seed=2)
    settings = {**SETTINGS, "attention_temperature": 1e-3, "weight": 1.0}
    loss, _, _ = instance_smoothing(z1, z2, rows(8, seed=3), **settings)
    torch.testing.assert_close(loss, 2 * info_nce(z1, z2, temperature=0.05)[0])


def test_gradient_flows_through_the_attention() -> None:
    """Against the same sum written out, with the neighbours held fixed."""
    z1, z2 = rows(2, seed=1), rows(2, seed=2).requires_grad_()
    old = F.normalize(z2.detach()[[0, 1]] + 0.3 * rows(2, seed=4), dim=1)
    buffer = torch.cat([rows(2, seed=5), old, -old])  # pushing two rows drops the first two
    settings = {"temperature": 0.2, "group_size": 1, "attention_temperature": 0.5, "weight": 1.0}
    loss, _, _ = instance_smoothing(z1, z2, buffer, **settings)
    scores = torch.stack([(z2 * z2).sum(1), (z2 * old).sum(1)], dim=1) / 0.5
    attention = scores.softmax(dim=1)
    stars = F.normalize(attention[:, :1] * z2 + attention[:, 1:] * old, dim=1)
    expected = info_nce(z1, z2, temperature=0.2)[0] + info_nce(z1, stars, temperature=0.2)[0]
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(torch.autograd.grad(loss, z2), torch.autograd.grad(expected, z2))


def test_a_group_that_cancels_out_leaves_the_row() -> None:
    """Each row's one neighbour is its opposite and weighs the same: no direction, and no NaN."""
    z = torch.tensor([[1.0, 0.0], [-1.0, 0.0]], dtype=torch.float64, requires_grad=True)
    settings = {"temperature": 0.5, "group_size": 1, "attention_temperature": 1e12, "weight": 1.0}
    loss, metrics, _ = instance_smoothing(z, z, torch.ones(2, 2, dtype=torch.float64), **settings)
    assert metrics["smoothing_active"] == 1
    torch.testing.assert_close(loss, 2 * info_nce(z, z, temperature=0.5)[0])
    assert torch.isfinite(torch.autograd.grad(loss, z)[0]).all()


def given(g: int, *, near: Tensor, seed: int = 7) -> Tensor:
    """g neighbours of each row, [B, g, D]."""
    return F.normalize(near.detach()[:, None] + rows(len(near) * g, seed=seed).reshape(len(near), g, -1), dim=2)


def loss_and_gradient(z1: Tensor, z2: Tensor, **keywords: object) -> tuple[Tensor, dict[str, Tensor], Tensor]:
    z1, z2 = z1.detach().requires_grad_(), z2.detach().requires_grad_()
    loss, metrics, _ = instance_smoothing(z1, z2, **{**SETTINGS, **keywords})
    return loss.detach(), metrics, torch.cat(torch.autograd.grad(loss, (z1, z2)))


@pytest.mark.parametrize("group_size", [1, 4])
def test_neighbours_out_of_the_buffer_are_the_published_form(group_size: int) -> None:
    z1, z2, buffer = rows(3, seed=1), rows(3, seed=2), rows(9, seed=3)
    pushed = torch.cat([buffer[3:], z2])
    nearest = (z2 @ pushed.T).argsort(dim=1, descending=True)[:, 1 : 1 + group_size]
    of_buffer = loss_and_gradient(z1, z2, buffer=buffer, group_size=group_size)
    of_index = loss_and_gradient(z1, z2, neighbours=pushed[nearest], group_size=99)
    torch.testing.assert_close(of_index, of_buffer, atol=1e-12, rtol=0)


def test_neighbours_leave_the_buffer_unread() -> None:
    z1, z2 = rows(3, seed=1), rows(3, seed=2)
    neighbours = given(2, near=z2)
    expected = loss_and_gradient(z1, z2, neighbours=neighbours)
    for buffer in (torch.full((4, 5), math.nan), torch.zeros(1, 1)):
        before = buffer.clone()
        _, _, returned = instance_smoothing(z1, z2, buffer, neighbours=neighbours, **SETTINGS)
        assert returned is buffer and torch.equal(buffer.nan_to_num(7), before.nan_to_num(7))
        torch.testing.assert_close(loss_and_gradient(z1, z2, neighbours=neighbours, buffer=buffer), expected)


def test_neighbours_carry_no_gradient() -> None:
    z1, z2 = rows(3, seed=1).requires_grad_(), rows(3, seed=2).requires_grad_()
    neighbours = given(2, near=z2).requires_grad_()
    for mask in (None, torch.tensor([[True, False]]).expand(3, 2)):
        loss, metrics, _ = instance_smoothing(z1, z2, neighbours=neighbours, neighbours_mask=mask, **SETTINGS)
        loss.backward()
        assert neighbours.grad is None and metrics["smoothing_loss"] > 0
        assert (z2.grad != 0).all()


@pytest.mark.parametrize("filler", [math.nan, math.inf, 1e6])
def test_masked_neighbours_may_hold_anything_and_take_no_part(filler: float) -> None:
    z1, z2 = rows(4, seed=1), rows(4, seed=2)
    neighbours = given(3, near=z2)
    mask = torch.tensor([[True, True, True], [True, False, True], [False, False, True], [False, False, False]])
    padded = torch.where(mask[..., None], neighbours, filler)
    with torch.autograd.set_detect_anomaly(True):
        got = loss_and_gradient(z1, z2, neighbours=padded, neighbours_mask=mask)
    torch.testing.assert_close(got, loss_and_gradient(z1, z2, neighbours=neighbours, neighbours_mask=mask))
    assert torch.isfinite(got[2]).all() and got[1]["smoothing_active"] == 0.75
    order = torch.tensor([2, 0, 1])
    reordered = loss_and_gradient(z1, z2, neighbours=padded[:, order], neighbours_mask=mask[:, order])
    torch.testing.assert_close(reordered, got, atol=1e-12, rtol=0)


def test_a_row_without_neighbours_keeps_its_positive_and_the_others_do_not() -> None:
    z1, z2 = rows(3, seed=1), 1.5 * rows(3, seed=2)  # not unit-norm: what is kept is not normalised either
    neighbours = given(2, near=z2)
    mask = torch.tensor([[True, True], [False, False], [True, True]])
    settings = {**SETTINGS, "attention_temperature": 1e9, "weight": 1.0}
    loss, metrics, _ = instance_smoothing(z1, z2, neighbours=neighbours, neighbours_mask=mask, **settings)
    stars = F.normalize(z2 + neighbours.sum(1), dim=1)
    stars[1] = z2[1]
    smoothed = info_nce(z1, stars, temperature=0.05)[0]
    torch.testing.assert_close(loss, info_nce(z1, z2, temperature=0.05)[0] + smoothed)
    assert metrics["smoothing_loss"] == pytest.approx(float(smoothed))
    assert metrics["smoothing_active"] == pytest.approx(2 / 3)


def test_nothing_is_added_while_no_row_has_a_neighbour() -> None:
    z1, z2 = rows(3, seed=1).requires_grad_(), rows(3, seed=2).requires_grad_()
    base, metrics = info_nce(z1, z2, temperature=0.05)
    expected = base.detach(), torch.cat(torch.autograd.grad(base, (z1, z2)))
    nothing = {"smoothing_active": torch.tensor(0.0), "smoothing_loss": torch.tensor(0.0)}
    neighbours = given(2, near=z2)
    for keywords in (
        {"neighbours": neighbours[:, :0]},
        {"neighbours": neighbours[:, :0], "neighbours_mask": torch.zeros(3, 0, dtype=torch.bool)},
        {"neighbours": neighbours * math.nan, "neighbours_mask": torch.zeros(3, 2, dtype=torch.bool)},
    ):
        loss, got, gradient = loss_and_gradient(z1, z2, **keywords)
        assert torch.equal(loss, expected[0]) and torch.equal(gradient, expected[1])
        assert got == metrics | nothing


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_neighbours_of_another_dtype(dtype: torch.dtype) -> None:
    z1, z2 = rows(3, seed=1).float(), rows(3, seed=2).float()
    neighbours = given(2, near=z2).to(dtype)
    loss, _, _ = loss_and_gradient(z1, z2, neighbours=neighbours)
    expected, _, _ = loss_and_gradient(z1.double(), z2.double(), neighbours=neighbours.double())
    assert loss.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    torch.testing.assert_close(loss.double(), expected, atol=1e-5, rtol=0)


def test_weight_zero_is_info_nce_in_value_and_gradient() -> None:
    z1, z2 = rows(3, seed=1), rows(3, seed=2).requires_grad_()
    loss, _, _ = instance_smoothing(z1, z2, rows(8, seed=3), **{**SETTINGS, "weight": 0.0})
    base, _ = info_nce(z1, z2, temperature=0.05)
    torch.testing.assert_close(loss, base)
    torch.testing.assert_close(torch.autograd.grad(loss, z2), torch.autograd.grad(base, z2))


@pytest.mark.parametrize(
    ("step", "expected"),
    [
        (0, 0.005),
        (25, 0.05 - 0.045 * math.cos(math.pi / 4)),
        (50, 0.05),
        (51, 0.05),
        (100, 0.05),
        (1000, 0.05),
    ],
)
def test_the_ramp_reaches_its_end_half_way(step: int, expected: float) -> None:
    assert cosine_ramp(step, 100, start=0.005, end=0.05) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("total", [1, 2, 7, 100])
@pytest.mark.parametrize(("start", "end"), [(0.005, 0.05), (0.3, 0.1), (0.2, 0.2)])
def test_the_ramp_is_monotonic_and_between_its_ends(total: int, start: float, end: float) -> None:
    values = [cosine_ramp(step, total, start=start, end=end) for step in range(total + 1)]
    assert values[0] == pytest.approx(start) and values[-1] == end
    assert values == sorted(values, reverse=start > end)
