"""The paired bootstrap: it finds a difference that is there, none where there is none, and knows its interval."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pytest

from hncse_ray.errors import DataError
from hncse_ray.evaluation import (
    Difference,
    Encode,
    RetrievalSet,
    StsPair,
    StsPairs,
    compare_earned,
    compare_retrieval,
    compare_sts,
    evaluate_retrieval,
    evaluate_sts,
    mean_and_spread,
    paired_set,
    read_sts,
)
from hncse_ray.evaluation.retrieval import query_scores
from hncse_ray.evaluation.sts import cosines

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


def numbered(numbers: Iterable[int]) -> RetrievalSet:
    numbers = list(numbers)
    return paired_set([f"query {n}" for n in numbers], [f"an-answer {n}" for n in numbers])


DATA = numbered(range(300))


def compare(first: Encode, second: Encode, data: RetrievalSet = DATA, *, resamples: int = 1000) -> list[Difference]:
    return compare_retrieval(first, second, {"pairs": data}, resamples=resamples)


def test_retrieval_scores_are_those_of_the_evaluation_and_a_better_encoder_is_found() -> None:
    first, second = Noisy(1.5, 1), Noisy(0.7, 2)
    found = {d.name: d for d in compare(first, second)}
    for encode, side in ((first, "first"), (second, "second")):
        scores = evaluate_retrieval(encode, DATA)
        assert {name: getattr(d, side) for name, d in found.items()} == pytest.approx(
            {f"pairs/{metric}": score for metric, score in scores.items()}
        )
    for d in found.values():
        assert d.items == len(DATA.queries)
        assert 0 < d.low < d.second - d.first < d.high and d.p_value == d.resolution == 2 / 1001


def test_two_encoders_that_differ_by_luck_are_not_told_apart_more_often_than_they_should() -> None:
    values = [compare(Noisy(1.0, 2 * seed), Noisy(1.0, 2 * seed + 1), resamples=200)[2].p_value for seed in range(40)]
    assert np.mean(np.array(values) < 0.05) < 0.2
    assert np.median(values) > 0.2


def test_an_encoder_does_not_differ_from_itself() -> None:
    for d in compare(Noisy(1, 1), Noisy(1, 1), resamples=50):
        assert (d.low, d.high, d.p_value) == (0, 0, 1)


def test_the_interval_covers_the_true_difference_as_often_as_it_says() -> None:
    """Of many test sets drawn from one population, about 95 % of the intervals hold the population's difference."""
    rng = np.random.default_rng(0)
    covered = 0
    for _ in range(60):
        numbers = rng.integers(0, 100_000, 120)
        if len(set(numbers)) < 120:
            continue
        d = compare(Noisy(1.2, 5), Noisy(1.2, 6), numbered(numbers), resamples=300)[2]
        covered += d.low <= 0 <= d.high  # equally noisy encoders: no difference in the population
    assert covered >= 50


@pytest.mark.parametrize("resamples", [20, 200])
def test_a_p_value_says_no_more_than_the_resamples_can_show(resamples: int) -> None:
    """Twice the share of one side: of n resamples at least two in n, and one more for the set as it was."""
    for d in compare(Noisy(3.0, 1), Noisy(0.1, 2), resamples=resamples):
        assert d.p_value == d.resolution == 2 / (resamples + 1)
    for d in compare(Noisy(1.0, 1), Noisy(1.0, 2), resamples=resamples):
        assert (d.p_value / d.resolution) == pytest.approx(round(d.p_value / d.resolution)) or d.p_value == 1


def test_several_sets_are_compared_one_by_one_and_by_their_mean() -> None:
    first, second = Noisy(1.5, 1), Noisy(1.0, 2)
    sets = {"retrieval/large": DATA, "retrieval/small": numbered(range(1000, 1030))}
    found = {d.name: d for d in compare_retrieval(first, second, sets, mean="retrieval")}
    assert len(found) == 3 * 4
    for metric in DATA.metrics:
        large, small, mean = (found[f"{name}/{metric}"] for name in (*sets, "retrieval"))
        assert mean.first == pytest.approx((large.first + small.first) / 2)
        assert mean.second == pytest.approx((large.second + small.second) / 2)
        assert large.high - large.low < mean.high - mean.low < small.high - small.low  # as its widest half allows


def test_sts_is_compared_task_by_task_and_on_average(sts_folder: Path) -> None:
    first, second = Lengths(1), Lengths(3)
    data = {"STSBenchmark": read_sts("STSBenchmark", "test", sts_folder)}
    found = {d.name: d for d in compare_sts(first, second, data, resamples=50)}
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


# ------------------------------------------------------------------------------------------------ what is earned


def test_what_queries_have_earned_is_compared_as_the_encoders_are() -> None:
    sets = {"one": DATA, "two": numbered(range(50, 250))}
    encodes = (Noisy(1.5, 1), Noisy(0.7, 2))
    earned = {name: tuple(query_scores(encode, data)["mrr"] for encode in encodes) for name, data in sets.items()}
    wanted = {d.name: d for d in compare_retrieval(*encodes, sets)}
    assert compare_earned("mean/mrr", earned) == wanted["mean/mrr"]
    assert compare_earned("one/mrr", {"one": earned["one"]}) == wanted["one/mrr"]


def test_so_are_cosines() -> None:
    rng = np.random.default_rng(0)
    pairs = StsPairs("sts", tuple(StsPair(f"one {i}", f"two {i}", float(rng.uniform(0, 5))) for i in range(80)))
    encodes = (Noisy(1.5, 1), Noisy(0.7, 2))
    (wanted,) = compare_sts(*encodes, {"sts": pairs})
    both = tuple(cosines(encode, [pairs])[0] for encode in encodes)
    gold = np.array([pair.gold for pair in pairs.pairs])
    assert compare_earned("sts", {"sts": both}, gold={"sts": gold}) == wanted
