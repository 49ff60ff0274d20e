"""The cosines of positives and negatives, as text and as a picture."""

from __future__ import annotations

import struct
from pathlib import Path

import pytest

from hncse_ray.errors import StorageError
from hncse_ray.reporting.similarity import Similarities, plot_similarities, similarity_lines

FOUND = Similarities(
    bins=[-1, -0.6, -0.2, 0.2, 0.6, 1], positive=[0, 0, 0, 10, 80], negative=[0, 1, 400, 200, 0]
)  # fmt: skip


def test_lines_show_each_on_its_own_scale_from_the_first_to_the_last_pair() -> None:
    positives, negatives, axis = similarity_lines(FOUND)
    assert positives.startswith("positives    ▁█") and positives.endswith("90 pairs")
    assert negatives.startswith("negatives  ▁█▄ ") and negatives.endswith("601 pairs")
    assert axis.split() == ["cosine", "-0.60", "1.00"]


def test_a_bin_that_holds_a_single_pair_shows() -> None:
    found = Similarities([-1, 0, 1], [1, 100_000], [0, 0])
    assert similarity_lines(found)[0].startswith("positives  ▁█")
    assert similarity_lines(Similarities([-1, 0, 1], [0, 0], [0, 0])) == ["no pairs"]


@pytest.mark.parametrize("models", [1, 3])
def test_the_picture_has_a_panel_a_model(tmp_path: Path, models: int) -> None:
    path = tmp_path / "similarity.png"
    plot_similarities(path, {f"model_{i} $x_": FOUND for i in range(models)})
    content = path.read_bytes()
    assert content.startswith(b"\x89PNG") and [p.name for p in tmp_path.iterdir()] == ["similarity.png"]
    width, height = struct.unpack(">II", content[16:24])
    assert width == 840 and height == pytest.approx(120 * (0.6 + 2.2 * models), abs=1)


def test_a_picture_that_cannot_be_written(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match="cannot be written"):
        plot_similarities(tmp_path / "none" / "x.png", {"a": FOUND})
