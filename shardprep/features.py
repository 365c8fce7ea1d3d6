"""One `.pt` file: its matrix, loaded without running code that it may contain, and checked."""

from __future__ import annotations

import contextlib
import errno
import os
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from shardprep.errors import StorageError
from shardprep.ptfile import read_matrix

# Troubles that pass: such a file must not be left out of the set.
_NOT_THE_FILE = (errno.EIO, errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ESTALE)
# The most that a recognised file holds: bytes of a number, and bytes around all numbers.
_MOST_ITEMSIZE, _MOST_AROUND = 8, 1 << 16
_ZIP_MAGIC = b"PK\3\4"


def load_features(path: Path, *, n_mels: int, frames: int) -> NDArray[np.float32]:
    """Load one `.pt` file without running code that it may contain.

    Args:
        path: The file.
        n_mels: Mel bins F that it must have.
        frames: Length T that it must have.

    Returns:
        Matrix (T, F), float32; it may be read-only.

    Raises:
        ValueError: What is wrong with the file, in words for `Reject.reason`.
        StorageError: The machine, not the file, is at fault; reading it later may well work.
    """
    with _machine_or_file(path):
        matrix = _read_plain(path, frames * n_mels * _MOST_ITEMSIZE + _MOST_AROUND)
    if matrix is None:
        matrix = _load_by_torch(path, n_mels, frames)
    _check_shape(matrix.shape, n_mels, frames)
    with np.errstate(all="ignore"):
        mel: NDArray[np.float32] = np.ascontiguousarray(matrix, dtype=np.float32)
    if not np.isfinite(mel).all():
        raise ValueError("has values that are not finite (NaN or infinity)")
    return mel


def _read_plain(path: Path, most: int) -> NDArray[Any] | None:
    """The matrix of a file that can be read without PyTorch; None for any other."""
    try:
        with open(path, "rb", buffering=0) as file:
            size = os.fstat(file.fileno()).st_size
            # A larger file cannot be what the metadata say, and may not fit into memory.
            return read_matrix(file.read(size)) if size <= most else None
    except OSError as error:
        if error.errno in _NOT_THE_FILE:
            raise
        return None


def _load_by_torch(path: Path, n_mels: int, frames: int) -> NDArray[Any]:
    # Seconds to import, which most builds need not spend.
    import torch

    with _machine_or_file(path):
        loaded = torch.load(path, map_location="cpu", weights_only=True)
        damaged = _damaged_record(path)
    if damaged is not None:
        raise ValueError(f"is damaged: the CRC-32 of its record {damaged} is another")
    if not isinstance(loaded, torch.Tensor):
        raise ValueError(f"holds a {type(loaded).__name__}, not a tensor")
    dense = loaded.layout == torch.strided and loaded.device.type == "cpu" and not loaded.is_nested
    if not dense or not loaded.is_floating_point():
        found = f"{loaded.dtype} ({loaded.layout}, {loaded.device})"
        raise ValueError(f"holds {found}, expected dense floating point")
    # Before a copy is made: a view of few numbers can pretend to any size.
    _check_shape(tuple(loaded.shape), n_mels, frames)
    matrix: NDArray[Any] = loaded.detach().float().resolve_neg().numpy()
    return matrix


@contextlib.contextmanager
def _machine_or_file(path: Path) -> Iterator[None]:
    """Tell trouble with the machine, a StorageError, from trouble with the file, a ValueError."""
    try:
        yield
    except Exception as error:
        if isinstance(error, MemoryError) or getattr(error, "errno", None) in _NOT_THE_FILE:
            raise StorageError(
                f"cannot be read: {error}",
                file=path,
                remedy="Check the disk and the memory, then run the same command again.",
            ) from error
        # Whatever a hostile or broken file makes the unpickler raise means the same here.
        raise ValueError(
            f"not a tensor file that can be loaded safely: {_load_fault(error)}"
        ) from None


def _damaged_record(path: Path) -> str | None:
    """The first record of a zip file whose content is not what was stored, if there is one.

    PyTorch's reader does not look at checksums.
    """
    try:
        with open(path, "rb") as file:
            # By this alone PyTorch tells a zip file from its older format, which has no checksums.
            if file.read(len(_ZIP_MAGIC)) != _ZIP_MAGIC:
                return None
            archive = zipfile.ZipFile(file)
            # torch.save can be told not to compute checksums, and then writes zeros.
            if not any(record.CRC for record in archive.infolist()):
                return None
            return archive.testzip()
    except (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError) as error:
        return f"({error})"


def _check_shape(shape: tuple[int, ...], n_mels: int, frames: int) -> None:
    if len(shape) != 2 or shape[1] != n_mels:
        raise ValueError(f"has shape {shape}, expected (mel_len, {n_mels})")
    if shape[0] != frames:
        raise ValueError(f"has {shape[0]} frames, but mel_len says {frames}")


def _load_fault(error: Exception) -> str:
    """What torch.load found, without its advice to load the file unsafely."""
    advice = ("Weights only load failed", "Please file an issue", "Check the documentation")
    lines = (line.strip() for line in str(error).splitlines())
    said = [line for line in lines if line and not line.startswith(advice)]
    return said[0][:200] if said else type(error).__name__
