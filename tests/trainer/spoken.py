"""Invented recordings, and how short models of tests cut them."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

RATE = 16_000
LONGEST = 300
"""Frames that the model is given at a time; recordings are cut that short only in tests."""


def voice(seconds: float, seed: int, rate: int = RATE) -> NDArray[np.float32]:
    """Harmonics of a pitch of the seed that rise and fall, in noise."""
    rng = np.random.default_rng(seed)
    time = np.arange(int(seconds * rate)) / rate
    pitch = rng.uniform(90, 220)
    wave = sum(np.sin(2 * np.pi * n * pitch * time) / n for n in range(1, 8))
    wave = wave * (1.2 + np.sin(2 * np.pi * 3 * time)) + rng.normal(0, 0.1, len(time))
    return np.asarray(wave / np.abs(wave).max() / 2, np.float32)
