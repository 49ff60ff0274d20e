"""The paired bootstrap: it finds a difference that is there, none where there is none, and knows its interval."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from hncse_ray.errors import DataError
from hncse_ray.evaluation import compare_retrieval, compare_sts, evaluate_retrieval, evaluate_sts, mean_and_spread

DIMENSION = 16


class Noisy:
    """Encodes text `n` as the vector of its number, plus noise of its own."""

    def __init__(self, noise: float, seed: int) -> None:
        self.noise, self.seed = noise, seed

    def __call__(self, texts: list[str]) -> np.ndarray:
        rows = []
        for text in texts:
            name, number = text.split()
            own = np.random.default_rng([self.seed, int(number), len(name)]).standard_normal(DIMENSION)
            rows.append(np.random.default_rng(int(number)).standard_normal(DIMENSION) + self.noise * own)
        return np.array(rows)


QUERIES, ANSWERS = [f"query {i}" for i in range(300)], [f"an-answer {i}" for i in range(300)]


def test_retrieval_scores_are_those_of_the_evaluation_and_a_better_encoder_is_found() -> None:
    first, second = Noisy(1.5, 1), Noisy(0.7, 2)
    found = {d.name: d for d in compare_retrieval(first, second, QUERIES, ANSWERS)}
    for encode, side in ((first, "first"), (second, "second")):
        scores = evaluate_retrieval(encode, QUERIES, ANSWERS)
        assert {name: getattr(d, side) for name, d in found.items()} == pytest.approx(scores)
    for d in found.values():
        assert 0 < d.low < d.second - d.first < d.high and d.p_value <= 0.002


def test_two_encoders_that_differ_by_luck_are_not_told_apart_more_often_than_they_should() -> None:
    values = [
        compare_retrieval(Noisy(1.0, 2 * seed), Noisy(1.0, 2 * seed + 1), QUERIES, ANSWERS, resamples=200)[2].p_value
        for seed in range(40)
    ]
    assert np.mean(np.array(values) < 0.05) < 0.2
    assert np.median(values) > 0.2


def test_an_encoder_does_not_differ_from_itself() -> None:
    for d in compare_retrieval(Noisy(1, 1), Noisy(1, 1), QUERIES, ANSWERS, resamples=50):
        assert (d.low, d.high, d.p_value) == (0, 0, 1)


def test_the_interval_covers_the_true_difference_as_often_as_it_says() -> None:
    """Of many test sets drawn from one population, about 95 % of the intervals hold the population's difference."""
    rng = np.random.default_rng(0)
    covered = 0
    for _ in range(60):
        numbers = rng.integers(0, 100_000, 120)
        queries, answers = [f"query {n}" for n in numbers], [f"an-answer {n}" for n in numbers]
        if len(set(answers)) < 120:
            continue
        d = compare_retrieval(Noisy(1.2, 5), Noisy(1.2, 6), queries, answers, resamples=300)[2]
        covered += d.low <= 0 <= d.high  # equally noisy encoders: no difference in the population
    assert covered >= 50


def test_sts_is_compared_task_by_task_and_on_average(sts_folder: Path) -> None:
    first, second = Lengths(1), Lengths(3)
    found = {d.name: d for d in compare_sts(first, second, sts_folder, ["STSBenchmark"], resamples=50)}
    assert set(found) == {"STSBenchmark"}
    for encode, side in ((first, "first"), (second, "second")):
        assert (
            getattr(found["STSBenchmark"], side) == evaluate_sts(encode, sts_folder, ["STSBenchmark"])["STSBenchmark"]
        )


class Lengths:
    """An encoder of surface features."""

    def __init__(self, power: int) -> None:
        self.power = power

    def __call__(self, texts: list[str]) -> np.ndarray:
        return np.array([[len(t) ** self.power, t.count(" ") + 1, t.count("a") + 1] for t in texts], dtype=float)


@pytest.fixture
def sts_folder(tmp_path: Path) -> Path:
    folder = tmp_path / "STS" / "STSBenchmark"
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    lines = []
    for i in range(60):
        one, other = ("a " * int(n) + "word" for n in rng.integers(1, 30, 2))
        lines.append(f"g\tf\ty\t{i}\t{rng.uniform(0, 5):.2f}\t{one}\t{other}")
    (folder / "sts-test.csv").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return tmp_path


def test_several_seeds_are_summed_up_by_mean_and_standard_deviation() -> None:
    assert mean_and_spread([{"a": 1.0}, {"a": 2.0}, {"a": 3.0}]) == {"a": (2.0, 1.0)}
    assert mean_and_spread([{"a": 1.0}]) == {"a": (1.0, 0.0)}
    with pytest.raises(DataError, match="different scores"):
        mean_and_spread([{"a": 1.0}, {"b": 1.0}])
