"""Element type uint8: a mel matrix as whole numbers of one byte, with a scale of its own.

As in Kaldi's compressed matrices, a matrix is spread over the range of its own values: 256 levels
at equal distances, of which the lowest is its smallest value and the highest its largest.

Axis legend: N utterances, T frames, F mel bins.
"""

from __future__ import annotations

import contextlib
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

_LEVELS = 255
# All products and sums of dequantise stay finite below it.
_LARGEST = float(np.finfo(np.float32).max) / 4


class Scale(NamedTuple):
    """What whole numbers of a matrix stand for: q is minimum + step * q."""

    minimum: float
    """Its smallest value, a float32."""
    step: float
    """Distance of two levels, a float32; 0 if all values are equal."""


def quantise(mel: NDArray[np.floating]) -> tuple[NDArray[np.uint8], Scale]:
    """The nearest levels to a matrix.

    Args:
        mel: Finite values (T, F), at least one.

    Returns:
        Whole numbers (T, F), and their scale. What `dequantise` makes of them differs from the
        values by half a step at most, and by the rounding of float32.

    Raises:
        ValueError: Values so large that float32 cannot hold their range.
    """
    low, high = float(mel.min()), float(mel.max())
    if max(high, -low) >= _LARGEST:
        raise ValueError("has values beyond the range of uint8; use --dtype float32")
    minimum = np.float32(low)
    step = np.float32((high - float(minimum)) / _LEVELS)
    if step <= 0:
        return np.zeros(mel.shape, np.uint8), Scale(float(minimum), 0.0)
    levels = np.rint((mel.astype(np.float64) - float(minimum)) / float(step))
    return levels.clip(0, _LEVELS).astype(np.uint8), Scale(float(minimum), float(step))


def dequantise(
    levels: NDArray[np.uint8],
    minimum: float | NDArray[Any],
    step: float | NDArray[Any],
    out: NDArray[np.float32] | None = None,
) -> NDArray[np.float32]:
    """The values of whole numbers: step * q rounded to float32, plus minimum, rounded again.

    Args:
        levels: Whole numbers q, (T, F) or any shape.
        minimum: Value of 0; a number, or an array that broadcasts.
        step: Distance of two levels; likewise.
        out: Where the values go; a new array by default.
    """
    mel = np.empty(levels.shape, np.float32) if out is None else out
    mel[...] = levels
    mel *= np.asarray(step, np.float32)
    mel += np.asarray(minimum, np.float32)
    return mel


def rounded(mel: NDArray[np.floating], dtype: str) -> NDArray[np.floating]:
    """What a reader gives back of a matrix (T, F) that a set of this element type holds.

    Args:
        mel: Finite values (T, F).
        dtype: "float32", "float16" or "uint8".

    Returns:
        (T, F) of the type that readers give: float16 for "float16", otherwise float32.

    Raises:
        ValueError: Values so large that uint8 cannot hold their range.
    """
    if dtype == "uint8":
        levels, scale = quantise(mel)
        return dequantise(levels, *scale)
    return mel.astype(dtype)


def is_rounded(found: NDArray[Any], mel: NDArray[np.floating], dtype: str) -> bool:
    """Whether a matrix that was read is what `rounded` makes of `mel`, which may not fit."""
    with np.errstate(over="ignore"):
        try:
            return np.array_equal(found, rounded(mel, dtype))
        except ValueError:
            return False


def scale_of(about: Any) -> Scale:
    """The scale that the JSON member of an utterance states.

    Args:
        about: What the member holds.

    Raises:
        ValueError: It states none.
    """
    values = [about.get(name) if isinstance(about, dict) else None for name in Scale._fields]
    if all(type(value) in (int, float) for value in values):
        with np.errstate(all="ignore"), contextlib.suppress(OverflowError):
            scale = Scale(*(float(np.float32(value)) for value in values))
            if is_scale(scale):
                return scale
    raise ValueError("its JSON has no minimum and step that whole numbers of uint8 can have")


def is_scale(scale: Scale | None) -> bool:
    """Whether `quantise` may have given a scale."""
    return scale is not None and bool(are_scales(*map(np.asarray, scale)))


def are_scales(minimum: NDArray[np.float32], step: NDArray[np.float32]) -> NDArray[np.bool_]:
    """Whether `quantise` may have given scales (N,): finite, not negative, and not too large."""
    # NaN is in no range.
    return (np.abs(minimum) <= _LARGEST) & (step >= 0) & (step <= _LARGEST / 64)
