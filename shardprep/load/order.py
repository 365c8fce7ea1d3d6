"""The order of an epoch, the segments, and each rank's share: pure functions of their arguments.

An epoch's order is a keyed bijection of range(n), so no permutation is stored and any position
is reached at once. Nothing here depends on the world size but `rank_slice`, which cuts a global
batch into the ranks' parts.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Indices = NDArray[np.int64]
_U32 = NDArray[np.uint32]
_U64 = NDArray[np.uint64]

_ROUNDS = 6
# Smaller networks have too few functions to choose from to be uniform.
_FEWEST_BITS = 4
_GOLDEN = 0x9E3779B97F4A7C15
_MASK = (1 << 64) - 1
# Streams of random numbers that must not be correlated with one another.
_ORDER, _CROP = 1, 2


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
    """A 64-bit key from integers, e.g. (seed, epoch); different parts give unrelated keys."""
    key = 0
    for part in parts:
        word = np.array([(key ^ (part & _MASK)) + _GOLDEN & _MASK], np.uint64)
        key = int(mix64(word)[0])
    return key


class Permutation:
    """A keyed bijection of range(n): a Feistel network with cycle walking.

    The network permutes the next power of two, in two parts of (nearly) as many bits; values
    beyond n are sent through again until they fall below n (Black and Rogaway 2002, "Ciphers with
    arbitrary finite domains"), which takes under two passes on average.

    Args:
        n: Size of the range, from 1 to 2**63; or as many sizes (B,), for a bijection of its own
            for each position that is asked for.
        key: 64-bit key, see `derive_key`; or a uint64 array (B,) likewise.
        largest: With many sizes: one that none exceeds. It decides the images too.
    """

    def __init__(self, n: int | Indices, key: int | _U64, largest: int | None = None) -> None:
        largest = int(np.max(n)) if largest is None else largest
        bits = max(_FEWEST_BITS, (largest - 1).bit_length())
        self._n = np.asarray(n, np.uint64)
        self._shift = np.uint64(bits // 2)
        self._low = np.uint32((1 << bits // 2) - 1)
        self._high = np.uint32((1 << bits - bits // 2) - 1)
        keys = np.asarray(key, np.uint64)
        offsets = np.arange(1, _ROUNDS + 1, dtype=np.uint64) * np.uint64(_GOLDEN)
        # (rounds,) for one key, (rounds, B) for many.
        rounds = mix64(np.add.outer(offsets, keys))
        self._keys = (rounds >> np.uint64(32)).astype(np.uint32)

    def __call__(self, positions: Indices) -> Indices:
        """Images of `positions` (B,), each in range(n); distinct positions, distinct images."""
        # From outside the range the walk might never come to an end.
        assert not positions.size or (positions.min() >= 0 and (positions < self._n).all())
        values = self._pass(positions.astype(np.uint64), self._keys)
        outside = np.flatnonzero(values >= self._n)
        while outside.size:
            keys = self._keys if self._keys.ndim == 1 else self._keys[:, outside]
            values[outside] = self._pass(values[outside], keys)
            limits = self._n if self._n.ndim == 0 else self._n[outside]
            outside = outside[values[outside] >= limits]
        return values.astype(np.int64)

    def _pass(self, values: _U64, keys: _U32) -> _U64:
        low = values.astype(np.uint32) & self._low
        high = (values >> self._shift).astype(np.uint32)
        for number in range(0, _ROUNDS, 2):
            low ^= _scramble(high ^ keys[number]) & self._low
            high ^= _scramble(low ^ keys[number + 1]) & self._high
        joined: _U64 = (high.astype(np.uint64) << self._shift) | low
        return joined


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
    indices: Indices, frames: Indices, length: int, *, seed: int, epoch: int
) -> Indices:
    """First frame of each utterance's random segment in an epoch.

    Args:
        indices: Positions in the split (B,).
        frames: Lengths of these utterances in frames (B,).
        length: Frames a segment.
        seed: Seed of the run.
        epoch: Number of the epoch.

    Returns:
        Starts (B,), uniform on 0..frames-length; 0 where the utterance is not longer than that.
    """
    key = np.uint64(derive_key(_CROP, seed, epoch))
    words = mix64((indices.astype(np.uint64) + np.uint64(1)) * np.uint64(_GOLDEN) ^ key)
    choices = np.maximum(frames - length, 0).astype(np.uint64) + np.uint64(1)
    # The high half of a 32 x 32-bit product maps 32 random bits to range(choices).
    starts: Indices = (((words >> np.uint64(32)) * choices) >> np.uint64(32)).astype(np.int64)
    return starts


def rank_slice(count: int, rank: int, world_size: int) -> slice:
    """Rank's part of a global batch of `count` samples.

    Parts are contiguous, differ by at most one sample, and together are the whole batch.
    """
    return slice(rank * count // world_size, (rank + 1) * count // world_size)


def length_batches(frames: Indices, max_frames: int) -> list[Indices]:
    """Batches of utterances of like length under a budget of padded frames.

    Args:
        frames: Length of every utterance of the split (N,).
        max_frames: Most frames a batch may have once padded to its longest utterance; an
            utterance longer than that travels alone.

    Returns:
        Index arrays that partition range(N), longest utterances first, so that memory peaks at
        the start and not at the end of an evaluation.
    """
    order = np.argsort(-frames, kind="stable")
    batches, at = [], 0
    while at < len(order):
        size = max(1, max_frames // max(1, int(frames[order[at]])))
        batches.append(order[at : at + size])
        at += size
    return batches
