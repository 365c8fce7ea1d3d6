"""The small files beside the shards: the index of a split, and the list of rejects."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from shardprep.errors import REPAIR, CorruptShardError
from shardprep.format import Manifest, SplitInfo, is_index
from shardprep.source import Reject
from shardprep.storage import sha256_of


def load_index(folder: Path, split: SplitInfo) -> NDArray[Any]:
    """The index rows of a split (N,), mapped, and whole by their sha256; FORMAT.md has the fields.

    Raises:
        CorruptShardError: The file is missing or damaged.
    """
    path = folder / split.index.file
    try:
        size = path.stat().st_size
        if size != split.index.bytes:
            raise CorruptShardError(
                f"has {size} bytes, expected {split.index.bytes}", file=path, remedy=REPAIR
            )
        if sha256_of(path) != split.index.sha256:
            raise CorruptShardError(
                "its sha256 is not the one in the manifest", file=path, remedy=REPAIR
            )
        rows: NDArray[Any] = np.asarray(np.load(path, mmap_mode="r", allow_pickle=False))
    except OSError as error:
        raise CorruptShardError(
            f"cannot be read: {error.strerror}", file=path, remedy=REPAIR
        ) from None
    except (ValueError, SyntaxError, EOFError, MemoryError, OverflowError) as error:
        raise CorruptShardError(f"is no index ({error})", file=path, remedy=REPAIR) from None
    if not is_index(rows):
        raise CorruptShardError(f"has rows {rows.dtype}", file=path, remedy=REPAIR)
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
            remedy=REPAIR,
        ) from None
