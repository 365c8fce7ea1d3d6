"""Reads the small files beside the shards: the index of each split, and the list of rejects."""

from __future__ import annotations

import contextlib
import hashlib
import io
import os
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from shardprep.errors import REPAIR, CorruptShardError, StorageError
from shardprep.format.codecs import NPY_FAULTS
from shardprep.format.index import is_index
from shardprep.format.limits import MAX_REJECTS_BYTES
from shardprep.format.manifest import (
    FileInfo,
    Manifest,
    Reject,
    ShardInfo,
    SplitInfo,
)
from shardprep.read.address_space import (
    MOST_COPIED,
    NO_SHARED_MAPS,
    NOT_MAPPED,
    TO_LOCAL_DISK,
)
from shardprep.read.files import Files
from shardprep.storage.local import open_regular, read_at_most
from shardprep.storage.sniff import wrong_size
from shardprep.storage.trouble import BadPlaceError, machine_errors

# Index rows whose keys are checked at a time.
_BLOCK = 1 << 18
# Bytes of a key: no control character.
_ALLOWED = bytes(b for b in range(32, 256) if b != 0x7F)


def load_index(files: Files, split: SplitInfo, *, quantised: bool = False) -> NDArray[Any]:
    """The index rows of a split (N,), mapped, their sha256 checked; FORMAT.md has the fields.

    Args:
        files: The files of the set.
        split: The split in its manifest.
        quantised: Whether the element type of the set is uint8.

    Raises:
        CorruptShardError: The file is missing or damaged.
        StorageError: The machine cannot read it now, or the store does not answer.
    """
    path = files.local(split.index)
    try:
        with machine_errors(path):
            try:
                check_file(path, split.index)
            except (CorruptShardError, BadPlaceError):
                if not files.renew(split.index):
                    raise
                path = files.local(split.index)
            rows = _map_index(path, quantised)
            _check_keys(rows)
    except OSError as error:
        raise CorruptShardError(
            f"cannot be read: {error.strerror}", file=path, remedy=REPAIR
        ) from None
    except NPY_FAULTS as error:
        raise CorruptShardError(f"is no index ({error})"[:300], file=path, remedy=REPAIR) from None
    return rows


def _map_index(path: Path, quantised: bool) -> NDArray[Any]:
    # Not np.load, which would also open pickles and zip files.
    try:
        rows: NDArray[Any] = np.asarray(np.lib.format.open_memmap(path, mode="r"))
    except OSError as error:
        if error.errno not in NO_SHARED_MAPS:
            raise
        rows = _read_index(path)
    if not is_index(rows, quantised=quantised):
        raise CorruptShardError(f"has rows {rows.dtype}"[:300], file=path, remedy=REPAIR)
    return rows


def _read_index(path: Path) -> NDArray[Any]:
    """The same rows from a file system without shared memory maps, read-only too."""
    try:
        # Copy on write: a private map.
        rows: NDArray[Any] = np.asarray(np.lib.format.open_memmap(path, mode="c"))
    except OSError as error:
        if error.errno not in NO_SHARED_MAPS:
            raise
        with open_regular(path) as file:
            if os.fstat(file.fileno()).st_size > MOST_COPIED:
                raise StorageError(NOT_MAPPED, file=path, remedy=TO_LOCAL_DISK) from error
            rows = np.lib.format.read_array(io.BytesIO(file.read()), allow_pickle=False)
    rows.flags.writeable = False
    return rows


def check_file(path: Path, entry: FileInfo | ShardInfo) -> None:
    """Make sure that a file has the size and sha256 of the manifest.

    Raises:
        OSError: The file cannot be read.
        CorruptShardError: Its size or sha256 is another.
    """
    with open_regular(path) as file:
        size = os.fstat(file.fileno()).st_size
        if size != entry.bytes:
            raise wrong_size(path, size, entry.bytes)
        if hashlib.file_digest(file, "sha256").hexdigest() != entry.sha256:
            raise CorruptShardError(
                "its sha256 is not the one in the manifest", file=path, remedy=REPAIR
            )


def _check_keys(rows: NDArray[Any]) -> None:
    """ValueError if a build would not write one of the keys; by blocks, at the speed of memory."""
    for at in range(0, len(rows), _BLOCK):
        keys = rows["key"][at : at + _BLOCK]
        lengths, data = np.char.str_len(keys), keys.tobytes()
        # Only the zeros that fill each field after its key may be left, and no zero within a key.
        left = data.translate(None, _ALLOWED)
        padding = len(data) - int(lengths.sum())
        if len(left) != padding or left.strip(b"\0") or not lengths.all():
            raise ValueError("a key is empty, or has a control character")
        if b"." in data and any(b"." in key.rpartition(b"/")[2] for key in keys.tolist()):
            raise ValueError("the name of a key has a dot")
        if not data.isascii():
            np.char.decode(keys, "utf-8")


def read_rejects(files: Files, manifest: Manifest) -> tuple[Reject, ...]:
    """The utterances that the build of a set left out, and why.

    Raises:
        CorruptShardError: rejects.jsonl is missing or damaged.
        StorageError: The machine cannot read it now, or the store does not answer.
    """
    if manifest.rejects is None:
        return ()
    path = files.local(manifest.rejects)
    try:
        if manifest.rejects.bytes > MAX_REJECTS_BYTES:
            raise ValueError(f"it has more than {MAX_REJECTS_BYTES} bytes")
        with machine_errors(path):
            check_file(path, manifest.rejects)
            lines = read_at_most(path, MAX_REJECTS_BYTES).splitlines()
        return tuple(msgspec.json.decode(line, type=Reject) for line in lines)
    except OSError as error:
        why = error.strerror or str(error)
    except (ValueError, RecursionError) as error:
        why = str(error)[:300]
    raise CorruptShardError(
        f"is not the list of rejected utterances that the manifest names ({why})",
        file=path,
        remedy=REPAIR,
    )


def legible_rejects(data: bytes) -> list[Reject]:
    """The readable lines of a rejects.jsonl that may be damaged."""
    found: list[Reject] = []
    for line in data.splitlines():
        with contextlib.suppress(ValueError, RecursionError):
            found.append(msgspec.json.decode(line, type=Reject))
    return found
