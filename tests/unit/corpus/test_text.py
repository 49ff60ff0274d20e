import hashlib

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from hncse_ray.corpus import normalise, row_hash


def test_white_space_and_nfc():
    assert normalise("  a\t b\u00a0\u2003c\r\n") == "a b c"
    assert normalise("cafe\u0301") == "caf\u00e9"


def test_a_row_hash_is_fixed_for_all_time_and_of_the_tokens_alone():
    ids = [101, 2**31 - 1, 0]
    bytes_ = b"".join(i.to_bytes(4, "little") for i in ids)
    expected = int.from_bytes(hashlib.blake2b(bytes_).digest()[:8], "little", signed=True)
    assert row_hash(np.array(ids, np.int32)) == row_hash(np.array([9, *ids], np.int32)[1:]) == expected
    assert row_hash(np.array(ids[:2], np.int32)) != expected


@given(st.text())
def test_normalise_is_idempotent(text):
    assert normalise(normalise(text)) == normalise(text)
