"""A folder by its URL and, where a server can be had, on S3 and Google's storage."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from object_stores import BUCKET, gcs_server, s3_server

from hncse_ray.storage.remote import Remote

_numbers = itertools.count()


@pytest.fixture(scope="session")
def amazon(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with s3_server(tmp_path_factory.mktemp("s3")):
        yield


@pytest.fixture(scope="session")
def google(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with gcs_server(tmp_path_factory.mktemp("gcs")) as gate, pytest.MonkeyPatch.context() as patch:
        # Not through the gate, which is in this process: pyarrow waits for Google's first bytes with the GIL held.
        patch.setenv("CLOUD_STORAGE_EMULATOR_ENDPOINT", f"http://127.0.0.1:{gate.target}")
        yield


@pytest.fixture
def remote_at(request: pytest.FixtureRequest, tmp_path: Path) -> Callable[[str], Remote]:
    """Make an empty folder at a URL of a kind."""

    def make(kind: str) -> Remote:
        if kind == "file":
            return Remote(f"file://{tmp_path}/store/run")
        request.getfixturevalue({"s3": "amazon", "gs": "google"}[kind])
        return Remote(f"{kind}://{BUCKET}/store-{next(_numbers)}/run")

    return make


@pytest.fixture(params=["file", "s3", "gs"])
def remote(request: pytest.FixtureRequest, remote_at: Callable[[str], Remote]) -> Remote:
    return remote_at(request.param)
