"""Closed forms, naive references and bad input of the three measures of an embedding space."""

import numpy as np
import pytest

from hncse_ray.errors import DataError
from hncse_ray.evaluation import alignment, anisotropy, uniformity


def unit_rows(n: int, d: int = 8, seed: int = 0) -> np.ndarray:
    z = np.random.default_rng(seed).normal(size=(n, d)) + 0.3
    return z / np.linalg.norm(z, axis=1, keepdims=True)


def test_alignment_closed_forms() -> None:
    z = np.eye(4)
    assert alignment(z, z) == 0
    assert alignment(z, -z) == pytest.approx(4)
    assert alignment(z, np.roll(z, 1, axis=0)) == pytest.approx(2)  # orthogonal
    assert alignment(z, -z, alpha=1) == pytest.approx(2)


def test_uniformity_closed_forms() -> None:
    assert uniformity(np.tile([0.6, 0.8], (5, 1))) == pytest.approx(0, abs=1e-12)
    assert uniformity(np.eye(7)) == pytest.approx(-4)  # all squared distances are 2
    assert uniformity(np.array([[1.0, 0], [-1, 0]])) == pytest.approx(-8)
    assert uniformity(np.array([[1.0, 0], [-1, 0]]), t=500) == pytest.approx(-2000)  # exp(-2000) underflows


def test_anisotropy_closed_forms() -> None:
    assert anisotropy(np.tile([0.6, 0.8], (5, 1))) == pytest.approx(1)
    assert anisotropy(np.eye(7)) == pytest.approx(0)
    assert anisotropy(np.array([[1.0, 0], [-1, 0]])) == pytest.approx(-1)


@pytest.mark.parametrize("chunk_rows", [1, 3, 7, 20, 1000])
def test_naive_references(chunk_rows: int) -> None:
    z = unit_rows(20)
    pairs = [(i, j) for i in range(20) for j in range(i)]
    potential = [np.exp(-2 * np.sum((z[i] - z[j]) ** 2)) for i, j in pairs]
    assert uniformity(z, chunk_rows=chunk_rows) == pytest.approx(np.log(np.mean(potential)), rel=1e-12)
    assert anisotropy(z) == pytest.approx(np.mean([z[i] @ z[j] for i, j in pairs]), rel=1e-12)


def test_uniform_points_on_a_large_sphere_have_the_known_limit() -> None:
    # In many dimensions two random directions are nearly orthogonal: uniformity -> -4, anisotropy -> 0.
    z = np.random.default_rng(1).normal(size=(800, 2000))
    z /= np.linalg.norm(z, axis=1, keepdims=True)
    assert uniformity(z) == pytest.approx(-4, abs=0.01)
    assert anisotropy(z) == pytest.approx(0, abs=0.01)


def test_float32_is_computed_in_float64() -> None:
    z = unit_rows(50)
    assert uniformity(z.astype(np.float32)) == pytest.approx(uniformity(z), abs=1e-6)


@pytest.mark.parametrize("measure", [uniformity, anisotropy, lambda z: alignment(z, z)])
@pytest.mark.parametrize(
    ("z", "message"),
    [
        (np.ones(3), r"shape \[3\]"),
        (np.ones((0, 3)), r"shape \[0, 3\]"),
        (np.full((2, 3), np.nan), "2 of 2 rows are not unit-norm"),
        (np.array([[1.0, 0.0], [2.0, 0.0]]), "1 of 2 rows are not unit-norm"),
    ],
)
def test_bad_input(measure, z: np.ndarray, message: str) -> None:
    with pytest.raises(DataError, match=message):
        measure(z)


@pytest.mark.parametrize("measure", [uniformity, anisotropy])
def test_one_row_has_no_pairs(measure) -> None:
    with pytest.raises(DataError, match="N >= 2"):
        measure(np.array([[1.0, 0.0]]))


def test_alignment_needs_pairs() -> None:
    with pytest.raises(DataError, match=r"not \[2, 8\] and \[3, 8\]"):
        alignment(unit_rows(2), unit_rows(3))
