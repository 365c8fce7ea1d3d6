"""The small files beside the shards: the index of a split, and the list of rejects."""

from __future__ import annotations

import hashlib
import io
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from shardprep.errors import CorruptShardError
from shardprep.format import Manifest, SplitInfo, is_index
from shardprep.source import Reject

REBUILD = (
    "Run `shardprep verify` on the folder to see all that is damaged, then build the set again "
    "with --overwrite."
)


def load_index(folder: Path, split: SplitInfo) -> NDArray[Any]:
    """The index rows of a split (N,), whole by their sha256; see FORMAT.md for the fields.

    Raises:
        CorruptShardError: The file is missing or damaged.
    """
    path = folder / split.index.file
    try:
        data = path.read_bytes()
    except OSError as error:
        raise CorruptShardError(
            f"cannot be read: {error.strerror}", file=path, remedy=REBUILD
        ) from None
    if len(data) != split.index.bytes:
        raise CorruptShardError(
            f"has {len(data)} bytes, expected {split.index.bytes}", file=path, remedy=REBUILD
        )
    if hashlib.sha256(data).hexdigest() != split.index.sha256:
        raise CorruptShardError(
            "its sha256 is not the one in the manifest", file=path, remedy=REBUILD
        )
    try:
        rows: NDArray[Any] = np.lib.format.read_array(io.BytesIO(data), allow_pickle=False)
    except (ValueError, SyntaxError, EOFError, MemoryError) as error:
        raise CorruptShardError(f"is no index ({error})", file=path, remedy=REBUILD) from None
    if not is_index(rows):
        raise CorruptShardError(f"has rows {rows.dtype}", file=path, remedy=REBUILD)
    return rows


def read_rejects(folder: Path, manifest: Manifest) -> tuple[Reject, ...]:
    """What the build of a set left out; empty where it left nothing out.

    Raises:
        CorruptShardError: rejects.jsonl is missing or not as the build wrote it.
    """
    if manifest.rejects is None:
        return ()
    path = folder / manifest.rejects.file
    try:
        lines = path.read_bytes().splitlines()
        return tuple(msgspec.json.decode(line, type=Reject) for line in lines)
    except (OSError, msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise CorruptShardError(
            f"is not the list of rejected utterances that the manifest names ({error})",
            file=path,
            remedy=REBUILD,
        ) from None
