"""Which answers of the nodes let a run begin in a folder."""

from __future__ import annotations

import pytest

from hncse_ray.cluster.visible import explain


def test_a_folder_that_all_see_is_good() -> None:
    assert explain("/mnt/runs", {"a": "token", "b": "token"}, "token") is None


@pytest.mark.parametrize(
    ("seen", "said"),
    [
        ({"a": "token", "b": ""}, "is not seen by 1 of 3 nodes: b"),
        ({"a": "another", "b": ""}, "is not seen by 2 of 3 nodes: a, b"),
        ({"a": None, "b": "token"}, "cannot be looked for on a"),
        ({f"n{i}": "" for i in range(9)}, "9 of 10 nodes: n0, n1, n2, n3, n4 and 4 more"),
    ],
)
def test_the_nodes_that_do_not_are_named_with_the_remedy(seen: dict[str, str | None], said: str) -> None:
    error = explain("/local/runs", seen, "token")
    assert error is not None and said in str(error)
    assert "/local/runs" in str(error) and "a mount" in error.hint and "s3://" in error.hint
