"""What the launcher arranges around Ray Train."""

from __future__ import annotations

import os
from types import SimpleNamespace

import pytest
import ray
from ray.train.v2._internal.constants import get_env_vars_to_propagate

from hncse_ray.cluster.launch import _address_for_helpers


@pytest.mark.parametrize("before", [None, "10.0.0.1:6379"])
def test_ray_trains_helpers_are_told_which_ray_they_belong_to(
    before: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A private set of Ray's is extended for it: a Ray that has no such set any more is noticed here."""
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    if before:
        monkeypatch.setenv("RAY_ADDRESS", before)
    monkeypatch.setattr(ray, "get_runtime_context", lambda: SimpleNamespace(gcs_address="127.0.0.1:1234"))
    with _address_for_helpers():
        assert get_env_vars_to_propagate()["RAY_ADDRESS"] == "127.0.0.1:1234"
    assert os.environ.get("RAY_ADDRESS") == before
