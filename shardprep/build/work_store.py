"""An unfinished build in an object store.

In a store, objects appear complete or not at all, but there are no locks, and renaming means
copying. So shards go to their final places at once. Only if the build replaces a finished set do
they go to the work folder first. The manifest comes last in both cases. A record of each shard goes
to the work folder, with the version (ETag) that the store gave the shard. From the records a later
build knows which shards are there without fetching them.
"""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, TypeVar

import msgspec

from shardprep.build.beside import new_card, notes_beside
from shardprep.build.plan import ShardTask
from shardprep.build.shard import Advance, ShardRecord, write_shard
from shardprep.build.work import (
    RECORD_SUFFIX,
    check_manifest_is_ours,
    is_of,
    is_ours,
    may_lie_beside,
)
from shardprep.errors import BuildError, StorageError
from shardprep.format.card import CARD_NAME, MAX_CARD_BYTES
from shardprep.format.limits import MAX_MANIFEST_BYTES
from shardprep.format.manifest import (
    MANIFEST_NAME,
    WORK_FOLDER,
    FileInfo,
    ShardInfo,
    decode_manifest,
)
from shardprep.storage.remote import Remote

# Requests at the same time, and bytes of one read.
_REQUESTS = 16
_BLOCK = 16 << 20

Item = TypeVar("Item")
Result = TypeVar("Result")

# In a listing, the names of files in the work folder begin with this.
_IN_WORK = f"{WORK_FOLDER}/"


class _Sent(msgspec.Struct, frozen=True):
    """The record of a shard, and the version that the store gave it."""

    record: ShardRecord
    version: str


@dataclass(frozen=True)
class StoreWork:
    """An unfinished build in an object store; see `Work`.

    Attributes:
        target: The place of the shard set.
        replaces: Whether it replaces a finished set, which stays in use until the end.
    """

    target: Remote
    replaces: bool

    @property
    def folder(self) -> Remote:
        """The work folder."""
        return self.target / WORK_FOLDER

    @classmethod
    @contextlib.contextmanager
    def claim(cls, target: Remote, overwrite: bool) -> Iterator[StoreWork | None]:
        """See `Work.claim`. No other build can be kept out: the user must run one at a time."""
        target.check_writable()
        present = target.listing()
        if MANIFEST_NAME not in present and _IN_WORK + MANIFEST_NAME in present:
            _finish_install(cls(target, replaces=True), present)
            present = target.listing()
        finished = MANIFEST_NAME in present
        if finished:
            manifest = target / MANIFEST_NAME
            check_manifest_is_ours(manifest, manifest.read(0, MAX_MANIFEST_BYTES))
        foreign = [name for name in present if not is_ours(name) and not may_lie_beside(name)]
        if foreign and not finished:
            raise BuildError(
                f"holds other things than shards, such as {foreign[0]}",
                file=target,
                remedy="Name a place where nothing is yet.",
            )
        work = cls(target, replaces=finished)
        if not finished or overwrite:
            yield work
            return
        # Without shards, a build left the work folder that was killed in its last step. With
        # shards, it is that of an unfinished build with --overwrite.
        if not any(n.startswith(_IN_WORK) and n.endswith(".tar") for n in present):
            work.remove()
        yield None

    def keep_finished(self, tasks: Sequence[ShardTask]) -> dict[str, ShardRecord]:
        """See `Work.keep_finished`."""
        records = zip(tasks, _each(self._kept, tasks), strict=True)
        kept = {task.plan.file: record for task, record in records if record is not None}
        others = [n for n in self.folder.listing() if n.removesuffix(RECORD_SUFFIX) not in kept]
        _each(lambda name: (self.folder / name).remove(), others)
        return kept

    def __call__(self, task: ShardTask, advance: Advance) -> ShardRecord:
        """See `Work.__call__`."""
        shard = self._place(task.plan.file)
        with shard.publish() as file:
            record = write_shard(task, file, advance)
        size, version = shard.version()
        if size != record.info.bytes:
            raise StorageError(
                f"has {size} bytes in the store, but {record.info.bytes} were sent",
                file=shard,
                remedy="Run the same command again; another build may be running there.",
            )
        self._record(task).write(msgspec.json.encode(_Sent(record, version)))
        return record

    def publish(self, name: str, data: bytes) -> None:
        """See `Work.publish`."""
        self._place(name).write(data)

    def install(self, files: Mapping[str, FileInfo | ShardInfo], manifest: bytes) -> list[str]:
        """See `Work.install`."""
        present = self.target.listing()
        waiting = [name for name in files if _IN_WORK + name in present]
        for name, info in files.items():
            found = present.get(_IN_WORK + name if name in waiting else name)
            if found is None or found["size"] != info.bytes:
                raise StorageError(
                    "is missing in the store, or has another size than was sent",
                    file=self.target / name,
                    remedy="Run the same command again; another build may be running there.",
                )
        # No set has these names yet: a set that is there stays in use while they are copied.
        free = [name for name in waiting if name not in present]
        _each(lambda name: (self.folder / name).move(self.target / name), free)
        if MANIFEST_NAME in present:
            (self.target / MANIFEST_NAME).remove()
        others = [name for name in waiting if name in present]
        _each(lambda name: (self.folder / name).move(self.target / name), others)
        stale = [name for name in present if is_ours(name) and name not in files]
        _each(lambda name: (self.target / name).remove(), stale)
        written = self._write_card(manifest)
        (self.target / MANIFEST_NAME).write(manifest)
        self.remove()
        return list(notes_beside(present, not written))

    def _write_card(self, manifest: bytes) -> bool:
        """Write the dataset card; whether it was written."""
        path = self.target / CARD_NAME
        present = None
        with contextlib.suppress(FileNotFoundError):
            present = path.read(0, MAX_CARD_BYTES)
        text = new_card(present, decode_manifest(manifest, self.target / MANIFEST_NAME))
        if text is not None:
            path.write(text)
        return text is not None

    def remove(self) -> None:
        """See `Work.remove`."""
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
        # In the work folder; or in its place, where a build that was killed later has moved it.
        for place in (self.folder / info.file, self.target / info.file):
            with contextlib.suppress(FileNotFoundError):
                size, version = place.version()
                same_version = bool(version) and version == sent.version
                # A copy may get another version, and some stores have no versions.
                if size == info.bytes and (same_version or _sha256(place, size) == info.sha256):
                    return sent.record
        return None


def _finish_install(work: StoreWork, present: Mapping[str, dict[str, Any]]) -> None:
    """Finish a `build --append` that was killed between the old manifest and the new one."""
    pending = work.folder / MANIFEST_NAME
    data = pending.read(0, MAX_MANIFEST_BYTES)
    files = decode_manifest(data, pending).files()
    sizes = [
        present.get(_IN_WORK + name, present.get(name, {"size": -1}))["size"] for name in files
    ]
    if sizes == [info.bytes for info in files.values()]:
        work.install(files, data)


def _each(call: Callable[[Item], Result], items: Iterable[Item]) -> list[Result]:
    with ThreadPoolExecutor(_REQUESTS) as threads:
        return list(threads.map(call, items))


def _sha256(file: Remote, size: int) -> str:
    digest = hashlib.sha256()
    for begin in range(0, size, _BLOCK):
        digest.update(file.read(begin, min(begin + _BLOCK, size)))
    return digest.hexdigest()
