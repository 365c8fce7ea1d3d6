"""The small files beside the shards, read and written: the index of a split, and the rejects."""

from __future__ import annotations

import contextlib
import hashlib
import io
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from shardprep.build.shard import IndexRow, ShardRecord
from shardprep.build.work_folder import Work
from shardprep.errors import REPAIR, CorruptShardError
from shardprep.format.codecs import NPY_FAULTS
from shardprep.format.limits import MAX_REJECTS_BYTES
from shardprep.format.manifest import (
    REJECTS_NAME,
    FileInfo,
    Manifest,
    ShardInfo,
    SplitInfo,
    index_dtype,
    index_name,
    is_index,
)
from shardprep.read.files import Files
from shardprep.source.dataset import Reject
from shardprep.storage.local import open_regular, read_at_most

# Index rows whose keys are looked at at once.
_BLOCK = 1 << 18
# Bytes of a key: no dot, no control character.
_ALLOWED = bytes(b for b in range(32, 256) if b not in b".\x7f")


def load_index(files: Files, split: SplitInfo) -> NDArray[Any]:
    """The index rows of a split (N,), mapped, and whole by their sha256; FORMAT.md has the fields.

    Raises:
        CorruptShardError: The file is missing or damaged.
    """
    path = files.local(split.index)
    try:
        try:
            check_whole(path, split.index)
        except CorruptShardError:
            if not files.renew(split.index):
                raise
            path = files.local(split.index)
        rows = _map_index(path)
        _check_keys(rows)
    except OSError as error:
        raise CorruptShardError(
            f"cannot be read: {error.strerror}", file=path, remedy=REPAIR
        ) from None
    except NPY_FAULTS as error:
        raise CorruptShardError(f"is no index ({error})"[:300], file=path, remedy=REPAIR) from None
    return rows


def _map_index(path: Path) -> NDArray[Any]:
    # Not by np.load, which would also open pickles and zip files.
    rows: NDArray[Any] = np.asarray(np.lib.format.open_memmap(path, mode="r"))
    if not is_index(rows):
        raise CorruptShardError(f"has rows {rows.dtype}"[:300], file=path, remedy=REPAIR)
    return rows


def check_whole(path: Path, entry: FileInfo | ShardInfo) -> None:
    """Make sure that a file is the one that the manifest names, by size and sha256.

    Raises:
        OSError: It cannot be read.
        CorruptShardError: It is another.
    """
    with open_regular(path) as file:
        size = os.fstat(file.fileno()).st_size
        if size != entry.bytes:
            raise CorruptShardError(
                f"has {size} bytes, expected {entry.bytes}", file=path, remedy=REPAIR
            )
        if hashlib.file_digest(file, "sha256").hexdigest() != entry.sha256:
            raise CorruptShardError(
                "its sha256 is not the one in the manifest", file=path, remedy=REPAIR
            )


def _check_keys(rows: NDArray[Any]) -> None:
    """ValueError where a key is none that a build writes; in blocks, by the speed of memory."""
    for at in range(0, len(rows), _BLOCK):
        keys = rows["key"][at : at + _BLOCK]
        lengths, data = np.char.str_len(keys), keys.tobytes()
        # What is left should be the zeros that fill the field behind each key, and none within one.
        left = data.translate(None, _ALLOWED)
        padding = len(data) - int(lengths.sum())
        if len(left) != padding or left.strip(b"\0") or not lengths.all():
            raise ValueError("a key is empty, or has a dot or a control character")
        if not data.isascii():
            np.char.decode(keys, "utf-8")


def read_rejects(files: Files, manifest: Manifest) -> tuple[Reject, ...]:
    """What the build of a set left out; empty where it left nothing out.

    Raises:
        CorruptShardError: rejects.jsonl is missing or not as the build wrote it.
    """
    if manifest.rejects is None:
        return ()
    path = files.local(manifest.rejects)
    try:
        if manifest.rejects.bytes > MAX_REJECTS_BYTES:
            raise ValueError(f"it has more than {MAX_REJECTS_BYTES} bytes")
        check_whole(path, manifest.rejects)
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


def legible_rejects(folder: Path, manifest: Manifest) -> list[Reject]:
    """What a damaged list of rejects says, as far as it can be read."""
    found: list[Reject] = []
    if manifest.rejects is not None:
        with contextlib.suppress(OSError):
            for line in read_at_most(
                folder / manifest.rejects.file, MAX_REJECTS_BYTES
            ).splitlines():
                with contextlib.suppress(ValueError, RecursionError):
                    found.append(msgspec.json.decode(line, type=Reject))
    return found


def publish_indexes(work: Work, records: Iterable[ShardRecord]) -> dict[str, SplitInfo]:
    """Write the index file of every split that has utterances; the manifest's entries of them."""
    by_split: dict[str, list[ShardRecord]] = {}
    for record in records:
        if record.info.samples:
            by_split.setdefault(split_of(record), []).append(record)
    return {
        name: SplitInfo(
            samples=sum(record.info.samples for record in own),
            frames=sum(record.info.frames for record in own),
            index=_publish_file(work, index_name(name), index_bytes(record.rows for record in own)),
            shards=tuple(record.info for record in own),
        )
        for name, own in by_split.items()
    }


def publish_rejects(work: Work, rejects: Sequence[Reject]) -> FileInfo | None:
    """Write rejects.jsonl, if there are any; the manifest's entry of it."""
    if not rejects:
        return None
    lines = b"".join(msgspec.json.encode(reject) + b"\n" for reject in rejects)
    return _publish_file(work, REJECTS_NAME, lines)


def index_bytes(shards: Iterable[Sequence[IndexRow]]) -> bytes:
    """The index file of a split: the rows of its shards, one after the other."""
    rows = [(number, row) for number, own in enumerate(shards) for row in own]
    keys = [row.key.encode() for _, row in rows]
    table = np.array(
        [
            (number, row.offset, row.nbytes, row.frames, row.label, row.crc32, key)
            for (number, row), key in zip(rows, keys, strict=True)
        ],
        index_dtype(max(map(len, keys), default=1)),
    )
    buffer = io.BytesIO()
    np.save(buffer, table, allow_pickle=False)
    return buffer.getvalue()


def _publish_file(work: Work, name: str, data: bytes) -> FileInfo:
    work.publish(name, data)
    return FileInfo(name, len(data), hashlib.sha256(data).hexdigest())


def split_of(record: ShardRecord) -> str:
    """The split that a shard belongs to, by its file's name."""
    return record.info.file.rsplit("-", 1)[0]
