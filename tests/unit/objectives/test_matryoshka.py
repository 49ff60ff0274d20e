"""Matryoshka: every objective at several widths, beside the same one called on embeddings that were cut by hand."""

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from hncse_ray.objectives import (
    hard_negative_mixing,
    hybrid,
    info_nce,
    instance_smoothing,
    matryoshka,
    positive_mixing,
    three_view,
)

torch.set_num_threads(1)

B, D, M, K_TOP, S = 6, 8, 3, 4, 5
WIDTHS = [D, 5, 3]
POSITIVE = {"margin": 0.4, "w_pos": 1.2, "w_neg": 0.7}
NEGATIVE = {"k": K_TOP, "n_mixes": S, "alpha": 0.5}
SMOOTHING = {"group_size": 3, "attention_temperature": 2.0, "weight": 0.5}
PAIRS = {"pairs": torch.randint(K_TOP, (B, S, 2), generator=torch.Generator().manual_seed(5))}
OBJECTIVES: dict[str, Callable[..., Any]] = {
    "info_nce": info_nce,
    "info_nce, all columns": functools.partial(info_nce, columns="all"),
    "positive_mixing": functools.partial(positive_mixing, **POSITIVE),
    "hard_negative_mixing": functools.partial(hard_negative_mixing, **NEGATIVE, **PAIRS),
    "hybrid, no columns": functools.partial(hybrid, **POSITIVE, **NEGATIVE, **PAIRS, columns="none"),
    "three_view": three_view,
    "instance_smoothing": functools.partial(instance_smoothing, **SMOOTHING),
    "smoothing of neighbours": functools.partial(instance_smoothing, **SMOOTHING),
}


def unit(x: Tensor) -> Tensor:
    return x / x.norm(dim=-1, keepdim=True)


def normal(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def cut(z: Tensor, width: int) -> Tensor:
    return z if width == D else unit(z[..., :width])


def arguments_of(name: str) -> tuple[list[Tensor], dict[str, Tensor]]:
    z1 = unit(normal(B, D, seed=0))
    views = [z1, unit(z1 + 0.3 * normal(B, D, seed=1)), unit(z1 + 0.3 * normal(B, D, seed=2))]
    if name == "instance_smoothing":
        return views[:2], {"buffer": unit(normal(16, D, seed=3))}
    negatives = unit(z1[:, None] + normal(B, M, D, seed=4))
    name_of_them = "neighbours" if name.startswith("smoothing") else "negatives"
    return views[: 3 if name == "three_view" else 2], {name_of_them: negatives}


@pytest.mark.parametrize("name", OBJECTIVES)
def test_the_loss_is_the_mean_over_the_widths_and_so_is_its_gradient(name: str) -> None:
    views, others = arguments_of(name)
    views = [z.requires_grad_() for z in views]
    loss, metrics, *further = matryoshka(OBJECTIVES[name], *views, dimensions=WIDTHS, temperature=0.2, **others)
    by_hand = [
        OBJECTIVES[name](*(cut(z, d) for z in views), temperature=0.2, **{k: cut(z, d) for k, z in others.items()})
        for d in WIDTHS
    ]
    expected = torch.stack([result[0] for result in by_hand]).mean()
    assert len({round(result[0].item(), 4) for result in by_hand}) == 3
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(torch.autograd.grad(loss, views), torch.autograd.grad(expected, views))
    of_widths = {f"loss_at_{d}": result[0].detach().float() for d, result in zip(WIDTHS, by_hand, strict=True)}
    torch.testing.assert_close(metrics, by_hand[0][1] | of_widths)
    assert all(value.dtype == torch.float32 and not value.requires_grad for value in metrics.values())
    if name == "instance_smoothing":  # one buffer, of whole embeddings
        torch.testing.assert_close(further, list(by_hand[0][2:]))


@pytest.mark.parametrize("dimensions", [[3, 5], [5, 3, D], [3, 5, 3]])
def test_the_full_width_takes_part_and_the_order_says_nothing(dimensions: list[int]) -> None:
    views, others = arguments_of("info_nce")
    loss, metrics = matryoshka(info_nce, *views, dimensions=dimensions, temperature=0.2, **others)
    assert torch.equal(loss, matryoshka(info_nce, *views, dimensions=WIDTHS, temperature=0.2, **others)[0])
    assert [name for name in metrics if name.startswith("loss_at_")] == ["loss_at_8", "loss_at_5", "loss_at_3"]


def test_at_the_full_width_it_is_the_objective_itself() -> None:
    """Random pairs included: the full width draws first."""
    views, others = arguments_of("hard_negative_mixing")
    others |= {"temperature": 0.2, **NEGATIVE}  # type: ignore[dict-item]
    plain, _ = hard_negative_mixing(*views, generator=torch.Generator().manual_seed(1), **others)
    for dimensions in ([D], [3]):
        draws = torch.Generator().manual_seed(1)
        _, metrics = matryoshka(hard_negative_mixing, *views, dimensions=dimensions, generator=draws, **others)
        assert torch.equal(metrics[f"loss_at_{D}"], plain.float())


def test_the_start_of_a_buffer_is_no_neighbour() -> None:
    """Rows that are not filled yet are zero at every width, and smoothing waits for them."""
    views, _ = arguments_of("instance_smoothing")
    buffer = torch.zeros(16, D, dtype=torch.float64)
    loss, metrics, _ = matryoshka(
        OBJECTIVES["instance_smoothing"], *views, dimensions=[3], temperature=0.2, buffer=buffer
    )
    assert metrics["smoothing_active"] == 0
    assert torch.equal(loss, matryoshka(info_nce, *views, dimensions=[3], temperature=0.2)[0])


def test_what_is_not_usable_takes_no_part_whatever_it_holds() -> None:
    views, others = arguments_of("info_nce")
    usable = torch.rand(others["negatives"].shape[:2], generator=torch.Generator().manual_seed(2)) < 0.5
    losses = []
    for filler in (0.0, torch.nan, 1e30):
        negatives = others["negatives"].masked_fill(~usable[..., None], filler)
        views = [z.detach().requires_grad_() for z in views]
        loss, _ = matryoshka(
            info_nce, *views, dimensions=[3, 5], temperature=0.2, negatives=negatives, negatives_mask=usable
        )
        losses.append((loss, *torch.autograd.grad(loss, views)))
    torch.testing.assert_close(losses[1], losses[0])
    torch.testing.assert_close(losses[2], losses[0])


def test_half_precision_is_cut_in_fp32() -> None:
    views, _ = arguments_of("info_nce")
    exact = [z.float() for z in views]
    rounded = [z.bfloat16() for z in exact]
    upcast = [z.float() for z in rounded]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss, _ = matryoshka(info_nce, *rounded, dimensions=[3], temperature=0.2)
    assert torch.equal(loss, matryoshka(info_nce, *upcast, dimensions=[3], temperature=0.2)[0])


@pytest.mark.parametrize(("dimensions", "said"), [([D + 1], "9; the embeddings have 8"), ([0], "dimensions is 0")])
def test_widths_that_cannot_be(dimensions: list[int], said: str) -> None:
    views, _ = arguments_of("info_nce")
    with pytest.raises(ValueError, match=said):
        matryoshka(info_nce, *views, dimensions=dimensions, temperature=0.2)


def test_a_short_embedding_becomes_as_good_as_a_long_one() -> None:
    """What it is for: rows are told apart by the last numbers alone, until the first ones are trained too."""
    rng = torch.Generator().manual_seed(0)
    x = unit(torch.randn(64, 16, generator=rng))

    def train(dimensions: list[int]) -> float:
        weight = torch.eye(16)
        weight[:, :4] = 0.01 * torch.randn(16, 4, generator=torch.Generator().manual_seed(1))
        weight.requires_grad_()
        optimizer = torch.optim.Adam([weight], lr=0.02)
        noise = torch.Generator().manual_seed(2)
        for _ in range(60):
            z1, z2 = (unit((x + 0.1 * torch.randn(x.shape, generator=noise)) @ weight) for _ in range(2))
            loss = matryoshka(info_nce, z1, z2, dimensions=dimensions, temperature=0.05)[0]
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        short = unit((x + 0.1 * torch.randn(x.shape, generator=noise)) @ weight.detach())[:, :4]
        nearest = (unit(short) @ unit((x @ weight.detach())[:, :4]).T).argmax(dim=1)
        return float((nearest == torch.arange(64)).float().mean())

    assert train([4]) > train([16]) + 0.1
