"""The order of an epoch, the segments, and each rank's share: pure functions of their arguments.

An epoch's order is a keyed bijection of range(n): no permutation is stored, and any position can
be computed alone. Only `rank_slice`, which divides a global batch among the ranks, depends on the
world size.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

Indices = NDArray[np.int64]
# Maps positions of an epoch (B,) to indices (B,).
EpochOrder = Callable[[Indices], Indices]
_U32 = NDArray[np.uint32]
_U64 = NDArray[np.uint64]

_ROUNDS = 6
# Of fewer bits there are too few functions for the permutation to be uniform.
_FEWEST_BITS = 4
_GOLDEN = 0x9E3779B97F4A7C15
_MASK = (1 << 64) - 1
# Streams of random numbers that must not be correlated; `windowed` has 3 to 5, `endless` 6 to 8.
_ORDER, _SEGMENT = 1, 2


def mix64(x: _U64) -> _U64:
    """Finaliser of SplitMix64 (Steele, Lea and Flood 2014): a bijection of 64-bit words.

    Args:
        x: Words, any shape; not modified.

    Returns:
        Words of the same shape in which every input bit reaches every output bit.
    """
    x = x ^ (x >> np.uint64(30))
    x *= np.uint64(0xBF58476D1CE4E5B9)
    x ^= x >> np.uint64(27)
    x *= np.uint64(0x94D049BB133111EB)
    x ^= x >> np.uint64(31)
    return x


def derive_key(*parts: int) -> int:
    """A 64-bit key from integers such as (seed, epoch); different integers give unrelated keys."""
    key = 0
    for part in parts:
        word = np.array([(key ^ (part & _MASK)) + _GOLDEN & _MASK], np.uint64)
        key = int(mix64(word)[0])
    return key


def derive_keys(keys: int | _U64, parts: Indices) -> _U64:
    """Keys from a key, or from one key each, and one more integer each: (B,) uint64.

    What `derive_key(..., part)` gives, if `derive_key(...)` gave the key.
    """
    words = (np.asarray(keys, np.uint64) ^ parts.astype(np.uint64)) + np.uint64(_GOLDEN)
    return mix64(words)


class _Network(NamedTuple):
    """Feistel networks with cycle walking: bijections of range(n) for every size n.

    A network permutes range(rows * 2**shift), of which range(n) is nearly all. A value has two
    parts of (nearly) equally many bits, its row and its low bits. Each changes in turn, by a number
    that depends on the other. A value that is not below n goes through the network again until it
    is (Black and Rogaway 2002, "Ciphers with arbitrary finite domains").

    Each field is for one network, or for one network each of B values.
    """

    n: NDArray[Any]
    shift: NDArray[Any]
    rows: _U64
    keys: _U32
    """A key a round: (rounds,) or (rounds, B)."""

    @classmethod
    def make(cls, n: NDArray[Any], largest: NDArray[Any], keys: _U64) -> _Network:
        """Networks of sizes that do not exceed `largest`; scalars, or one each."""
        # frexp counts bits; where rounding adds one, that does no harm.
        bits = np.maximum(np.frexp(largest - 1.0)[1], _FEWEST_BITS)
        shift = np.asarray(bits // 2, np.uint64)
        rows = np.maximum(-(-largest >> shift.astype(np.int64)), 1 << _FEWEST_BITS // 2)
        offsets = np.arange(1, _ROUNDS + 1, dtype=np.uint64) * np.uint64(_GOLDEN)
        found = mix64(np.add.outer(offsets, keys))
        return cls(
            n.astype(np.uint64),
            shift,
            np.asarray(rows, np.uint64),
            (found >> np.uint64(32)).astype(np.uint32),
        )

    def of(self, which: Indices) -> _Network:
        """The networks of some values (B,); a field for all values stays as it is."""
        keys = np.take(self.keys, which, axis=1) if self.keys.ndim == 2 else self.keys
        n, shift, rows = (np.take(x, which) if x.ndim else x for x in self[:3])
        return _Network(n, shift, rows, keys)

    def __call__(self, positions: Indices) -> Indices:
        """Images of `positions` (B,), each in range(n)."""
        # For a position outside the range, the loop might never end.
        assert not positions.size or (positions.min() >= 0 and (positions < self.n).all())
        values = self._pass(positions.astype(np.uint64))
        outside = np.flatnonzero(values >= self.n)
        while outside.size:
            again = self.of(outside)
            found = again._pass(values[outside])
            values[outside] = found
            outside = outside[found >= again.n]
        return values.astype(np.int64)

    def _pass(self, values: _U64) -> _U64:
        mask = np.asarray((np.uint64(1) << self.shift) - np.uint64(1), np.uint32)
        rows = np.asarray(self.rows, np.uint32)
        low = values.astype(np.uint32) & mask
        row = (values >> self.shift).astype(np.uint32)
        for number in range(0, _ROUNDS, 2):
            low ^= _scramble(row ^ self.keys[number]) & mask
            # The high half of a product maps 32 bits to range(rows).
            words = _scramble(low ^ self.keys[number + 1]).astype(np.uint64)
            words *= self.rows
            words >>= np.uint64(32)
            row += words.astype(np.uint32)
            # Modulo: a row below `rows` wraps around to a large number here.
            np.minimum(row, row - rows, out=row)
        joined: _U64 = (row.astype(np.uint64) << self.shift) | low
        return joined


class Permutation:
    """A keyed bijection of range(n), of which no image is stored.

    Args:
        n: Size of the range, from 1 to 2**62; or an array of sizes (B,), with one bijection for
            each of B positions.
        key: 64-bit key, see `derive_key`; or a uint64 array of keys (B,).
        largest: With an array of sizes: a number that no size exceeds. It decides the images too.
    """

    def __init__(self, n: int | Indices, key: int | _U64, largest: int | None = None) -> None:
        most = np.asarray(np.max(n) if largest is None else largest, np.int64)
        self._network = _Network.make(np.asarray(n), most, np.asarray(key, np.uint64))

    def __call__(self, positions: Indices) -> Indices:
        """Images of `positions` (B,), each in range(n); distinct positions, distinct images."""
        return self._network(positions)


class Permutations:
    """Keyed bijections, one of range(n) for each of some sizes n.

    Args:
        sizes: Size of each range (K,), or one for all.
        keys: Key of each bijection (K,), see `derive_keys`.
    """

    def __init__(self, sizes: int | Indices, keys: _U64) -> None:
        n = np.asarray(sizes, np.int64)
        self._network = _Network.make(n, n, keys)

    def __call__(self, which: Indices, positions: Indices) -> Indices:
        """Images of `positions` (B,), each by the bijection of its number in `which` (B,)."""
        network = self._network
        return network.of(np.asarray(0) if network.keys.shape[1] == 1 else which)(positions)


def _scramble(x: _U32) -> _U32:
    """Finaliser of MurmurHash3 for 32-bit words (Appleby 2011); works in place."""
    x ^= x >> np.uint32(16)
    x *= np.uint32(0x85EBCA6B)
    x ^= x >> np.uint32(13)
    x *= np.uint32(0xC2B2AE35)
    x ^= x >> np.uint32(16)
    return x


def epoch_order(n: int, seed: int, epoch: int) -> Permutation:
    """The shuffled order of an epoch: maps position to index, both in range(n)."""
    return Permutation(n, derive_key(_ORDER, seed, epoch))


def segment_starts(
    indices: Indices, frames: Indices, length: int, *, seed: int, epoch: int | Indices
) -> Indices:
    """First frame of each utterance's random segment in an epoch.

    Args:
        indices: Positions in the split (B,).
        frames: Lengths of these utterances in frames (B,).
        length: Frames a segment.
        seed: Seed of the run.
        epoch: Number of the epoch; or one for each utterance (B,).

    Returns:
        Starts (B,), uniform on 0..frames-length; 0 if the utterance is not longer than a segment.
    """
    key = derive_keys(derive_key(_SEGMENT, seed), np.atleast_1d(epoch))
    words = mix64((indices.astype(np.uint64) + np.uint64(1)) * np.uint64(_GOLDEN) ^ key)
    choices = np.maximum(frames - length, 0).astype(np.uint64) + np.uint64(1)
    # The high half of a 32 x 32-bit product maps 32 random bits to range(choices).
    starts: Indices = (((words >> np.uint64(32)) * choices) >> np.uint64(32)).astype(np.int64)
    return starts


def rank_slice(count: int, rank: int, world_size: int) -> slice:
    """A rank's part of a global batch of `count` utterances.

    Parts are contiguous, differ by at most one utterance in size, and together are the batch.
    """
    return slice(rank * count // world_size, (rank + 1) * count // world_size)


def length_batches(frames: Indices, max_frames: int) -> list[Indices]:
    """Batches of utterances of similar length, within a budget of padded frames.

    Args:
        frames: Length of every utterance of the split (N,).
        max_frames: Most frames of a batch, padded to its longest utterance; a longer utterance
            is a batch of its own.

    Returns:
        Index arrays that partition range(N), longest utterances first: if memory does not
        suffice, an evaluation fails at its start and not at its end.
    """
    order = np.argsort(-frames, kind="stable")
    batches, at = [], 0
    while at < len(order):
        size = max(1, max_frames // max(1, int(frames[order[at]])))
        batches.append(order[at : at + size])
        at += size
    return batches
