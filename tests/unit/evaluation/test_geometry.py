"""Closed forms, naive references and bad input of the three measures of an embedding space."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from tiny import make_sentences

from hncse_ray.errors import DataError
from hncse_ray.evaluation import (
    Encode,
    alignment,
    anisotropy,
    evaluate_geometry,
    evaluate_retrieval,
    paired_set,
    similarity_histogram,
    uniformity,
)


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
        (np.full((2, 3), np.nan), "not unit-norm: 2 of 2 rows"),
        (np.array([[1.0, 0.0], [2.0, 0.0]]), "not unit-norm: 1 of 2 rows"),
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


# ------------------------------------------------------------------------------------------------ histogram


def test_histogram_counts_every_pair_once_in_its_bin() -> None:
    rng = np.random.default_rng(3)
    positive, negative = rng.uniform(0.2, 1, 500), rng.uniform(-1, 0.5, 700)
    found = similarity_histogram(positive, negative, bins=20)
    assert len(found.bins) == 21 and found.bins[0] == -1 and found.bins[-1] == 1
    for counts, cosines in ((found.positive, positive), (found.negative, negative)):
        assert sum(counts) == len(cosines)
        for i, count in enumerate(counts):
            assert count == sum(found.bins[i] <= c < found.bins[i + 1] for c in cosines)


def test_histogram_keeps_what_rounding_has_pushed_out() -> None:
    found = similarity_histogram(np.array([1 + 1e-6, 1.0], np.float32), np.array([-1 - 1e-6, -1.0]))
    assert found.positive[-1] == 2 and found.negative[0] == 2


# ------------------------------------------------------------------------------------------------ the suite

TEXTS = make_sentences(60, seed=14)


@pytest.fixture
def senteval(tmp_path: Path) -> Path:
    """STS-Benchmark's dev split with 30 pairs: the last eleven are positives, the first sentence comes twice."""
    folder = tmp_path / "STS" / "STSBenchmark"
    folder.mkdir(parents=True)
    pairs = [(TEXTS[2 * i] if i else TEXTS[58], TEXTS[2 * i + 1], i * 5 / 29 if i > 18 else i / 10) for i in range(30)]
    pairs = [(a, b, 4.0 if i >= 19 else gold) for i, (a, b, gold) in enumerate(pairs)]
    rows = [f"g\tf\ty\t{i}\t{gold:.2f}\t{a}\t{b}" for i, (a, b, gold) in enumerate(pairs)]
    (folder / "sts-dev.csv").write_text("\n".join(rows) + "\n", encoding="utf-8")
    return tmp_path


def encode(texts: list[str]) -> np.ndarray:
    """A vector that depends on the sentence alone."""
    return np.stack([np.random.default_rng(list(text.encode())).normal(size=16) + 0.2 for text in texts])


def test_the_suite_is_the_measures_of_the_dev_pairs(senteval: Path) -> None:
    scores, found = evaluate_geometry(encode, senteval)
    used = [TEXTS[58], *TEXTS[1:]]
    z = encode(list(dict.fromkeys(used)))
    z /= np.linalg.norm(z, axis=1, keepdims=True)
    of = dict(zip(dict.fromkeys(used), z, strict=True))
    first, second = (np.stack([of[TEXTS[2 * i + side]] for i in range(19, 30)]) for side in (0, 1))
    assert scores == {
        "alignment": pytest.approx(alignment(first, second)),
        "uniformity": pytest.approx(uniformity(z)),
        "anisotropy": pytest.approx(anisotropy(z)),
    }
    assert len(z) == 59 and sum(found.positive) == 11 and sum(found.negative) == 10_000
    assert found.positive == similarity_histogram(np.sum(first * second, axis=1), []).positive


def test_negatives_are_seeded_and_never_a_sentence_with_itself(senteval: Path) -> None:
    def directions(texts: list[str]) -> np.ndarray:
        return np.eye(len(texts))  # the cosine of any two is 0, of one with itself 1

    _, found = evaluate_geometry(directions, senteval)
    assert found.negative[20] == 10_000 and found.negative[-1] == 0
    assert evaluate_geometry(encode, senteval)[1] == evaluate_geometry(encode, senteval)[1]
    assert evaluate_geometry(encode, senteval)[1].negative != evaluate_geometry(encode, senteval, seed=1)[1].negative


def test_data_without_positives_and_without_the_set(senteval: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="STSBenchmark is missing"):
        evaluate_geometry(encode, tmp_path / "none")
    path = senteval / "STS/STSBenchmark/sts-dev.csv"
    path.write_text(path.read_text().replace("\t4.00\t", "\t3.00\t"))
    with pytest.raises(DataError, match="no pair with a score of 4 or more"):
        evaluate_geometry(encode, senteval)


BROKEN: dict[str, tuple[Encode, str]] = {
    "NaN": (lambda texts: np.full((len(texts), 4), np.nan), "NaN or infinity"),
    "one NaN": (lambda texts: np.where(np.arange(len(texts))[:, None] == 3, np.nan, np.ones((len(texts), 4))), "NaN"),
    "too few rows": (lambda texts: np.ones((len(texts) - 1, 4)), "shape"),
    "one axis": (lambda texts: np.ones(len(texts)), "shape"),
    "no columns": (lambda texts: np.ones((len(texts), 0)), "shape"),
    "text": (lambda texts: np.array([[text] for text in texts]), "values of type"),
    "zeros": (lambda texts: np.zeros((len(texts), 4)), "zeros only"),
}


@pytest.mark.parametrize("case", BROKEN)
@pytest.mark.parametrize("suite", ["geometry", "retrieval"])
def test_an_encoder_that_cannot_be_scored(case: str, suite: str, senteval: Path) -> None:
    broken, said = BROKEN[case]
    score: dict[str, Callable[[], object]] = {
        "geometry": lambda: evaluate_geometry(broken, senteval),
        "retrieval": lambda: evaluate_retrieval(broken, paired_set(TEXTS[:30], TEXTS[30:])),
    }
    with pytest.raises(DataError, match=said) as caught:
        score[suite]()
    assert caught.value.hint


@pytest.mark.parametrize("noise", [0, 1e-8])
def test_a_constant_encoder(noise: float, senteval: Path) -> None:
    """Its geometry says nothing and is refused; in retrieval it ranks every answer last."""
    rng = np.random.default_rng(0)

    def constant(texts: list[str]) -> np.ndarray:
        return np.full((len(texts), 4), 0.3) + noise * rng.normal(size=(len(texts), 4))

    with pytest.raises(DataError, match="all 59 sentences the same vector"):
        evaluate_geometry(constant, senteval)
    assert evaluate_retrieval(constant, paired_set(TEXTS[:30], TEXTS[30:]))["mrr"] == pytest.approx(1 / 30)
