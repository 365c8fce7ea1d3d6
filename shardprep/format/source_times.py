"""source-times.npy: what the files of the data set looked like when a set was built from them.

It is no part of the set, and no fingerprint covers it: equal data sets give equal sets, whenever
they were copied.
"""

from __future__ import annotations

import hashlib
import io
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

# Numbers before those of the utterances: the source fingerprint, and the SHA-256 of all others.
_OWN = 8


def encode_times(fingerprint: str, versions: Sequence[int] | NDArray[np.uint64]) -> bytes:
    """The bytes of the file.

    Args:
        fingerprint: The source fingerprint of the set, hex digits.
        versions: For each key of the set (N,), in the order of the keys, a number that changes when
            the file does; 0 where this is unknown.
    """
    owner, numbers = bytes.fromhex(fingerprint), np.array(versions, "<u8").tobytes()
    digest = hashlib.sha256(owner + numbers).digest()
    buffer = io.BytesIO()
    np.save(buffer, np.frombuffer(owner + digest + numbers, "<u8"), allow_pickle=False)
    return buffer.getvalue()


def times_size(count: int) -> int:
    """Size of the file for `count` keys, in bytes."""
    return len(encode_times("0" * 64, [0])) + 8 * (count - 1)


def decode_times(data: bytes, fingerprint: str, count: int) -> NDArray[np.uint64]:
    """The numbers (N,) of the `count` keys of a set.

    Args:
        data: The bytes of the file, which may be damaged, foreign or of another set.
        fingerprint: The source fingerprint of the set.
        count: Number of keys N, at least one.

    Returns:
        The numbers; zeros if the file is not that of this set.
    """
    numbers = np.frombuffer(data[-8 * count :], "<u8") if len(data) == times_size(count) else None
    # All but the numbers follows from them: nothing in a foreign file is interpreted.
    if numbers is None or encode_times(fingerprint, numbers) != data:
        return np.zeros(count, "<u8")
    return numbers


def is_damaged(data: bytes) -> bool:
    """Whether a file is not what a build writes, for any data set."""
    count = (len(data) - times_size(0)) // 8
    if count < 1:
        return True
    begin = len(data) - 8 * (count + _OWN)
    owner = data[begin : begin + 32].hex()
    return encode_times(owner, np.frombuffer(data[-8 * count :], "<u8")) != data
