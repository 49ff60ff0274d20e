"""What a worker makes sure of before it trains."""

from __future__ import annotations

import shutil
import socket
from pathlib import Path

import pytest

from hncse_ray.cluster.worker import check_mark, mark_folder
from hncse_ray.errors import StorageError


def test_a_worker_that_does_not_see_the_folder_of_the_run_is_refused_with_the_remedy(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    mark = mark_folder(tmp_path / "run")
    check_mark(tmp_path / "run", mark)
    for other in ("none", "another"):  # no such folder, and one of an earlier run at this path of another disk
        if other == "another":
            shutil.copytree(tmp_path / "run", tmp_path / other)
            mark = mark_folder(tmp_path / "run")
        with pytest.raises(StorageError, match=f"is not seen by node {socket.gethostname()}") as caught:
            check_mark(tmp_path / other, mark)
        assert str(tmp_path / other) in str(caught.value) and "a mount" in caught.value.hint
        assert "s3://" in caught.value.hint
