"""source-times.npy is an ordinary array that is taken only for the set that it belongs to."""

from __future__ import annotations

import hashlib
import io

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from shardprep.format.source_times import decode_times, encode_times, is_damaged, times_size

NUMBERS = st.lists(st.integers(0, 2**64 - 1), min_size=1)
OWNER, OTHER = "0123456789abcdef" * 4, "f" * 64


@given(NUMBERS)
def test_numbers_come_back(numbers: list[int]) -> None:
    data = encode_times(OWNER, numbers)
    assert decode_times(data, OWNER, len(numbers)).tolist() == numbers
    # As FORMAT.md says it.
    array = np.load(io.BytesIO(data), allow_pickle=False)
    assert array.dtype == "<u8"
    assert array[:4].tobytes().hex() == OWNER
    assert array[8:].tolist() == numbers
    rest = array[:4].tobytes() + array[8:].tobytes()
    assert array[4:8].tobytes() == hashlib.sha256(rest).digest()
    assert len(data) == times_size(len(numbers))
    assert not is_damaged(data)


@given(NUMBERS, st.binary(max_size=400), st.integers(1, 9))
def test_a_file_of_another_set_or_of_nonsense_says_nothing(
    numbers: list[int], nonsense: bytes, more: int
) -> None:
    data = encode_times(OWNER, numbers)
    for other in (nonsense, data[:-1], data + b"x", b"", encode_times(OTHER, numbers)):
        assert not decode_times(other, OWNER, len(numbers)).any()
    assert decode_times(data, OWNER, len(numbers) + more).tolist() == [0] * (len(numbers) + more)


@given(NUMBERS, st.data())
def test_every_flipped_bit_and_every_cut_is_damage(numbers: list[int], draw: st.DataObject) -> None:
    data = encode_times(OWNER, numbers)
    hurt, bit = bytearray(data), draw.draw(st.integers(0, 8 * len(data) - 1))
    hurt[bit // 8] ^= 1 << bit % 8
    assert is_damaged(bytes(hurt))
    assert not decode_times(bytes(hurt), OWNER, len(numbers)).any()
    assert is_damaged(data[: draw.draw(st.integers(0, len(data) - 1))])


@given(st.binary(max_size=400))
def test_nonsense_is_damage(data: bytes) -> None:
    assert is_damaged(data)
