"""An unfinished build: what it must do wherever it goes, and which files belong to it."""

from __future__ import annotations

import contextlib
import hashlib
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Protocol

import msgspec

from shardprep.build.plan import ShardTask
from shardprep.build.shard import Advance, ShardRecord
from shardprep.errors import BuildError
from shardprep.format.card import CARD_NAME
from shardprep.format.index import index_bytes
from shardprep.format.manifest import (
    FORMAT,
    MANIFEST_NAME,
    REJECTS_NAME,
    SOURCE_TIMES_NAME,
    FileInfo,
    Reject,
    ShardInfo,
    SplitInfo,
    index_name,
)
from shardprep.format.quantised import is_scale
from shardprep.storage.remote import Location

# Names of the files of a set, except the manifest.
_OURS = re.compile(
    r"(?:train|val|test)-\d{6,}\.tar|split=(?:train|val|test)\.index\.npy|"
    + "|".join(map(re.escape, (REJECTS_NAME, SOURCE_TIMES_NAME)))
)
# `publish` appends this to the name of a file that is not complete yet.
_TEMPORARY = re.compile(r"\.[^.]*\.tmp")

RECORD_SUFFIX = ".json"


class Publisher(Protocol):
    """Takes the small files of a set."""

    def publish(self, name: str, data: bytes) -> None:
        """Write a file of the set."""


class Work(Publisher, Protocol):
    """An unfinished build, in a folder or in an object store; it pickles, for worker processes.

    A build writes to a work folder within its target first, where that is possible.
    """

    @property
    def target(self) -> Location:
        """The place of the shard set."""

    @property
    def folder(self) -> Location:
        """The work folder."""

    @classmethod
    def claim(cls, target: Any, overwrite: bool) -> contextlib.AbstractContextManager[Work | None]:
        """Check that a build may write to a place, and keep other builds out if possible.

        Args:
            target: The place of the shard set; a folder is made if necessary.
            overwrite: Whether to replace a finished set.

        Yields:
            The unfinished build; None if `target` holds a finished set and `overwrite` is off.

        Raises:
            BuildError: Another build is running there, or the place holds something else.
            StorageError: The place cannot be written to.
        """

    def keep_finished(self, tasks: Sequence[ShardTask]) -> dict[str, ShardRecord]:
        """Records of the finished shards of earlier runs that this run can use, by file name.

        Everything else that earlier runs have left in the work folder is removed.
        """

    def __call__(self, task: ShardTask, advance: Advance) -> ShardRecord:
        """Write the shard of a task and its record; see `shard.write_shard`."""

    def install(self, files: Mapping[str, FileInfo | ShardInfo], manifest: bytes) -> list[str]:
        """Move the complete set to its place, in place of an older set; the manifest comes last.

        Before it comes the dataset card, unless someone's own README.md is there.

        If a build is killed here, the next one finds the files where they are and moves the rest.

        Args:
            files: All files to be there but the manifest, each in the work folder or moved already.
            manifest: Content of manifest.json.

        Returns:
            What a user should know about other files in the place.
        """

    def remove(self) -> None:
        """Remove the work folder."""


def is_ours(name: str) -> bool:
    """Whether builds write files of this name, complete or under a temporary name."""
    stem = _TEMPORARY.sub("", name)
    return is_ours_and_complete(stem) or (stem != name and stem == MANIFEST_NAME)


def is_ours_and_complete(name: str) -> bool:
    """Whether builds write files of this name, the manifest aside; no temporary names."""
    return bool(_OURS.fullmatch(name))


def may_lie_beside(name: str) -> bool:
    """Whether a place for a new set may have a file or folder of this name.

    A fresh repository of a hub has README.md and .gitattributes, a fresh disk lost+found, and a
    folder that a Mac has shown .DS_Store.
    """
    return name.startswith(".") or name in (CARD_NAME, "lost+found")


def check_manifest_is_ours(path: Location, data: bytes) -> None:
    """Make sure that a manifest.json is that of a shard set, even if it is damaged.

    Raises:
        BuildError: It is not: other programs also have files of this name.
    """
    if f'"{FORMAT}"'.encode() not in data:
        raise BuildError(
            "is not the manifest of a shard set, and will not be replaced",
            file=path,
            remedy="Name another folder.",
        )


def is_of(record: ShardRecord, task: ShardTask) -> bool:
    """Whether a record can be the result of a task. Its file names decide which files are moved."""
    planned = {utterance.key: utterance for utterance in task.plan.utterances}
    keys = [row.key for row in record.rows]
    return (
        record.inputs == task.inputs
        and record.info.file == task.plan.file
        and record.info.samples == len(keys) == len(set(keys))
        and record.info.frames == sum(row.frames for row in record.rows)
        and {*keys, *(reject.key for reject in record.rejects)} == planned.keys()
        and all(reject.entry == planned[reject.key].entry for reject in record.rejects)
        and all(
            row.label == planned[row.key].label
            and row.frames == (planned[row.key].frames or row.frames)
            and row.frames > 0
            and min(row.offset, row.nbytes, row.crc32) >= 0
            and row.offset + row.nbytes <= record.info.bytes
            and max(row.nbytes, row.crc32) < 2**32
            and (is_scale(row.scale) if task.dtype == "uint8" else row.scale is None)
            for row in record.rows
        )
    )


def publish_indexes(work: Publisher, records: Iterable[ShardRecord]) -> dict[str, SplitInfo]:
    """Write the index file of every split that has utterances.

    Returns:
        The splits' entries in the manifest, by name.
    """
    by_split: dict[str, list[ShardRecord]] = {}
    for record in records:
        if record.info.samples:
            by_split.setdefault(split_of(record), []).append(record)
    return {
        name: SplitInfo(
            samples=sum(record.info.samples for record in own),
            frames=sum(record.info.frames for record in own),
            index=publish_file(work, index_name(name), index_bytes(record.rows for record in own)),
            shards=tuple(record.info for record in own),
        )
        for name, own in by_split.items()
    }


def publish_rejects(work: Publisher, rejects: Sequence[Reject]) -> FileInfo | None:
    """Write rejects.jsonl, if it has lines; returns its entry in the manifest."""
    if not rejects:
        return None
    lines = b"".join(msgspec.json.encode(reject) + b"\n" for reject in rejects)
    return publish_file(work, REJECTS_NAME, lines)


def publish_file(work: Publisher, name: str, data: bytes) -> FileInfo:
    """Write a file of the set; returns its entry in the manifest."""
    work.publish(name, data)
    return FileInfo(name, len(data), hashlib.sha256(data).hexdigest())


def split_of(record: ShardRecord) -> str:
    """The split of a shard, by the name of its file."""
    return record.info.file.rsplit("-", 1)[0]
