"""One `.pt` file: load its matrix without running code that the file may contain, and check it."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from shardprep.format.limits import MAX_INFLATION
from shardprep.source.pt.tensor import read_tensor
from shardprep.storage.local import open_regular
from shardprep.storage.trouble import machine_errors

# A file may have eight times the bytes of its matrix in float64, and 16 MiB around the matrix.
_MOST_TIMES, _MOST_ITEMSIZE, _MOST_AROUND = 8, 8, 16 << 20


def load_features(file: Path | bytes, *, n_mels: int, frames: int) -> NDArray[np.float32]:
    """Load one `.pt` file without running code that the file may contain.

    Args:
        file: Its path, or its bytes.
        n_mels: Mel bins F that the matrix must have.
        frames: Length T that the matrix must have.

    Returns:
        Matrix (T, F), float32; it may be read-only.

    Raises:
        ValueError: What is wrong with the file, in words for `Reject.reason`.
        StorageError: The machine, not the file, is at fault; a later try may succeed.
    """
    with _file_faults(file):
        data = file if isinstance(file, bytes) else _read(file, n_mels, frames)
        check_file_size(len(data), n_mels=n_mels, frames=frames)
        stored = read_tensor(data)
        # Before a copy is made: a view of few numbers can claim any size.
        _check_shape(stored.numbers.shape, n_mels, frames)
        if stored.repeats:
            raise ValueError("is a view that repeats its numbers; save tensor.clone()")
        with np.errstate(all="ignore"):
            mel: NDArray[np.float32] = np.ascontiguousarray(stored.values(), dtype=np.float32)
    if not np.isfinite(mel).all():
        raise ValueError("has values that are not finite (NaN or infinity)")
    return mel


def check_file_size(nbytes: int, *, n_mels: int, frames: int) -> None:
    """ValueError if a file is much larger than its matrix needs."""
    if nbytes > _MOST_AROUND + _MOST_TIMES * _MOST_ITEMSIZE * frames * n_mels:
        raise ValueError(
            f"has {nbytes} bytes, far more than its frames need; save tensor.clone(), which "
            "leaves out the larger tensor that this one is a part of"
        )


def _read(path: Path, n_mels: int, frames: int) -> bytes:
    """The bytes of a file. ValueError if the file is much larger than its matrix needs."""
    with open_regular(path) as file:
        info = os.fstat(file.fileno())
        check_file_size(info.st_size, n_mels=n_mels, frames=frames)
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


def _check_shape(shape: tuple[int, ...], n_mels: int, frames: int) -> None:
    if len(shape) == 2 and shape[1] == n_mels:
        if shape[0] != frames:
            raise ValueError(
                f"has {shape[0]} frames, but mel_len says {frames}; correct mel_len, or make the "
                "file again"
            )
        return
    expected = f"has shape {shape}, expected (mel_len, {n_mels})"
    inner = tuple(n for n in shape if n != 1)
    if shape == (n_mels, frames):
        raise ValueError(f"{expected}: it is transposed; save tensor.T")
    if len(shape) > 2 and inner == (frames, n_mels):
        raise ValueError(f"{expected}; save tensor.squeeze()")
    if len(shape) > 2 and inner == (n_mels, frames):
        raise ValueError(f"{expected}: it is transposed; save tensor.squeeze().T")
    if len(shape) == 2 and shape[0] == frames:
        raise ValueError(f"{expected}; if all files have {shape[1]} mels, correct n_mels")
    if len(shape) == 1:
        raise ValueError(f"{expected}; if it is a waveform, save its log-mels")
    raise ValueError(expected)
