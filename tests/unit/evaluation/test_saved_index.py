"""An index is kept whole, and shows each document once."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from hncse_ray.evaluation.saved_index import Hit, SavedIndex, read_index

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


def test_of_a_document_the_best_passage_is_found_and_the_others_before_the_next_document_are_counted(
    tmp_path: Path,
) -> None:
    cosines = [0.1, 0.9, 0.8, 0.7, 0.6, 0.5]
    vectors_ND = np.array([[c, (1 - c * c) ** 0.5] for c in cosines], dtype=np.float32)
    SavedIndex(list("abcdef"), vectors_ND, ["x", "x", "y", "x", "z", "y"]).write(tmp_path / "index", {})
    index = read_index(tmp_path / "index", {})
    assert index is not None
    query_QD = np.array([[1, 0]], dtype=np.float32)
    near = pytest.approx
    assert index.nearest(query_QD, 2) == [[Hit("b", near(0.9), "x", 1), Hit("c", near(0.8), "y", 0)]]
    assert [hit.more_passages for hit in index.nearest(query_QD, 9)[0]] == [2, 1, 0]
    plain = SavedIndex(list("abcdef"), vectors_ND).nearest(query_QD, 3)
    assert plain == [[Hit("b", near(0.9), None, 0), Hit("c", near(0.8), None, 0), Hit("d", near(0.7), None, 0)]]
