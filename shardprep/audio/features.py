"""From a recording to its log-mels: decoded, levelled, freed of silence, transformed, rounded."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from shardprep.audio.decode import MOST_HOURS, Samples, check_finite, open_recording, sample_at
from shardprep.audio.mel import MelStream
from shardprep.audio.recipe import LEAST_RATE, MOST_RATE, FeatureRecipe
from shardprep.audio.resample import resample
from shardprep.audio.silence import SilenceRemover
from shardprep.format.manifest import DType
from shardprep.format.quantised import rounded

Audio: TypeAlias = str | os.PathLike[str] | bytes | NDArray[Any]
"""A file, the bytes of one, or samples."""

# Samples of a recording that are kept: a longer one is decoded twice. 32 MiB, 9 minutes at 16 kHz.
_KEPT = 1 << 23
_BLOCK = 1 << 19


def read_audio(
    audio: Audio,
    *,
    sample_rate: int,
    rate: int | None = None,
    start: float | None = None,
    end: float | None = None,
) -> Samples:
    """The samples of a recording, at the rate that is wanted; all of them are kept in memory.

    Args:
        audio: A file, its bytes, or samples; see `audio_features`.
        sample_rate: The rate that is wanted [Hz].
        rate: Of samples, their rate [Hz].
        start: Where to begin [s]; None for the beginning.
        end: Where to end [s]; None for the end.

    Returns:
        (N,) float32, the mean of the channels, full scale is 1.

    Raises:
        ValueError: The recording cannot be used; says why.
        OSError: There is no such file, or the machine refused.
        MissingExtraError: The extra `audio` is not installed.
    """
    found = list(_blocks(audio, sample_rate, rate, start, end))
    return np.concatenate(found) if found else np.zeros(0, np.float32)


def audio_features(
    audio: Audio,
    recipe: FeatureRecipe,
    *,
    rate: int | None = None,
    start: float | None = None,
    end: float | None = None,
    dtype: DType = "float32",
) -> NDArray[np.floating]:
    """The log-mels of a recording, by a recipe.

    A recording of any length takes little memory beside its log-mels: one of more than 9 minutes
    (at 16 kHz) is decoded twice, and never there as a whole.

    Args:
        audio: A file, the bytes of one, or samples: (N,), or (C, N) for C channels; integers are
            taken for fractions of the largest one of their type.
        recipe: The recipe.
        rate: Of samples, their rate [Hz]; None for the recipe's.
        start: Where to begin [s]; None for the beginning.
        end: Where to end [s]; None for the end.
        dtype: The values are rounded as a shard set of this element type rounds them.

    Returns:
        (T, F) of the type that readers of such a set give: float16, otherwise float32.

    Raises:
        ValueError: The recording cannot be used; says why.
        OSError: There is no such file, or the machine refused.
        MissingExtraError: The extra `audio` is not installed.
    """

    def decode() -> Iterator[Samples]:
        return _blocks(audio, recipe.sample_rate, rate, start, end)

    blocks, peak = _peak(decode)
    gain = 1.0
    if recipe.peak_db is not None:
        if not peak:
            raise ValueError("is silent: every sample is 0")
        gain = 10 ** (recipe.peak_db / 20) / peak
    level = recipe.silence_level or 0.0
    # Samples stay as they were decoded: to multiply them in float32 would add noise, which quiet
    # bins of loud frames show.
    longest = math.floor(round(recipe.silence_seconds * recipe.sample_rate, 6))
    silence = SilenceRemover(level / gain, longest)
    stream, frames = MelStream(recipe, gain), []
    kept = "float16" if dtype == "float16" else "float32"
    for block in blocks:
        frames.append(stream.push(silence.push(block)).astype(kept))
    frames.append(stream.push(silence.end()).astype(kept))
    try:
        frames.append(stream.end().astype(kept))
    except ValueError as error:
        left = f", without its silence (below {level:g} of full scale)" if level else ""
        raise ValueError(f"is too short: it {error}{left}") from None
    mel = np.concatenate(frames)
    # The scale of uint8 is that of the whole matrix.
    return rounded(mel, dtype) if dtype == "uint8" else mel


def _peak(decode: Callable[[], Iterator[Samples]]) -> tuple[Iterable[Samples], float]:
    """The blocks of a recording, to be read once, and the largest magnitude in them."""
    kept: list[Samples] = []
    count, peak = 0, 0.0
    for block in decode():
        peak = max(peak, float(block.max(initial=0)), -float(block.min(initial=0)))
        count += len(block)
        if count <= _KEPT:
            kept.append(block)
        else:
            kept.clear()
    return (kept if count <= _KEPT else decode()), peak


def _blocks(
    audio: Audio, to: int, rate: int | None, start: float | None, end: float | None
) -> Iterator[Samples]:
    """The samples of a recording at the rate `to`, in blocks (N,)."""
    if isinstance(audio, np.ndarray):
        own = to if rate is None else rate
        if not LEAST_RATE <= own <= MOST_RATE:
            raise ValueError(f"the rate is {own} Hz, expected {LEAST_RATE} to {MOST_RATE}")
        begin = sample_at(start or 0, own)
        samples = _channel(audio)[begin : None if end is None else sample_at(end, own)]
        if len(samples) > MOST_HOURS * 3600 * own:
            raise ValueError(f"is longer than {MOST_HOURS} hours: cut it into pieces")
        parts = (samples[at : at + _BLOCK] for at in range(0, len(samples), _BLOCK))
        yield from resample(parts, own, to)
        return
    if rate is not None:
        raise ValueError("a rate goes with samples: a file has its own")
    place = audio if isinstance(audio, bytes) else Path(audio)
    with open_recording(place) as recording:
        yield from resample(recording.samples(start, end), recording.rate, to)


def _channel(audio: NDArray[Any]) -> Samples:
    """Samples (N,) or (C, N) of any type as one channel (N,) float32."""
    if audio.ndim not in (1, 2) or (audio.ndim == 2 and audio.shape[0] > audio.shape[1]):
        raise ValueError(f"has the shape {audio.shape}, expected (samples,) or (channels, samples)")
    if not np.issubdtype(audio.dtype, np.floating) and not np.issubdtype(audio.dtype, np.integer):
        raise ValueError(f"has elements of type {audio.dtype}, expected numbers")
    if np.issubdtype(audio.dtype, np.unsignedinteger):
        raise ValueError(f"has elements of type {audio.dtype}, expected signed numbers")
    with np.errstate(over="ignore", invalid="ignore"):
        found = audio.mean(axis=0) if audio.ndim == 2 else audio
        if np.issubdtype(audio.dtype, np.integer):
            found = found / -float(np.iinfo(audio.dtype).min)
        found = np.asarray(found, np.float32)
    check_finite(found)
    return found
