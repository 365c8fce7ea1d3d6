"""From samples to log-mels, as a stream: the result does not depend on how it was cut.

Everything is float64: a bin may lie 80 dB below the loudest of its frame, where a transform in
float32 has no digits left. Sums are added in an order that no number of threads changes.
"""

from __future__ import annotations

import functools
import math

import numpy as np
from numpy.typing import NDArray

from shardprep.audio.recipe import FeatureRecipe

Samples = NDArray[np.float32]
Mel = NDArray[np.float32]

# Frames that are transformed at a time: their spectra fit into the cache.
_BLOCK = 64


class MelStream:
    """Computes the frames of samples that come block by block.

    Frame t is centred on sample t * hop_length; beyond both ends the samples are reflected.

    Args:
        recipe: The recipe.
        gain: Samples are multiplied by it, in float64.
    """

    def __init__(self, recipe: FeatureRecipe, gain: float = 1.0) -> None:
        self._recipe = recipe
        window, *_ = self._tables = _tables(recipe)
        self._window = window * gain
        self._half = recipe.n_fft // 2
        # Samples that later frames need; before the first frame, all samples.
        self._rest: Samples = np.zeros(0, np.float32)
        self._skip = 0
        self._begun = False
        self._count = 0

    def push(self, samples: Samples) -> Mel:
        """The frames (T, F) that these samples (N,) complete."""
        self._count += len(samples)
        self._rest = np.concatenate((self._rest, samples)) if len(self._rest) else samples
        if not self._begun:
            if len(self._rest) <= self._half:
                return self._none()
            self._rest = np.concatenate((self._rest[self._half : 0 : -1], self._rest))
            self._begun = True
        return self._take()

    def end(self) -> Mel:
        """The last frames.

        Raises:
            ValueError: There were too few samples for a single frame.
        """
        if not self._begun:
            least = self._half + 1
            raise ValueError(f"has {self._count} samples, too few for a frame ({least} are needed)")
        last = self._rest[-2 : -self._half - 2 : -1]
        self._rest = np.concatenate((self._rest, last))
        return self._take()

    def _take(self) -> Mel:
        """The frames that are complete; the rest then begins where the next frame does."""
        hop, size = self._recipe.hop_length, self._recipe.n_fft
        count = (len(self._rest) - size - self._skip) // hop + 1
        if count < 1:
            return self._none()
        begin = self._skip
        windows = np.lib.stride_tricks.sliding_window_view(self._rest, size)[begin::hop][:count]
        mel = np.empty((count, self._recipe.n_mels), np.float32)
        for at in range(0, count, _BLOCK):
            mel[at : at + _BLOCK] = self._transform(windows[at : at + _BLOCK])
        # What a reflection at the end needs stays, too.
        following = begin + count * hop
        kept = min(following, len(self._rest) - self._half - 1)
        self._rest, self._skip = self._rest[kept:], following - kept
        return mel

    def _transform(self, windows: NDArray[np.float32]) -> NDArray[np.float64]:
        _, columns, weights, begins, empty = self._tables
        spectrum = np.fft.rfft(windows * self._window)  # (B, n_fft) -> (B, K), float64
        values = spectrum.real**2 + spectrum.imag**2
        if self._recipe.power == 1.0:
            np.sqrt(values, out=values)
        # Transposed, so that sums run over whole rows.
        weighted = values.T[columns] * weights  # (W, B)
        mel = np.add.reduceat(weighted, begins, axis=0)  # (F, B)
        mel[empty] = 0
        return np.log(np.maximum(mel, self._recipe.log_floor)).T

    def _none(self) -> Mel:
        return np.zeros((0, self._recipe.n_mels), np.float32)


def log_mel(samples: NDArray[np.floating], recipe: FeatureRecipe) -> Mel:
    """The log-mels of samples at the recipe's rate; nothing else is done to the samples.

    Args:
        samples: (N,), full scale is 1.
        recipe: The recipe; of it, the transform.

    Returns:
        (T, F) float32 with T = N // hop_length + 1.

    Raises:
        ValueError: There are too few samples for a frame.
    """
    stream = MelStream(recipe)
    frames = stream.push(np.ascontiguousarray(samples, np.float32))
    return np.concatenate((frames, stream.end()))


def filterbank(recipe: FeatureRecipe) -> NDArray[np.float64]:
    """The triangles (F, K) over the K = n_fft // 2 + 1 frequencies."""
    edges = _edges(recipe)
    frequencies = np.linspace(0, recipe.sample_rate / 2, recipe.n_fft // 2 + 1)
    rising = (frequencies - edges[:-2, None]) / np.diff(edges)[:-1, None]
    falling = (edges[2:, None] - frequencies) / np.diff(edges)[1:, None]
    bank = np.maximum(0, np.minimum(rising, falling))
    if recipe.norm == "slaney":
        bank *= (2 / (edges[2:] - edges[:-2]))[:, None]
    return bank


def empty_bins(recipe: FeatureRecipe) -> int:
    """How many mel bins are so narrow that they hold no frequency: their values are constant."""
    return len(_tables(recipe)[-1])


def _edges(recipe: FeatureRecipe) -> NDArray[np.float64]:
    """Frequencies (F + 2,) at which triangles begin, peak and end [Hz]."""
    to_mel, to_hz = _SCALES[recipe.mel_scale]
    mels = np.linspace(to_mel(recipe.f_min), to_mel(recipe.f_max), recipe.n_mels + 2)
    return np.array([to_hz(float(mel)) for mel in mels])


def _htk_mel(hz: float) -> float:
    return 2595.0 * math.log10(1 + hz / 700)


def _htk_hz(mel: float) -> float:
    return 700.0 * (10 ** (mel / 2595) - 1)


# Slaney's scale (Auditory Toolbox, 1998): 3 mels in 200 Hz up to 1,000 Hz, logarithmic above.
_LINEAR, _BREAK, _LOG = 200 / 3, 1000.0, math.log(6.4) / 27


def _slaney_mel(hz: float) -> float:
    return hz / _LINEAR if hz < _BREAK else _BREAK / _LINEAR + math.log(hz / _BREAK) / _LOG


def _slaney_hz(mel: float) -> float:
    above = mel - _BREAK / _LINEAR
    return mel * _LINEAR if above < 0 else _BREAK * math.exp(above * _LOG)


_SCALES = {"htk": (_htk_mel, _htk_hz), "slaney": (_slaney_mel, _slaney_hz)}

_Tables = tuple[
    NDArray[np.float64],
    NDArray[np.int64],
    NDArray[np.float64],
    NDArray[np.int64],
    NDArray[np.int64],
]


@functools.lru_cache(maxsize=8)
def _tables(recipe: FeatureRecipe) -> _Tables:
    """Window (n_fft,); columns and weights of all triangles; where each begins; empty ones.

    A triangle that is narrower than the distance of two frequencies may hold none of them.
    """
    hann = 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(recipe.win_length) / recipe.win_length)
    window = np.zeros(recipe.n_fft)
    left = (recipe.n_fft - recipe.win_length) // 2
    window[left : left + recipe.win_length] = hann
    bank = filterbank(recipe)
    empty = np.flatnonzero(~bank.any(axis=1))
    columns = [np.flatnonzero(row) if row.any() else np.zeros(1, np.int64) for row in bank]
    weights = np.concatenate([row[own] for row, own in zip(bank, columns, strict=True)])
    begins = np.cumsum([0, *map(len, columns[:-1])])
    return window, np.concatenate(columns), weights[:, None], begins, empty
