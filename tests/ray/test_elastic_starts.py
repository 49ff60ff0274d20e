"""How an elastic run knows that its workers have begun: by nothing that may be lost with a process of the run."""

from __future__ import annotations

import logging
from collections.abc import Iterator

import pytest
import ray

from hncse_ray.cluster.elastic import Bundles, Starts, WorkersUnavailable, fit_elastic
from hncse_ray.cluster.resources import WorkerPlan
from hncse_ray.config import ClusterSettings
from hncse_ray.reporting import RunFinished

FINISHED = RunFinished(step=8, best_step=8, sentences_per_s=1.0, stopped_early=False, before={}, after={})


@pytest.fixture(scope="module", autouse=True)
def session() -> Iterator[None]:
    ray.init(address="local", num_cpus=2, include_dashboard=False, logging_level=logging.ERROR, log_to_driver=False)
    yield
    ray.shutdown()


@pytest.fixture
def starts() -> Iterator[Starts]:
    made = Starts()
    yield made
    made.forget()
    assert made.last() is None


def fit(starts: Starts, *, losses: int, begins: bool) -> tuple[RunFinished, list[str]]:
    """A run whose workers are lost again and again, before or after they have begun on another process."""
    plan = WorkerPlan(num_workers=1, cpus=1, threads=1, gpus=0)
    cluster = ClusterSettings(num_workers=1, min_workers=1, use_gpu=False)
    begin, said, left = ray.remote(Starts.note), list[str](), iter(range(losses))

    def attempt(workers: int, missing: Bundles) -> RunFinished:
        if begins:
            ray.get(begin.remote(starts))
        if next(left, None) is not None:
            raise WorkersUnavailable("no node")
        return FINISHED

    return fit_elastic(attempt, plan, cluster, starts=starts, notify=said.append), said


def test_workers_that_begin_may_lose_their_place_any_number_of_times(starts: Starts) -> None:
    finished, said = fit(starts, losses=4, begins=True)
    assert finished == FINISHED and len(said) == 4


def test_workers_that_never_begin_are_given_up(starts: Starts) -> None:
    with pytest.raises(WorkersUnavailable):
        fit(starts, losses=4, begins=False)
    assert fit(starts, losses=2, begins=False)[0] == FINISHED
