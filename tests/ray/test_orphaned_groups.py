"""Placement groups of an actor that was killed; those of others stay."""

from __future__ import annotations

import logging
from collections.abc import Iterator

import pytest
import ray
from pool_faults import soon
from ray.util.placement_group import placement_group

from hncse_ray.cluster.placement import remove_orphaned_groups


@pytest.fixture(autouse=True)
def session() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        ray.init(address="local", num_cpus=3, include_dashboard=False, logging_level=logging.ERROR, log_to_driver=False)
        yield
        ray.shutdown()


def free_cpus() -> float:
    return ray.available_resources().get("CPU", 0.0)


def test_only_groups_of_dead_actors_are_removed() -> None:
    class Holder:
        """Reserves a CPU, as Ray Train's controller does for its workers."""

        def hold(self) -> None:
            ray.get(placement_group([{"CPU": 1}]).ready())

        def clean(self) -> int:
            return remove_orphaned_groups()

    ray.get(placement_group([{"CPU": 1}]).ready())  # the driver's own
    dead, alive = (ray.remote(num_cpus=0)(Holder).remote() for _ in range(2))
    ray.get([dead.hold.remote(), alive.hold.remote()])
    assert ray.get(alive.clean.remote()) == 0
    ray.kill(dead)
    soon(lambda: ray.get(alive.clean.remote()) == 1, within_s=20, what="the end of the killed actor")
    soon(lambda: free_cpus() == 1, within_s=20, what="its CPU")
    assert ray.get(alive.clean.remote()) == remove_orphaned_groups() == 0
