"""Distillation: its closed forms, who is in the list, derivatives, and what is left without a teacher."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from hncse_ray.objectives import distillation, info_nce, matryoshka

B, D, M = 5, 8, 3
SETTINGS: dict[str, Any] = {
    "temperature": 0.2,
    "teacher_temperature": 0.1,
    "list_loss": "kl",
    "contrast_weight": 0.0,
    "contrast_max_score": None,
}
WIDTH = {"own": B + M, "all": B + B * M}


def drawn(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def unit(x: Tensor) -> Tensor:
    return x / x.norm(dim=-1, keepdim=True)


Z1, Z2, G = unit(drawn(B, D, seed=0)), unit(drawn(B, D, seed=1)), unit(drawn(B, M, D, seed=2))
TEACHER = drawn(B, WIDTH["all"], seed=3) * 0.3


def masks(columns: str) -> dict[str, Tensor | None]:
    draw = torch.Generator().manual_seed(7)
    batch = torch.rand(B, B, generator=draw) < 0.8
    usable = torch.rand(B, M, generator=draw) < 0.8
    barred = (torch.rand(B, B * M, generator=draw) < 0.8) if columns == "all" else None
    return {"batch_mask": batch, "negatives_mask": usable, "columns_mask": barred}


def plain(columns: str, given: dict[str, Any], list_loss: str, teacher: Tensor) -> float:
    """The loss, one anchor and one document after the other."""
    found = []
    for i in range(B):
        listed = []
        for j in range(B):
            if j != i and (given["batch_mask"] is None or given["batch_mask"][i, j]):
                listed.append((Z1[i] @ Z2[j], teacher[i, j]))
        for owner in range(B) if columns == "all" else [i]:
            for n in range(M):
                at = owner * M + n if columns == "all" else n
                usable = given["negatives_mask"] is None or given["negatives_mask"][owner, n]
                if usable and (given["columns_mask"] is None or given["columns_mask"][i, at]):
                    listed.append((Z1[i] @ G[owner, n], teacher[i, B + at]))
        listed = [(float(s) / 0.2, float(t) / 0.1) for s, t in listed if np.isfinite(float(t))]
        if len(listed) < 2:
            continue
        s, t = np.array(listed).T
        if list_loss == "kl":
            p, q = np.exp(s) / np.exp(s).sum(), np.exp(t) / np.exp(t).sum()
            found.append(float((q * np.log(q / p)).sum()))
        else:
            pairs = [((s[j] - s[k]) - (t[j] - t[k])) ** 2 for j in range(len(s)) for k in range(len(s)) if j != k]
            found.append(float(np.mean(pairs)))
    return float(np.mean(found))


@pytest.mark.parametrize("list_loss", ["kl", "margin_mse"])
@pytest.mark.parametrize("columns", ["own", "all"])
@pytest.mark.parametrize("masked", [False, True])
def test_it_is_what_a_loop_over_anchors_and_documents_computes(list_loss: str, columns: str, masked: bool) -> None:
    teacher = TEACHER[:, : WIDTH[columns]].clone()
    given = masks(columns) if masked else dict.fromkeys(("batch_mask", "negatives_mask", "columns_mask"))
    if masked:
        teacher[2, :] = -torch.inf
        teacher[1, 6], teacher[3, 0] = torch.nan, -torch.inf
    loss, metrics = distillation(
        Z1, Z2, G, teacher=teacher, columns=columns, **given, **SETTINGS | {"list_loss": list_loss}
    )
    assert float(loss) == pytest.approx(plain(columns, given, list_loss, teacher), rel=1e-9)
    assert float(metrics["list_loss"]) == pytest.approx(float(loss), rel=1e-5)
    assert float(metrics["listed"]) == pytest.approx(0.8 if masked else 1)


def test_a_pupil_that_scores_as_its_teacher_has_learnt_it() -> None:
    scores = torch.cat([Z1 @ Z2.T, Z1 @ G.reshape(B * M, D).T], dim=1)
    for list_loss in ("kl", "margin_mse"):
        how = SETTINGS | {"list_loss": list_loss}
        loss, metrics = distillation(Z1, Z2, G, teacher=scores / 2 + 0.7, columns="all", **how)
        assert abs(float(loss)) < 1e-12 and float(metrics["teacher_agreement"]) == 1
        assert float(distillation(Z1, Z2, G, teacher=-scores, columns="all", **how)[0]) > 1


def test_the_own_document_is_not_in_the_list() -> None:
    teacher = TEACHER.clone()
    before = distillation(Z1, Z2, G, teacher=teacher, columns="all", **SETTINGS)[0]
    teacher[torch.arange(B), torch.arange(B)] = 100.0
    after = distillation(Z1, Z2, G, teacher=teacher, columns="all", **SETTINGS)[0]
    assert float(before) == float(after)
    own = torch.stack([Z1[i] * 3 for i in range(B)])  # z2_i changes nothing in row i; alone in the batch it is in none
    only = torch.full((B, B), False)
    moved = [distillation(Z1, z, G, teacher=teacher, columns="all", batch_mask=only, **SETTINGS)[0] for z in (Z2, own)]
    assert float(moved[0]) == float(moved[1])


@pytest.mark.parametrize("list_loss", ["kl", "margin_mse"])
@pytest.mark.parametrize("columns", ["own", "all"])
@pytest.mark.parametrize("weight", [0.0, 0.7])
def test_gradients_are_those_of_finite_differences(list_loss: str, columns: str, weight: float) -> None:
    given = masks(columns)
    teacher = TEACHER[:, : WIDTH[columns]].clone()
    teacher[2, :] = -torch.inf
    how = SETTINGS | {"list_loss": list_loss, "contrast_weight": weight, "contrast_max_score": 0.1}

    def function(z1: Tensor, z2: Tensor, g: Tensor) -> Tensor:
        return distillation(z1, z2, g, teacher=teacher, columns=columns, **given, **how)[0]

    inputs = [z.clone().requires_grad_() for z in (Z1, Z2, G)]
    assert torch.autograd.gradcheck(function, inputs)
    with torch.autograd.set_detect_anomaly(True):
        function(*inputs).backward()


def test_the_contrast_is_info_nce_but_for_what_the_teacher_finds_near() -> None:
    teacher = TEACHER.clone()
    how = SETTINGS | {"contrast_weight": 0.7}
    alone = distillation(Z1, Z2, G, teacher=teacher, columns="all", **SETTINGS)[0]
    for most in (None, 0.1):
        loss, _ = distillation(Z1, Z2, G, teacher=teacher, columns="all", **how | {"contrast_max_score": most})
        near = torch.zeros_like(teacher, dtype=torch.bool) if most is None else teacher > most
        contrasted, _ = info_nce(
            Z1, Z2, G, temperature=0.2, columns="all", batch_mask=~near[:, :B], columns_mask=~near[:, B:]
        )
        torch.testing.assert_close(loss, alone + 0.7 * contrasted)


def test_without_a_teacher_it_is_info_nce_and_its_metrics_have_the_same_names() -> None:
    usable = torch.zeros(B, M, dtype=torch.bool)
    loss, metrics = distillation(Z1, Z2, G, teacher=None, negatives_mask=usable, **SETTINGS)
    expected, _ = info_nce(Z1, Z2, temperature=0.2)
    torch.testing.assert_close(loss, expected)
    taught = distillation(Z1, Z2, G, teacher=TEACHER[:, : B + M], **SETTINGS)[1]
    assert list(metrics) == list(taught) and float(metrics["listed"]) == 0


def test_half_precision_and_padding() -> None:
    usable = masks("own")["negatives_mask"]
    assert usable is not None
    padded = torch.where(usable[..., None], G, torch.nan)
    teacher = TEACHER[:, : B + M]
    half = [z.bfloat16().requires_grad_() for z in (Z1, Z2, padded)]
    with torch.autocast("cpu", torch.bfloat16):
        loss, _ = distillation(*half, teacher=teacher.float(), negatives_mask=usable, **SETTINGS)
    loss.backward()
    assert loss.dtype == torch.float32
    exact, _ = distillation(Z1, Z2, G, teacher=teacher, negatives_mask=usable, **SETTINGS)
    torch.testing.assert_close(loss.double(), exact, atol=0.05, rtol=0.05)
    assert all(z.grad is not None and z.grad.isfinite().all() for z in half)


def test_it_works_at_smaller_widths_too() -> None:
    how = SETTINGS | {"teacher": TEACHER, "columns": "all"}
    loss, metrics = matryoshka(distillation, Z1, Z2, negatives=G, dimensions=[4], **how)
    parts = [float(metrics[f"loss_at_{d}"]) for d in (8, 4)]
    assert float(loss) == pytest.approx(sum(parts) / 2, rel=1e-6) and parts[0] != parts[1]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"teacher": TEACHER[:, :4]}, r"teacher has shape \(5, 4\); it must be \[B, columns\] = \(5, 8\)"),
        ({"teacher": torch.zeros(B, B + M, dtype=torch.long)}, "teacher has dtype torch.int64"),
        ({"list_loss": "huber"}, "list_loss is 'huber'"),
        ({"teacher_temperature": 0.0}, "teacher_temperature is 0.0"),
        ({"contrast_weight": -1.0}, "contrast_weight is -1.0"),
        ({"columns": "none"}, "columns is 'none'"),
    ],
)
def test_what_does_not_fit_is_said(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        distillation(Z1, Z2, G, **{"teacher": TEACHER[:, : B + M]} | SETTINGS | change)
