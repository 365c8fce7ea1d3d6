"""A build whose destination is an object store: what `shardprep.build.work_folder` is for a folder.

Objects appear whole or not at all, but nothing can be locked, and to rename is to copy. So shards
go to their final places at once, and only where a finished set is to be replaced into the work
folder first. The manifest comes last in either case. Beside each shard's place in the work folder
goes a record of it, with what the store calls its version, so that a later build knows without
fetching anything which shards are there.
"""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TypeVar

import msgspec

from shardprep.build.pool import Advance
from shardprep.build.shard import ShardRecord, ShardTask, write_shard
from shardprep.build.work import RECORD_SUFFIX, check_manifest_is_ours, is_of, is_ours
from shardprep.errors import BuildError, StorageError
from shardprep.format.limits import MAX_MANIFEST_BYTES
from shardprep.format.manifest import MANIFEST_NAME, WORK_FOLDER, FileInfo, ShardInfo
from shardprep.storage.remote import Remote

# Requests at once, and bytes that are read at a time.
_REQUESTS = 16
_BLOCK = 16 << 20

Item = TypeVar("Item")
Result = TypeVar("Result")

# How the names of files in the work folder begin, in a listing.
_AHEAD = f"{WORK_FOLDER}/"


class _Sent(msgspec.Struct, frozen=True):
    """The record of a shard, and what the store calls the version that was sent."""

    record: ShardRecord
    version: str


@dataclass(frozen=True)
class StoreWork:
    """An unfinished build in an object store; see `shardprep.build.work_folder.Work`.

    Attributes:
        target: Where the set goes.
        replaces: Whether a finished set is there, which stays in use until the new one is whole.
    """

    target: Remote
    replaces: bool

    @property
    def folder(self) -> Remote:
        """The work folder."""
        return self.target / WORK_FOLDER

    def keep_finished(self, tasks: Sequence[ShardTask]) -> dict[str, ShardRecord]:
        """Records of the shards of an earlier run that still hold, by file name.

        What else earlier runs left in the work folder is removed.
        """
        records = zip(tasks, _each(self._kept, tasks), strict=True)
        kept = {task.plan.file: record for task, record in records if record is not None}
        others = [n for n in self.folder.listing() if n.removesuffix(RECORD_SUFFIX) not in kept]
        _each(lambda name: (self.folder / name).remove(), others)
        return kept

    def __call__(self, task: ShardTask, advance: Advance) -> ShardRecord:
        """Write the shard of a task, and then its record; see `shard.write_shard`."""
        shard = self._place(task.plan.file)
        with shard.publish() as file:
            record = write_shard(task, file, advance)
        size, version = shard.version()
        if size != record.info.bytes:
            raise StorageError(
                f"has {size} bytes in the store, but {record.info.bytes} were sent",
                file=shard,
                remedy="Run the same command again; another build may be at work there.",
            )
        self._record(task).write(msgspec.json.encode(_Sent(record, version)))
        return record

    def publish(self, name: str, data: bytes) -> None:
        """Write another file of the set."""
        self._place(name).write(data)

    def install(self, files: Mapping[str, FileInfo | ShardInfo], manifest: bytes) -> None:
        """Make the set complete: what is in the work folder goes to its place, the manifest last.

        A build that is killed here finds the files where they are, and moves the rest.
        """
        there = self.target.listing()
        waiting = [name for name in files if _AHEAD + name in there]
        for name, info in files.items():
            found = there.get(_AHEAD + name if name in waiting else name)
            if found is None or found["size"] != info.bytes:
                raise StorageError(
                    "is missing in the store, or has another size than was sent",
                    file=self.target / name,
                    remedy="Run the same command again; another build may be at work there.",
                )
        if MANIFEST_NAME in there:
            (self.target / MANIFEST_NAME).remove()
        _each(lambda name: (self.folder / name).move(self.target / name), waiting)
        stale = [name for name in there if is_ours(name) and name not in files]
        _each(lambda name: (self.target / name).remove(), stale)
        (self.target / MANIFEST_NAME).write(manifest)
        self.remove()

    def remove(self) -> None:
        """Remove the work folder."""
        _each(lambda name: (self.folder / name).remove(), self.folder.listing())

    def _place(self, name: str) -> Remote:
        return self.folder / name if self.replaces else self.target / name

    def _record(self, task: ShardTask) -> Remote:
        return self.folder / f"{task.plan.file}{RECORD_SUFFIX}"

    def _kept(self, task: ShardTask) -> ShardRecord | None:
        try:
            sent = msgspec.json.decode(self._record(task).read(), type=_Sent)
        except (FileNotFoundError, ValueError, RecursionError):
            return None
        info = sent.record.info
        if not is_of(sent.record, task):
            return None
        # Sent into the work folder, or from there, by a build that was killed, to its place.
        for place in (self.folder / info.file, self.target / info.file):
            with contextlib.suppress(FileNotFoundError):
                size, version = place.version()
                same = bool(version) and version == sent.version
                # A copy may have another version, and some stores have none.
                if size == info.bytes and (same or _sha256(place, size) == info.sha256):
                    return sent.record
        return None


@contextlib.contextmanager
def claim_store(target: Remote, overwrite: bool) -> Iterator[StoreWork | None]:
    """Look whether a build may write to a place in an object store.

    Nobody can be kept from writing there at the same time: one build at a time is up to the user.

    Args:
        target: Where the set goes.
        overwrite: Whether a finished set is to be replaced.

    Yields:
        The work to do; or None if there is a finished set and `overwrite` is off.

    Raises:
        BuildError: The place holds something else.
        StorageError: It cannot be written to.
    """
    target.check_writable()
    there = target.listing()
    finished = MANIFEST_NAME in there
    if finished:
        written = target / MANIFEST_NAME
        check_manifest_is_ours(written, written.read(0, MAX_MANIFEST_BYTES))
    foreign = [n for n in there if not is_ours(n) and not n.startswith(_AHEAD)]
    if foreign and not finished:
        raise BuildError(
            f"holds other things than shards, such as {foreign[0]}",
            file=target,
            remedy="Name another place, or empty this one.",
        )
    work = StoreWork(target, replaces=finished)
    if not finished or overwrite:
        yield work
        return
    # What is left of a build that was killed as it finished; shards in it would be those of one
    # that is to replace the set.
    if not any(n.startswith(_AHEAD) and n.endswith(".tar") for n in there):
        work.remove()
    yield None


def _each(call: Callable[[Item], Result], items: Iterable[Item]) -> list[Result]:
    with ThreadPoolExecutor(_REQUESTS) as threads:
        return list(threads.map(call, items))


def _sha256(file: Remote, size: int) -> str:
    digest = hashlib.sha256()
    for begin in range(0, size, _BLOCK):
        digest.update(file.read(begin, min(begin + _BLOCK, size)))
    return digest.hexdigest()
