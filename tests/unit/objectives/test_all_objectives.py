"""What every objective promises: precision, invariances, padding, derivatives, no waiting for the device."""

import functools
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from hncse_ray.objectives import (
    hard_negative_mixing,
    hybrid,
    info_nce,
    instance_smoothing,
    positive_mixing,
    three_view,
)

torch.set_num_threads(1)

B, D, M, K_TOP, S = 6, 8, 3, 4, 5
POSITIVE = {"margin": 0.4, "w_pos": 1.2, "w_neg": 0.7}
NEGATIVE = {"k": K_TOP, "n_mixes": S, "alpha": 0.5}
SMOOTHING = {"group_size": 3, "attention_temperature": 2.0, "weight": 0.5}
WITH_NEGATIVES = {
    "info_nce": info_nce,
    "positive_mixing": functools.partial(positive_mixing, **POSITIVE),
    "hard_negative_mixing": functools.partial(hard_negative_mixing, **NEGATIVE),
    "hybrid": functools.partial(hybrid, **POSITIVE, **NEGATIVE),
}
MIXING = [name for name in WITH_NEGATIVES if name != "info_nce"]
WITH_NEGATIVES |= {
    **{f"{name}, all columns": functools.partial(WITH_NEGATIVES[name], columns="all") for name in [*WITH_NEGATIVES]},
    **{f"{name}, no columns": functools.partial(WITH_NEGATIVES[name], columns="none") for name in MIXING},
}
DRAWS_PAIRS = [name for name in WITH_NEGATIVES if name.startswith(("hard_negative_mixing", "hybrid"))]
OWN = ["info_nce", *MIXING]
EVERY = [*WITH_NEGATIVES, "three_view", "three_view with negatives", "instance_smoothing", "smoothing of neighbours"]


def unit(x: Tensor) -> Tensor:
    return x / x.norm(dim=-1, keepdim=True)


def embeddings(seed: int = 0, dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
    rng = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=rng, dtype=torch.float64)

    z1 = unit(normal(B, D))
    pull = torch.tensor([-0.3, 0.2, 0.4, 0.6, 0.8, 2.0], dtype=torch.float64)[:, None]
    z2 = unit(pull * z1 + unit(normal(B, D)))
    views = {
        "z1": z1,
        "z2": z2,
        "z3": unit(z2 + 0.3 * normal(B, D)),
        "g": unit(z1[:, None] + normal(B, M, D)),
    }
    return {name: tensor.to(dtype) for name, tensor in views.items()}


def pairs_for(name: str) -> dict[str, Tensor]:
    """Fixed pairs as a keyword, for the objectives that would draw them."""
    if name not in DRAWS_PAIRS:
        return {}
    rng = torch.Generator().manual_seed(5)
    return {"pairs": torch.randint(K_TOP, (B, S, 2), generator=rng)}


def full_buffer(dtype: torch.dtype = torch.float64) -> Tensor:
    return unit(torch.randn(16, D, generator=torch.Generator().manual_seed(9), dtype=torch.float64)).to(dtype)


def evaluate(name: str, v: dict[str, Tensor], temperature: float = 0.2) -> tuple[Tensor, dict[str, Tensor]]:
    """Any objective with everything that it can take."""
    if name == "three_view":
        return three_view(v["z1"], v["z2"], v["z3"], temperature=temperature)
    if name == "three_view with negatives":
        return three_view(v["z1"], v["z2"], v["z3"], v["g"], temperature=temperature, columns="all")
    if name == "smoothing of neighbours":
        return instance_smoothing(v["z1"], v["z2"], temperature=temperature, neighbours=v["g"], **SMOOTHING)[:2]
    if name == "instance_smoothing":
        buffer = full_buffer(v["z1"].dtype)
        return instance_smoothing(v["z1"], v["z2"], buffer, temperature=temperature, **SMOOTHING)[:2]
    objective: Callable[..., tuple[Tensor, dict[str, Tensor]]] = WITH_NEGATIVES[name]
    return objective(v["z1"], v["z2"], v["g"], temperature=temperature, **pairs_for(name))


@pytest.mark.parametrize("name", EVERY)
def test_half_precision_is_computed_in_fp32(name: str) -> None:
    exact = embeddings(dtype=torch.float32)
    rounded = {key: tensor.bfloat16() for key, tensor in exact.items()}
    loss, metrics = evaluate(name, rounded)
    upcast = {key: tensor.float() for key, tensor in rounded.items()}
    if name != "instance_smoothing":  # whose buffer is rounded too
        assert loss == evaluate(name, upcast)[0]
    assert loss.dtype == torch.float32 and torch.isfinite(loss)
    torch.testing.assert_close(loss, evaluate(name, exact)[0], atol=0.1, rtol=0.05)
    assert all(value.dtype == torch.float32 for value in metrics.values())


@pytest.mark.parametrize("name", EVERY)
def test_autocast_changes_nothing(name: str) -> None:
    views = embeddings(dtype=torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        under_autocast, _ = evaluate(name, views)
    assert torch.equal(under_autocast, evaluate(name, views)[0])


@pytest.mark.parametrize("name", EVERY)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_gradients_reach_half_precision_inputs(name: str, dtype: torch.dtype) -> None:
    views = {key: tensor.requires_grad_() for key, tensor in embeddings(dtype=dtype).items()}
    loss, _ = evaluate(name, views, temperature=0.05)
    loss.backward()
    for key in ("z1", "z2"):
        gradient = views[key].grad
        assert gradient is not None and gradient.dtype == dtype
        assert torch.isfinite(gradient).all() and gradient.abs().sum() > 0


@pytest.mark.parametrize("name", EVERY)
def test_the_order_of_the_batch_does_not_matter(name: str) -> None:
    views = embeddings()
    order = torch.tensor([3, 0, 5, 1, 4, 2])
    shuffled = {key: tensor[order] for key, tensor in views.items()}
    if name in DRAWS_PAIRS:
        keywords = {"temperature": 0.2, "pairs": pairs_for(name)["pairs"][order]}
        loss, metrics = WITH_NEGATIVES[name](shuffled["z1"], shuffled["z2"], shuffled["g"], **keywords)
    else:
        loss, metrics = evaluate(name, shuffled)
    expected, expected_metrics = evaluate(name, views)
    torch.testing.assert_close(loss, expected, atol=1e-12, rtol=0)
    torch.testing.assert_close(metrics, expected_metrics)


@pytest.mark.parametrize("name", WITH_NEGATIVES)
def test_no_negatives_in_three_spellings(name: str) -> None:
    v = embeddings()
    objective = functools.partial(WITH_NEGATIVES[name], v["z1"], v["z2"], temperature=0.2, **pairs_for(name))
    expected, expected_metrics = objective()
    assert "negative_similarity" not in expected_metrics
    expected_metrics |= {"negative_similarity": torch.tensor(0.0)}
    nothing_usable = torch.zeros(B, M, dtype=torch.bool)
    for given in (
        objective(v["g"][:, :0]),
        objective(v["g"][:, :0], negatives_mask=nothing_usable[:, :0]),
        objective(v["g"], negatives_mask=nothing_usable),
    ):
        torch.testing.assert_close(given, (expected, expected_metrics), atol=1e-12, rtol=0)


@pytest.mark.parametrize("name", WITH_NEGATIVES)
def test_a_mask_of_all_true_changes_nothing(name: str) -> None:
    v = embeddings()
    objective = functools.partial(WITH_NEGATIVES[name], v["z1"], v["z2"], v["g"], temperature=0.2, **pairs_for(name))
    everything = torch.ones(B, M, dtype=torch.bool)
    torch.testing.assert_close(objective(negatives_mask=everything), objective(), atol=1e-12, rtol=0)
    if name.endswith("all columns"):
        masked = objective(columns_mask=torch.ones(B, B * M, dtype=torch.bool))
        torch.testing.assert_close(masked, objective(), atol=1e-12, rtol=0)


@pytest.mark.parametrize("name", WITH_NEGATIVES)
@pytest.mark.parametrize("filler", [float("nan"), float("inf"), 1e6])
def test_padding_slots_may_hold_anything(name: str, filler: float) -> None:
    v = embeddings()
    usable = torch.rand(B, M, generator=torch.Generator().manual_seed(1)) < 0.5
    usable[0] = False
    padded = torch.where(usable[..., None], v["g"], filler)
    objective = functools.partial(WITH_NEGATIVES[name], temperature=0.2, negatives_mask=usable, **pairs_for(name))
    z1, z2, g = (t.clone().requires_grad_() for t in (v["z1"], v["z2"], padded))
    loss, _ = objective(z1, z2, g)
    torch.testing.assert_close(loss.detach(), objective(v["z1"], v["z2"], v["g"])[0])
    loss.backward()
    assert all(torch.isfinite(t.grad).all() for t in (z1, z2, g))
    assert (g.grad[~usable] == 0).all() and (g.grad[usable] != 0).any()


@pytest.mark.parametrize("name", WITH_NEGATIVES)
def test_short_rows_make_no_nan_on_the_way_back(name: str) -> None:
    """Anomaly detection looks at every step of the backward pass, also at those that are masked later."""
    v = embeddings()
    z1, z2, g = (v[key][:2].requires_grad_() for key in ("z1", "z2", "g"))
    usable = torch.tensor([[False, False, False], [True, True, True]])
    pairs = {"pairs": torch.tensor([0, 3]).expand(2, S, 2)} if name in DRAWS_PAIRS else {}
    with torch.autograd.set_detect_anomaly(True):
        WITH_NEGATIVES[name](z1, z2, g, temperature=0.2, negatives_mask=usable, **pairs)[0].backward()
    assert all(torch.isfinite(t.grad).all() for t in (z1, z2, g))


@pytest.mark.parametrize("name", EVERY)
def test_gradients_are_those_of_finite_differences(name: str) -> None:
    v = embeddings()
    if name == "instance_smoothing":
        # Old rows that are near each positive fill its group: the batch's own rows in the buffer carry no
        # gradient, so a finite difference that moved them would rightly disagree.
        near = unit(v["z2"].repeat(3, 1) + 0.02 * full_buffer()[:1])
        buffer = torch.cat([near, torch.zeros(B, D, dtype=torch.float64)])
        settings = {**SMOOTHING, "group_size": 2}

        def function(z1: Tensor, z2: Tensor, _z3: Tensor, _g: Tensor) -> Tensor:
            return instance_smoothing(z1, z2, buffer, temperature=0.3, **settings)[0]
    elif name == "smoothing of neighbours":
        neighbours = v["g"].detach().clone()  # which carry no gradient

        def function(z1: Tensor, z2: Tensor, _z3: Tensor, _g: Tensor) -> Tensor:
            return evaluate(name, {"z1": z1, "z2": z2, "g": neighbours}, temperature=0.3)[0]
    else:

        def function(z1: Tensor, z2: Tensor, z3: Tensor, g: Tensor) -> Tensor:
            return evaluate(name, {"z1": z1, "z2": z2, "z3": z3, "g": g}, temperature=0.3)[0]

    inputs = tuple(v[key].requires_grad_() for key in ("z1", "z2", "z3", "g"))
    assert torch.autograd.gradcheck(function, inputs)


@pytest.mark.parametrize("name", EVERY)
@pytest.mark.parametrize("shift", [0.01, 0.5, 3.0])
def test_equal_embeddings_cost_the_log_of_the_number_of_columns(name: str, shift: float) -> None:
    same = unit(torch.full((D,), shift, dtype=torch.float64))
    views = {key: same.expand_as(tensor) for key, tensor in embeddings().items()}
    loss, metrics = evaluate(name, views)
    log = {n: torch.tensor(float(n), dtype=torch.float64).log() for n in range(1, B + B * M + S + 1)}
    expected = {
        "info_nce, all columns": log[B + B * M],
        "positive_mixing, all columns": log[B + B * M],
        "positive_mixing, no columns": log[B],
        "hard_negative_mixing, all columns": log[B + B * M + S],
        "hard_negative_mixing, no columns": log[B + S],
        "hybrid, all columns": log[B + B * M + S],
        "hybrid, no columns": log[B + S],
        "three_view with negatives": 2 * log[B + B * M],
        "smoothing of neighbours": (1 + SMOOTHING["weight"]) * log[B],
        "info_nce": log[B + M],
        "positive_mixing": log[B + M],
        "hard_negative_mixing": log[B + M + S],
        "hybrid": log[B + M + S],
        "three_view": 2 * log[B],
        # whatever the averages are, they are the same for every row
        "instance_smoothing": (1 + SMOOTHING["weight"]) * log[B],
    }[name]
    torch.testing.assert_close(loss, expected, atol=1e-9, rtol=0)
    assert metrics["positive_similarity"] == pytest.approx(1.0)
    assert metrics["hardest_negative_similarity"] == pytest.approx(1.0)


@pytest.mark.parametrize("temperature", [0.05, 0.5, 1.0])
def test_orthogonal_pairs_have_a_closed_form(temperature: float) -> None:
    z = torch.eye(B, dtype=torch.float64)
    expected = (1 + (B - 1) * torch.tensor(-1 / temperature, dtype=torch.float64).exp()).log()
    loss, metrics = info_nce(z, z, temperature=temperature)
    torch.testing.assert_close(loss, expected)
    assert metrics["contrastive_accuracy"] == 1 and metrics["hardest_negative_similarity"] == 0
    mixed, _ = positive_mixing(z, z, temperature=temperature, **POSITIVE)
    torch.testing.assert_close(mixed, expected)
    # a mix of negatives that are all orthogonal to the anchor is orthogonal to it too: S more such columns
    expected = (1 + (B - 1 + S) * torch.tensor(-1 / temperature, dtype=torch.float64).exp()).log()
    torch.testing.assert_close(hard_negative_mixing(z, z, temperature=temperature, **NEGATIVE)[0], expected)


def test_only_an_anchors_own_negatives_are_its_columns() -> None:
    v = embeddings()
    z1, g = v["z1"], v["g"].clone().requires_grad_()
    row_losses = []
    for i in range(B):
        only_i = torch.zeros(B, M, dtype=torch.bool)
        only_i[i] = True
        row_losses.append(info_nce(z1, v["z2"], g, temperature=0.2, negatives_mask=only_i)[0])
    base, _ = info_nce(z1, v["z2"], temperature=0.2)
    together, _ = info_nce(z1, v["z2"], g, temperature=0.2)
    torch.testing.assert_close(together - base, sum(loss - base for loss in row_losses))


def usable_and_repelled() -> tuple[Tensor, Tensor]:
    rng = torch.Generator().manual_seed(3)
    return torch.rand(B, M, generator=rng) < 0.7, torch.rand(B, B * M, generator=rng) < 0.6


@pytest.mark.parametrize("name", OWN)
def test_own_columns_are_all_columns_with_a_block_diagonal_mask(name: str) -> None:
    v = {key: tensor.requires_grad_() for key, tensor in embeddings().items()}
    usable, _ = usable_and_repelled()
    own_block = torch.eye(B, dtype=torch.bool).repeat_interleave(M, dim=1)
    objective = functools.partial(
        WITH_NEGATIVES[name], v["z1"], v["z2"], v["g"], temperature=0.2, negatives_mask=usable, **pairs_for(name)
    )
    own, masked = objective(), objective(columns="all", columns_mask=own_block)
    assert torch.equal(own[0], objective(columns="own")[0])  # the default
    torch.testing.assert_close(own, masked, atol=1e-12, rtol=0)
    inputs = [v[key] for key in ("z1", "z2", "g")]
    for mine, other in zip(torch.autograd.grad(own[0], inputs), torch.autograd.grad(masked[0], inputs), strict=True):
        torch.testing.assert_close(mine, other, atol=1e-12, rtol=0)
    assert (own[0] - objective(columns="all")[0]).detach().abs() > 1e-3


@pytest.mark.parametrize("name", MIXING)
def test_no_columns_are_all_columns_masked_away(name: str) -> None:
    v = embeddings()
    objective = functools.partial(WITH_NEGATIVES[name], v["z1"], v["z2"], v["g"], temperature=0.2, **pairs_for(name))
    none = objective(columns="none")
    nothing = torch.zeros(B, B * M, dtype=torch.bool)
    torch.testing.assert_close(none, objective(columns="all", columns_mask=nothing), atol=1e-12, rtol=0)
    without, _ = WITH_NEGATIVES[name](v["z1"], v["z2"], temperature=0.2, **pairs_for(name))
    # as candidates they still matter
    assert abs(float(none[0] - without)) > 1e-3 and abs(float(none[0] - objective()[0])) > 1e-3


@pytest.mark.parametrize("name", OWN)
def test_every_anchor_repels_the_only_usable_negatives(name: str) -> None:
    """Only anchor 4 has usable negatives: with "all" they are columns of every row, and candidates of row 4."""
    v = embeddings()
    usable = torch.zeros(B, M, dtype=torch.bool)
    usable[4] = True
    objective = functools.partial(WITH_NEGATIVES[name], temperature=0.2, **pairs_for(name))
    all_columns = objective(v["z1"], v["z2"], v["g"], negatives_mask=usable, columns="all")
    everyones = v["g"][4].expand(B, M, D)
    if name == "info_nce":
        expected = objective(v["z1"], v["z2"], everyones)[0]
        torch.testing.assert_close(all_columns[0], expected, atol=1e-12, rtol=0)
    own = objective(v["z1"], v["z2"], v["g"], negatives_mask=usable)
    assert all_columns[0] > own[0] + 1e-3  # every row has more columns
    unchanged = own[1].keys() - {"contrastive_accuracy"}
    assert all(all_columns[1][key] == own[1][key] for key in unchanged)  # and the same candidates
    row_4 = float((v["g"][4] @ v["z1"][4]).mean())
    assert all_columns[1]["negative_similarity"] == pytest.approx(row_4)


@pytest.mark.parametrize("name", OWN)
def test_the_columns_of_an_anchor_follow_the_order_of_its_negatives(name: str) -> None:
    """Negatives reordered within each anchor, and both masks with them: column j * m + n is negative n of j."""
    v = embeddings()
    usable, repelled = usable_and_repelled()
    order_BM = torch.stack([torch.randperm(M, generator=torch.Generator().manual_seed(i)) for i in range(B)])
    columns = (torch.arange(B)[:, None] * M + order_BM).flatten()
    rows = torch.arange(B)[:, None]
    objective = functools.partial(WITH_NEGATIVES[name], v["z1"], v["z2"], temperature=0.2, columns="all")
    expected = objective(v["g"], negatives_mask=usable, columns_mask=repelled, **pairs_for(name))
    g, usable = v["g"][rows, order_BM], usable[rows, order_BM]
    reordered = objective(g, negatives_mask=usable, columns_mask=repelled[:, columns], **pairs_for(name))
    torch.testing.assert_close(reordered, expected, atol=1e-12, rtol=0)
    stale = objective(g, negatives_mask=usable, columns_mask=repelled, **pairs_for(name))
    assert abs(float(stale[0] - expected[0])) > 1e-4


@pytest.mark.parametrize("name", OWN)
def test_the_order_of_the_batch_does_not_matter_with_both_masks(name: str) -> None:
    v = embeddings()
    usable, repelled = usable_and_repelled()
    order = torch.tensor([3, 0, 5, 1, 4, 2])
    objective = functools.partial(WITH_NEGATIVES[name], temperature=0.2, columns="all")
    pairs = pairs_for(name)
    expected = objective(v["z1"], v["z2"], v["g"], negatives_mask=usable, columns_mask=repelled, **pairs)
    shuffled = {
        "negatives_mask": usable[order],
        "columns_mask": repelled.reshape(B, B, M)[order][:, order].reshape(B, B * M),
        **{key: tensor[order] for key, tensor in pairs.items()},
    }
    got = objective(v["z1"][order], v["z2"][order], v["g"][order], **shuffled)
    torch.testing.assert_close(got, expected, atol=1e-12, rtol=0)


@pytest.mark.parametrize("name", OWN)
def test_padding_may_hold_nan_under_both_masks(name: str) -> None:
    """A mask of columns that would let padding through does not."""
    v = embeddings()
    usable, repelled = usable_and_repelled()
    repelled[:, ~usable.flatten()] = True
    g = torch.where(usable[..., None], v["g"], float("nan")).requires_grad_()
    z1, z2 = v["z1"].requires_grad_(), v["z2"].requires_grad_()
    objective = functools.partial(
        WITH_NEGATIVES[name], z1, z2, negatives_mask=usable, columns="all", temperature=0.2, **pairs_for(name)
    )
    loss, metrics = objective(g, columns_mask=repelled)
    torch.testing.assert_close((loss, metrics), objective(v["g"], columns_mask=repelled), atol=1e-12, rtol=0)
    loss.backward()
    assert all(torch.isfinite(t.grad).all() for t in (z1, z2, g))
    assert (g.grad[~usable] == 0).all() and (g.grad[usable] != 0).any()


@pytest.mark.parametrize("name", [*WITH_NEGATIVES, "three_view"])
def test_negative_similarity_is_a_mean_over_usable_negatives(name: str) -> None:
    v = embeddings()
    if name == "three_view":
        objective = functools.partial(three_view, v["z1"], v["z2"], v["z3"], temperature=0.2)
        anchors = [v["z1"], v["z2"]]
    else:
        objective = functools.partial(WITH_NEGATIVES[name], v["z1"], v["z2"], temperature=0.2, **pairs_for(name))
        anchors = [v["z1"]]
    usable, _ = usable_and_repelled()
    for mask in (usable, torch.ones_like(usable), torch.zeros_like(usable)):
        cosines = [float(v["g"][i, n] @ z[i]) for z in anchors for i in range(B) for n in range(M) if mask[i, n]]
        metric = objective(v["g"], negatives_mask=mask)[1]["negative_similarity"]
        assert metric == pytest.approx(sum(cosines) / max(len(cosines), 1), abs=1e-6)
        assert metric.dtype == torch.float32 and metric.ndim == 0
    assert "negative_similarity" not in objective()[1]


def test_accuracy_of_a_collapsed_encoder_is_zero() -> None:
    z = torch.zeros(4, 3)
    z[:, 0] = 1.0
    assert info_nce(z, z, temperature=0.05)[1]["contrastive_accuracy"] == 0


@pytest.mark.parametrize("name", EVERY)
def test_inputs_are_left_alone(name: str) -> None:
    views = embeddings()
    before = {key: tensor.clone() for key, tensor in views.items()}
    evaluate(name, views)
    assert all(torch.equal(views[key], before[key]) for key in views)


class NoHostSync(TorchDispatchMode):
    """Fails on operators that make the host wait for an accelerator: reads and data-dependent shapes."""

    WAITING = ("_local_scalar_dense", "nonzero", "masked_select", "equal", "is_nonzero", "unique")

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        name = func.overloadpacket.__name__
        assert name not in self.WAITING, f"{name} waits for the device"
        if name in ("index", "index_put", "_index_put_impl_"):
            assert all(i is None or i.dtype != torch.bool for i in args[1]), "a boolean index waits"
        return func(*args, **(kwargs or {}))


def test_the_guard_against_waiting_sees_a_read_and_a_boolean_index() -> None:
    for waits in (lambda x: x.sum().item(), lambda x: x[x > 0], lambda x: bool(x[0] > 0)):
        with pytest.raises(AssertionError, match="wait"), NoHostSync():
            waits(torch.ones(3))


@pytest.mark.parametrize("name", EVERY)
def test_nothing_waits_for_the_device(name: str) -> None:
    v = {key: tensor.requires_grad_() for key, tensor in embeddings().items()}
    with NoHostSync():
        if name in WITH_NEGATIVES:
            masks = {"negatives_mask": torch.ones(B, M, dtype=torch.bool)}
            if name.endswith("all columns"):
                masks["columns_mask"] = torch.ones(B, B * M, dtype=torch.bool)
            # pairs are drawn here: only given ones have values to check
            loss, _ = WITH_NEGATIVES[name](v["z1"], v["z2"], v["g"], temperature=0.2, **masks)
        elif name == "smoothing of neighbours":
            masks = {"neighbours_mask": torch.ones(B, M, dtype=torch.bool)}
            loss, _, _ = instance_smoothing(v["z1"], v["z2"], temperature=0.2, neighbours=v["g"], **masks, **SMOOTHING)
        else:
            loss, _ = evaluate(name, v)
        loss.backward()
    assert v["z1"].grad is not None
