"""The encoder contract: distinct sentences once, rows in order, unit-norm where asked for, everything else an error."""

import logging

import numpy as np
import pytest

from hncse_ray.errors import DataError
from hncse_ray.evaluation import encode_checked, encode_unit


def test_each_distinct_sentence_is_encoded_once_and_rows_follow_the_texts() -> None:
    calls = []

    def encode(texts):
        calls.append(texts)
        return np.array([[len(text), 1.0] for text in texts])

    texts, own = ["bb", "a", "bb", "ccc", "a"], np.array([[2, 1], [1, 1], [2, 1], [3, 1], [1, 1]])
    np.testing.assert_array_equal(encode_checked(encode, texts), own)
    assert calls == [["bb", "a", "ccc"]]
    np.testing.assert_allclose(encode_unit(encode, texts), own / np.sqrt([[5], [2], [5], [10], [2]]))


@pytest.mark.parametrize(
    ("returned", "expected"),
    [(np.float64, np.float64), (np.float32, np.float32), (np.float16, np.float32), (np.int64, np.float32)],
)
def test_precision(returned: type, expected: type) -> None:
    rows = encode_unit(lambda texts: np.array([[3, 4]] * len(texts), dtype=returned), ["a", "b"])
    assert rows.dtype == expected
    np.testing.assert_allclose(rows, [[0.6, 0.8]] * 2, rtol=1e-6)


@pytest.mark.parametrize("scale", [1e-30, 1e-42, 1.0, 1e30])
def test_extreme_norms_neither_overflow_nor_vanish(scale: float) -> None:
    rows = encode_unit(lambda texts: np.full((len(texts), 4), scale, dtype=np.float32), ["a"])
    np.testing.assert_allclose(rows, [[0.5] * 4], rtol=1e-5)


def test_the_encoders_array_is_left_alone() -> None:
    array = np.full((1, 4), 2.0)
    array.setflags(write=False)
    encode_unit(lambda _: array, ["a"])
    assert (array == 2.0).all()


def test_a_list_of_lists_will_do() -> None:
    np.testing.assert_allclose(encode_checked(lambda _: [[0.0, 2.0]], ["a"]), [[0.0, 2.0]])


@pytest.mark.parametrize(
    ("returned", "message"),
    [
        (np.ones((2, 3)), r"shape \[2, 3\] for 3 sentences"),
        (np.ones(3), r"shape \[3\]"),
        (np.ones((3, 1, 2)), r"shape \[3, 1, 2\]"),
        (np.ones((3, 0)), r"shape \[3, 0\]"),
        (None, r"shape \[\]"),
        ([[1.0], [1.0, 2.0], [1.0]], "list that is not an array"),
        (np.array([["a"], ["b"], ["c"]]), "values of type <U1"),
        (np.ones((3, 2), dtype=complex), "values of type complex128"),
        (np.array([[1.0, 1], [np.nan, 1], [np.inf, 1]]), "NaN or infinity for 2 of 3 .* 'second'"),
        (np.zeros((3, 2)), "zeros only"),
    ],
)
def test_what_the_encoder_may_not_return(returned: object, message: str) -> None:
    with pytest.raises(DataError, match=message):
        encode_checked(lambda _: returned, ["first", "second", "third"])  # type: ignore[arg-type,return-value]


def test_no_texts() -> None:
    with pytest.raises(DataError, match="no text"):
        encode_checked(lambda texts: np.ones((len(texts), 2)), [])


def test_a_zero_row_stays_zero_and_is_told(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        rows = encode_unit(lambda _: np.array([[0.0, 2.0], [0.0, 0.0]]), ["known", "unknown words"])
    np.testing.assert_array_equal(rows, [[0, 1], [0, 0]])
    assert "a zero vector for 1 of 2 sentences, e.g. 'unknown words'" in caplog.text
