"""Utterances that a program has added but that are not packed yet: one file, appended to.

A record of the file is the head (magic, sizes, CRC-32 of the rest), a JSON object (key, speaker,
split, frames, version) and the matrix in the element type that the shards will have, or in float32
where that is uint8. A program that is killed may leave a part of a record at the end. A power cut
may leave zeros anywhere, so the CRC-32 of each matrix is checked before it counts and when it is
packed.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import struct
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import msgspec
import numpy as np
from numpy.typing import NDArray

from shardprep.errors import BuildError
from shardprep.source.contents import Matrix, Utterance
from shardprep.storage.local import open_regular
from shardprep.storage.trouble import storage_errors

_PREFIX = "spool-"
_MAGIC = b"\x89SPL"
_HEAD = struct.Struct("<4sIQII")
# Of the JSON object; a key and a speaker are far shorter.
_MOST_ABOUT = 1 << 16
# Matrices that the disk is asked for before they are read.
_AHEAD = 32


class Spooled(msgspec.Struct, frozen=True, array_like=True):
    """An utterance in the spool.

    Attributes:
        key: Its key.
        speaker: Speaker name, or None.
        split: The split that the program named; None for one that the build draws.
        frames: Length in mel frames.
        version: A number that changes with the matrix.
        offset: Where its record begins.
        nbytes: Bytes of its matrix.
    """

    key: str
    speaker: str | None
    split: str | None
    frames: int
    version: int
    offset: int = 0
    nbytes: int = 0


def version_of(stored: NDArray[np.floating]) -> int:
    """A number that changes with a matrix."""
    digest = hashlib.blake2b(stored.tobytes(), digest_size=8).digest()
    return int.from_bytes(digest, "little") or 1


def spools(folder: Path) -> list[Path]:
    """The spools in a work folder; of programs that were interrupted, unless one is running."""
    return sorted(folder.glob(f"{_PREFIX}*"))


class Spool:
    """The spool in a work folder; the caller holds the lock of the folder.

    What an earlier run with the same `n_mels` and `dtype` has left is in `found`; other spools are
    removed.

    Args:
        folder: The work folder.
        n_mels: Mel bins F.
        dtype: Element type of the shards.

    Attributes:
        found: The last record of each key that earlier runs have left.

    Raises:
        StorageError: The file cannot be opened.
    """

    def __init__(self, folder: Path, n_mels: int, dtype: str) -> None:
        self.reader = SpoolReader(folder, f"{_PREFIX}{n_mels}-{dtype}", n_mels, dtype)
        self._path = folder / self.reader.name
        with storage_errors(self._path):
            for path in spools(folder):
                if path != self._path:
                    path.unlink()
            # A link must not lead the writer elsewhere.
            flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
            self._file = open(os.open(self._path, flags, 0o666), "r+b", buffering=0)  # noqa: SIM115
            self.found = {record.key: record for record in self._records()}
            self._end = self._file.tell()
            self._file.truncate(self._end)

    def append(
        self, key: str, stored: NDArray[np.floating], speaker: str | None, split: str | None
    ) -> Spooled:
        """Append an utterance.

        Args:
            key: Its key.
            stored: Its matrix (T, F), in the element type of the spool.
            speaker: Speaker name, or None.
            split: The split that it goes to, or None.

        Raises:
            StorageError: The disk failed; the spool is as before.
        """
        record = Spooled(key, speaker, split, len(stored), version_of(stored))
        about, matrix = msgspec.json.encode(record), np.ascontiguousarray(stored).tobytes()
        sizes = len(about), len(matrix)
        head = _HEAD.pack(_MAGIC, *sizes, _crc(sizes, about), zlib.crc32(matrix))
        with storage_errors(self._path):
            try:
                _write_all(self._file, head + about + matrix)
            except BaseException:
                with contextlib.suppress(OSError):
                    self._file.seek(self._end)
                    self._file.truncate()
                raise
        placed = msgspec.structs.replace(record, offset=self._end, nbytes=len(matrix))
        self._end = self._file.tell()
        return placed

    def is_intact(self, record: Spooled) -> bool:
        """Whether the matrix of a record is as it was appended."""
        with storage_errors(self._path), open_regular(self._path) as file:
            return _matrix(file, record.offset, record.nbytes) is not None

    def close(self) -> None:
        """Close the file; it stays."""
        self._file.close()

    def _records(self) -> Iterator[Spooled]:
        """The complete records; then the file stands behind the last of them."""
        with open_regular(self._path) as file:
            size, at = os.fstat(file.fileno()).st_size, 0
            while (found := _about(file, at)) is not None:
                about, sizes = found
                end = at + _HEAD.size + sum(sizes)
                if end > size:
                    break
                yield msgspec.structs.replace(about, offset=at, nbytes=sizes[1])
                at = end
        self._file.seek(at)


def _crc(sizes: tuple[int, int], about: bytes) -> int:
    return zlib.crc32(about, zlib.crc32(struct.pack("<IQ", *sizes)))


def _about(file: BinaryIO, offset: int) -> tuple[Spooled, tuple[int, int]] | None:
    """What a record says, and the sizes of its JSON and of its matrix; None if it is none."""
    file.seek(offset)
    head = file.read(_HEAD.size)
    if len(head) < _HEAD.size:
        return None
    magic, about_bytes, nbytes, crc, _ = _HEAD.unpack(head)
    if magic != _MAGIC or about_bytes > _MOST_ABOUT:
        return None
    about = file.read(about_bytes)
    if len(about) < about_bytes or _crc((about_bytes, nbytes), about) != crc:
        return None
    return msgspec.json.decode(about, type=Spooled), (about_bytes, nbytes)


def _matrix(file: BinaryIO, offset: int, nbytes: int) -> bytes | None:
    """The bytes of the matrix of a record; None if they are not those that were appended."""
    file.seek(offset)
    head = file.read(_HEAD.size)
    if len(head) < _HEAD.size:
        return None
    magic, about_bytes, found, _, crc = _HEAD.unpack(head)
    if magic != _MAGIC or found != nbytes or about_bytes > _MOST_ABOUT:
        return None
    file.seek(offset + _HEAD.size + about_bytes)
    data = file.read(nbytes)
    return data if len(data) == nbytes and zlib.crc32(data) == crc else None


def _write_all(file: BinaryIO, data: bytes) -> None:
    rest = memoryview(data)
    while rest:
        rest = rest[file.write(rest) :]


@dataclass(frozen=True)
class SpoolReader:
    """Reads the matrices of a spool; see `Reader`.

    Attributes:
        root: The work folder.
        name: Name of the file.
        n_mels: Mel bins F.
        dtype: Element type of the shards.
    """

    root: Path
    name: str
    n_mels: int
    dtype: str

    def utterance(self, record: Spooled, label: int, entry: int | None) -> Utterance:
        """A record as an utterance of the source."""
        return Utterance(
            record.key,
            f"{self.name}:{record.offset}",
            record.speaker,
            label,
            record.frames,
            record.nbytes,
            record.version,
            entry,
        )

    def read(
        self, utterances: Sequence[Utterance], n_mels: int
    ) -> Iterator[tuple[Utterance, Matrix]]:
        """See `Reader.read`.

        Raises:
            BuildError: The matrix in the spool is damaged.
        """
        path = self.root / self.name
        with storage_errors(path), open_regular(path) as file:
            for number, utterance in enumerate(utterances):
                for later in utterances[number + _AHEAD :][:1] if number else utterances[:_AHEAD]:
                    _fetch(file, _offset(later), later.nbytes)
                data = _matrix(file, _offset(utterance), utterance.nbytes)
                if data is None:
                    raise BuildError(
                        "its matrix was damaged on the disk before it was packed",
                        file=path,
                        key=utterance.key,
                        remedy="Run the program again: it adds this utterance anew.",
                    )
                kind = "float32" if self.dtype == "uint8" else self.dtype
                dtype = np.dtype(kind).newbyteorder("<")
                yield utterance, np.frombuffer(data, dtype).reshape(utterance.frames, n_mels)


def _offset(utterance: Utterance) -> int:
    return int(utterance.path.rpartition(":")[2])


def _fetch(file: BinaryIO, offset: int, nbytes: int) -> None:
    if hasattr(os, "posix_fadvise"):
        with contextlib.suppress(OSError):
            os.posix_fadvise(file.fileno(), offset, nbytes, os.POSIX_FADV_WILLNEED)
