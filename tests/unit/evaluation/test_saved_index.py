"""Several searches at once keep the same index."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from hncse_ray.evaluation.saved_index import SavedIndex, read_index

VECTORS = np.eye(2, dtype=np.float32)


def test_two_that_write_at_once_take_turns(tmp_path: Path) -> None:
    """The second begins while the first is at work, and would clear away what that has written so far."""
    folder, made_of = tmp_path / "index", {"model": "a"}
    second = threading.Thread(target=SavedIndex(["c", "d"], VECTORS).write, args=(folder, made_of))

    class Texts(list[str]):
        def __iter__(self) -> Iterator[str]:
            if not second.ident:
                second.start()
                second.join(timeout=1)
            return super().__iter__()

    SavedIndex(Texts(["a", "b"]), VECTORS).write(folder, made_of)
    second.join()
    found = read_index(folder, made_of)
    assert found is not None and found.texts == ["c", "d"]
    assert sorted(path.name for path in tmp_path.iterdir()) == [".index.lock", "index"]
