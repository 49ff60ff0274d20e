"""Each test of this room runs on a folder by its URL and, where a server can be had, on S3."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path

import pytest
from s3 import BUCKET, s3_server

from hncse_ray.storage import Remote

_numbers = itertools.count()


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with s3_server(tmp_path_factory.mktemp("s3")):
        yield


@pytest.fixture(params=["file", "s3"])
def remote(request: pytest.FixtureRequest, tmp_path: Path) -> Remote:
    if request.param == "file":
        return Remote(f"file://{tmp_path}/store/run")
    request.getfixturevalue("server")
    return Remote(f"s3://{BUCKET}/store-{next(_numbers)}/run")
