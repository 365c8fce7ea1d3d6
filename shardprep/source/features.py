"""One `.pt` or `.npy` file: load its matrix without running code in the file, and check it."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from shardprep.format.limits import MAX_INFLATION
from shardprep.source.npy import read_npy
from shardprep.source.pt.tensor import read_tensor
from shardprep.storage.local import open_regular
from shardprep.storage.trouble import machine_errors

# A file may have eight times the bytes of its matrix in float64, and 16 MiB around the matrix.
_MOST_TIMES, _MOST_ITEMSIZE, _MOST_AROUND = 8, 8, 16 << 20
# Most bytes where the length is unknown: an hour of frames takes far fewer.
_MOST_UNKNOWN = 1 << 30


class Expected(NamedTuple):
    """What the source says about a matrix.

    Attributes:
        n_mels: Mel bins F; 0 if unknown.
        frames: Length T; 0 if unknown.
        length: What the source calls the length, for messages.
    """

    n_mels: int
    frames: int
    length: str = "mel_len"


def load_features(
    file: Path | bytes, expected: Expected, *, npy: bool = False
) -> NDArray[np.float32]:
    """Load one file without running code that the file may contain.

    Args:
        file: Its path, or its bytes.
        expected: What the matrix must have.
        npy: Whether it is a `.npy` file, not a `.pt` file.

    Returns:
        Matrix (T, F), float32; it may be read-only.

    Raises:
        ValueError: What is wrong with the file, in words for `Reject.reason`.
        StorageError: The machine, not the file, is at fault; a later try may succeed.
    """
    with _file_faults(file):
        data = file if isinstance(file, bytes) else _read(file, expected)
        check_file_size(len(data), expected)
        if npy:
            values = read_npy(data)
            check_shape(values.shape, expected, "save array")
            return finite(values)
        stored = read_tensor(data)
        # Before a copy is made: a view of few numbers can claim any size.
        check_shape(stored.numbers.shape, expected)
        if stored.repeats:
            raise ValueError("is a view that repeats its numbers; save tensor.clone()")
        return finite(stored.values())


def finite(values: NDArray[np.floating]) -> NDArray[np.float32]:
    """A matrix in float32, in C order. ValueError if a number is not finite there."""
    with np.errstate(all="ignore"):
        mel: NDArray[np.float32] = np.ascontiguousarray(values, dtype=np.float32)
    if not np.isfinite(mel).all():
        raise ValueError("has values that are not finite (NaN or infinity)")
    return mel


def check_file_size(nbytes: int, expected: Expected) -> None:
    """ValueError if a file is much larger than its matrix needs."""
    n_mels, frames, _ = expected
    most = _MOST_TIMES * _MOST_ITEMSIZE * frames * n_mels if n_mels and frames else _MOST_UNKNOWN
    if nbytes > _MOST_AROUND + most:
        raise ValueError(
            f"has {nbytes} bytes, far more than its frames need; save tensor.clone(), which "
            "leaves out the larger tensor that this one is a part of"
        )


def _read(path: Path, expected: Expected) -> bytes:
    """The bytes of a file. ValueError if the file is much larger than its matrix needs."""
    with open_regular(path) as file:
        info = os.fstat(file.fileno())
        check_file_size(info.st_size, expected)
        # A sparse file may claim any size, and have nothing but holes.
        if info.st_size > max(_MOST_AROUND, MAX_INFLATION * info.st_blocks * 512):
            raise ValueError(f"has {info.st_size} bytes, nearly all of which are holes")
        return file.read(info.st_size)


@contextlib.contextmanager
def _file_faults(file: Path | bytes) -> Iterator[None]:
    """An error of the file becomes a ValueError, and trouble of the machine a StorageError."""
    try:
        with machine_errors(None if isinstance(file, bytes) else file):
            yield
    except OSError as error:
        raise ValueError(f"cannot be read: {error.strerror}") from None


def check_shape(shape: tuple[int, ...], expected: Expected, save: str = "save tensor") -> None:
    """ValueError if a matrix has another shape than the source says, with what may help.

    Args:
        shape: Its shape.
        expected: What the source says.
        save: The beginning of code that corrects it.
    """
    n_mels, frames, length = expected
    if len(shape) == 2 and n_mels in (0, shape[1]) and frames in (0, shape[0]):
        return
    if len(shape) == 2 and shape[1] == n_mels:
        raise ValueError(
            f"has {shape[0]} frames, but {length} says {frames}; correct {length}, or make the "
            "file again"
        )
    wanted = f"has shape {shape}, expected ({length}, {n_mels or 'n_mels'})"
    inner = tuple(n for n in shape if n != 1)
    turned = len(inner) == 2 and inner[0] == n_mels and frames in (0, inner[1])
    if len(shape) == 2 and turned:
        raise ValueError(f"{wanted}: it is transposed; {save}.T")
    if len(shape) > 2 and len(inner) == 2 and inner[1] == n_mels and frames in (0, inner[0]):
        raise ValueError(f"{wanted}; {save}.squeeze()")
    if len(shape) > 2 and turned:
        raise ValueError(f"{wanted}: it is transposed; {save}.squeeze().T")
    if len(shape) == 2 and shape[0] == frames:
        raise ValueError(f"{wanted}; if all files have {shape[1]} mels, correct n_mels")
    if len(shape) == 1:
        raise ValueError(f"{wanted}; if it is a waveform, save its log-mels")
    raise ValueError(wanted)
