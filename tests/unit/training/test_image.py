"""Files of tensors laid out in memory that is kept: what the format's own library writes, past the cache."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from hncse_ray.errors import StorageError
from hncse_ray.training.checkpoint import file_facts
from hncse_ray.training.host_copy import HostCopier
from hncse_ray.training.image import FileImage


def tensors(rows: int, *, value: float = 0.0) -> dict[str, torch.Tensor]:
    """Of several widths, one of them no whole number of blocks, one empty, one without dimensions, one transposed."""
    draw = torch.Generator().manual_seed(rows)
    return {
        "weight.ä": torch.randn(rows, 33, generator=draw) + value,
        "moment": torch.randn(33, rows, generator=draw).t(),
        "ids": torch.arange(rows),
        "half": torch.randn(7, generator=draw).bfloat16(),
        "flags": torch.tensor([True, False, True]),
        "step": torch.tensor(value),
        "nothing": torch.empty(0, 4),
    }


@pytest.mark.parametrize("rows", [3, 40_000])  # below and above what goes past the cache
def test_a_file_is_what_the_library_writes(tmp_path: Path, rows: int) -> None:
    image, given = FileImage(), tensors(rows)
    for number in range(2):  # in fresh memory, and in that of a larger file
        image.fill(tensors(2 * rows, value=1.0))
        image.fill(given)
        facts = image.write(tmp_path / f"{number}.safetensors")
        assert facts == file_facts(tmp_path / f"{number}.safetensors")
    save_file({name: value.contiguous() for name, value in given.items()}, tmp_path / "expected.safetensors")
    expected = (tmp_path / "expected.safetensors").read_bytes()
    assert (tmp_path / "0.safetensors").read_bytes() == (tmp_path / "1.safetensors").read_bytes() == expected


def test_copies_over_one_another_use_the_same_memory_and_others_do_not(tmp_path: Path) -> None:
    copier = HostCopier(torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))]))
    first, own = copier.copy(tensors(40_000), over="moments"), copier.copy(tensors(40_000))
    addresses = [copy.wait()["weight.ä"].data_ptr() for copy in (first, own)]
    first.image.write(tmp_path / "first")
    second = copier.copy(tensors(40_000, value=1.0), over="moments")
    assert second.wait()["weight.ä"].data_ptr() == addresses[0] != addresses[1]
    second.image.write(tmp_path / "second")
    for found, value in (
        (load_file(tmp_path / "first"), 0.0),
        (own.wait(), 0.0),
        (load_file(tmp_path / "second"), 1.0),
    ):
        expected = tensors(40_000, value=value)
        assert found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in expected)


def test_what_the_format_has_no_place_for_is_named() -> None:
    with pytest.raises(StorageError, match="odd .*complex128"):
        FileImage().fill({"odd": torch.zeros(2, dtype=torch.complex128)})
