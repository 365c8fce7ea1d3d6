"""An unfinished build, wherever it goes: what it must do, and which files are its own."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Protocol

import msgspec

from shardprep.build.pool import Advance
from shardprep.build.shard import ShardRecord, ShardTask
from shardprep.errors import BuildError
from shardprep.format.index import index_bytes
from shardprep.format.manifest import (
    FORMAT,
    MANIFEST_NAME,
    REJECTS_NAME,
    FileInfo,
    Reject,
    ShardInfo,
    SplitInfo,
    index_name,
)
from shardprep.storage.remote import Location

_OURS = re.compile(r"(?:train|val|test)(?:-\d{6,}\.tar|\.index\.npy)|" + re.escape(REJECTS_NAME))


# What `storage.publish` appends to the name of a file that is not whole yet.
_TEMPORARY = re.compile(r"\.[^.]*\.tmp")


RECORD_SUFFIX = ".json"


class Work(Protocol):
    """An unfinished build, in a folder or in an object store; pickles, for workers to call."""

    @property
    def target(self) -> Location:
        """Where the set goes."""

    def keep_finished(self, tasks: Sequence[ShardTask]) -> dict[str, ShardRecord]:
        """Records of the shards of an earlier run that still hold, by file name.

        What else earlier runs left is removed.
        """

    def __call__(self, task: ShardTask, advance: Advance) -> ShardRecord:
        """Write the shard of a task, and a record of it; see `shard.write_shard`."""

    def publish(self, name: str, data: bytes) -> None:
        """Write another file of the set."""

    def install(self, files: Mapping[str, FileInfo | ShardInfo], manifest: bytes) -> None:
        """Put the complete set in its place, its manifest last."""


def is_ours(name: str) -> bool:
    """Whether a file of this name is one that builds write, whole or half."""
    stem = _TEMPORARY.sub("", name)
    return bool(_OURS.fullmatch(stem)) or (stem != name and stem == MANIFEST_NAME)


def check_manifest_is_ours(path: Location, data: bytes) -> None:
    """Make sure that what a manifest.json holds is of a shard set, damaged or not.

    Raises:
        BuildError: It is not: other programs too keep a file of this name.
    """
    if f'"{FORMAT}"'.encode() not in data:
        raise BuildError(
            "is not the manifest of a shard set, and will not be replaced",
            file=path,
            remedy="Name another folder.",
        )


def is_of(record: ShardRecord, task: ShardTask) -> bool:
    """Whether a record can be what came of a task; its file names lead to what is moved."""
    planned = {utterance.key: utterance for utterance in task.plan.utterances}
    keys = [row.key for row in record.rows]
    return (
        record.inputs == task.inputs
        and record.info.file == task.plan.file
        and record.info.samples == len(keys) == len(set(keys))
        and record.info.frames == sum(row.frames for row in record.rows)
        and {*keys, *(reject.key for reject in record.rejects)} == planned.keys()
        and all(
            (row.frames, row.label) == (planned[row.key].frames, planned[row.key].label)
            and min(row.offset, row.nbytes, row.crc32) >= 0
            and row.offset + row.nbytes <= record.info.bytes
            and max(row.nbytes, row.crc32) < 2**32
            for row in record.rows
        )
    )


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


def _publish_file(work: Work, name: str, data: bytes) -> FileInfo:
    work.publish(name, data)
    return FileInfo(name, len(data), hashlib.sha256(data).hexdigest())


def split_of(record: ShardRecord) -> str:
    """The split that a shard belongs to, by its file's name."""
    return record.info.file.rsplit("-", 1)[0]
