from hypothesis import given
from hypothesis import strategies as st

from hncse_ray.corpus import content_hash, normalise

HELLO = -1410706843886609406  # int.from_bytes(blake2b(b'hello world')[:8], 'little', signed)


def test_white_space_and_nfc():
    assert normalise("  a\t b\u00a0\u2003c\r\n") == "a b c"
    assert normalise("cafe\u0301") == "caf\u00e9"


def test_hash_is_fixed_for_all_time_and_of_the_normalised_text():
    assert content_hash("cafe\u0301  au lait ") == content_hash("caf\u00e9 au lait")
    assert content_hash("a b") != content_hash("a c")
    assert content_hash("hello world") == HELLO


@given(st.text())
def test_normalise_is_idempotent_and_hash_fits_int64(text):
    assert normalise(normalise(text)) == normalise(text)
    assert -(2**63) <= content_hash(text) < 2**63
