"""Placement groups of an actor that was killed are removed; those of others stay."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from typing import Any

import pytest
import ray
from ray.util.placement_group import placement_group
from waits import soon

from hncse_ray.cluster.placement import orphaned_groups, state, without_orphaned_groups


@pytest.fixture(autouse=True)
def session() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        ray.init(address="local", num_cpus=3, include_dashboard=False, logging_level=logging.ERROR, log_to_driver=False)
        yield
        ray.shutdown()


def orphans() -> list[str]:
    return [group.id.hex() for group in orphaned_groups(ray.get_runtime_context().get_job_id())]


def free_cpus() -> float:
    return ray.available_resources().get("CPU", 0.0)


def test_only_groups_of_dead_actors_are_removed(monkeypatch: pytest.MonkeyPatch) -> None:
    class Holder:
        """Reserves a CPU, as Ray Train's controller does for its workers."""

        def hold(self) -> str:
            group = placement_group([{"CPU": 1}])
            ray.get(group.ready())
            return group.id.hex()

    ray.get(placement_group([{"CPU": 1}]).ready())  # the driver's own
    dead, alive = (ray.remote(num_cpus=0)(Holder).remote() for _ in range(2))
    held, kept = ray.get([dead.hold.remote(), alive.hold.remote()])
    soon(lambda: free_cpus() == 0, within_s=20, what="all CPUs reserved")
    assert orphans() == []
    with without_orphaned_groups():
        ray.kill(dead)
        soon(lambda: free_cpus() == 1, within_s=30, what="the CPU of the killed actor")
    assert orphans() == []

    # A group that was asked for just before its actor's death, and came to be after it, lacks Ray's mark.
    known = state.actor_table

    def table(actor_id: str, *others: Any) -> dict[str, Any]:
        found = known(actor_id, *others)
        return found | {"State": "DEAD"} if actor_id == alive._actor_id.hex() else found

    monkeypatch.setattr(state, "actor_table", table)
    assert orphans() == [kept] != [held]
