"""Each test here runs on a folder by its URL and, where a server can be had, on S3 and Google's storage."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path

import pytest
from object_stores import BUCKET, gcs_server, s3_server

from hncse_ray.storage.remote import Remote

_numbers = itertools.count()


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with s3_server(tmp_path_factory.mktemp("s3")):
        yield


@pytest.fixture(scope="session")
def google(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with gcs_server(tmp_path_factory.mktemp("gcs")):
        yield


@pytest.fixture(params=["file", "s3", "gs"])
def remote(request: pytest.FixtureRequest, tmp_path: Path) -> Remote:
    if request.param == "file":
        return Remote(f"file://{tmp_path}/store/run")
    request.getfixturevalue({"s3": "server", "gs": "google"}[request.param])
    return Remote(f"{request.param}://{BUCKET}/store-{next(_numbers)}/run")
