"""How errors are worded."""

import pytest

from hncse_ray.errors import first_line


@pytest.mark.parametrize(
    ("said", "told"),
    [("no such key", "ValueError: no such key"), ("\n  One. Two.\nMore", "ValueError: One. Two"), ("", "ValueError")],
)
def test_an_error_of_other_code_is_told_in_one_line(said: str, told: str) -> None:
    assert first_line(ValueError(said)) == told
