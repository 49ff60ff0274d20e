"""Which clusters are joined."""

from __future__ import annotations

import pytest

from hncse_ray.cluster import ray_session
from hncse_ray.errors import ClusterError


def test_the_address_of_a_job_server_is_not_one_to_join(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "http://127.0.0.1:8265")
    with pytest.raises(ClusterError, match="RAY_ADDRESS=http://127.0.0.1:8265: .*hncse submit"), ray_session():
        pytest.fail("it was joined")
