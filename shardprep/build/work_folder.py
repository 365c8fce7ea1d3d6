"""The folder of an unfinished build: who may write there, and what of it can be kept.

A build gathers its files in the work folder `.shardprep-build` of its destination: a lock, every
shard that is whole, and a record of each. Only when all are there do they move to their places,
the manifest last; a set that is to be replaced stays in use until then. A later build keeps each
shard whose inputs are still the same and whose bytes are whole, and writes the others.
"""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import filelock
import msgspec

from shardprep.build.pool import Advance
from shardprep.build.shard import ShardRecord, ShardTask, write_shard
from shardprep.build.work import _OURS, RECORD_SUFFIX, check_manifest_is_ours, is_of
from shardprep.errors import BuildError
from shardprep.format.limits import MAX_MANIFEST_BYTES
from shardprep.format.manifest import (
    MANIFEST_NAME,
    REPAIR_FOLDER,
    WORK_FOLDER,
    FileInfo,
    ShardInfo,
    decode_manifest,
)
from shardprep.storage.local import (
    publish,
    publish_bytes,
    read_at_most,
    sha256_of,
    storage_errors,
    sync_folder,
)

_LOCK_NAME = "lock"
# Bytes that the record of a shard takes for each utterance, at most.
_MOST_RECORD = 1 << 14


@contextlib.contextmanager
def claim(target: Path, overwrite: bool) -> Iterator[Path | None]:
    """Hold `target` for one build, so that no other can write there meanwhile.

    Args:
        target: The shard folder; made if need be.
        overwrite: Whether a finished set is to be replaced.

    Yields:
        The work folder; or None if `target` holds a finished set and `overwrite` is off.

    Raises:
        BuildError: Another build holds the folder, or it contains something else.
    """
    work = target / WORK_FOLDER
    with storage_errors(target):
        if _is_foreign(target):
            raise BuildError(
                "the folder is not empty and holds no shards",
                file=target,
                remedy="Name another folder, or empty this one.",
            )
        busy = work.is_dir() or (target / REPAIR_FOLDER).is_dir()
        if _is_finished(target) and not busy and not overwrite:
            yield None
            return
        _check_manifest_of(target)
        with hold(target) as work:
            finish_repair(target)
            # Only now is it certain that nobody else is about to finish the set.
            if _is_finished(target) and not overwrite:
                # What is left of a build that was killed as it finished; shards in it would be
                # those of one that is to replace the set.
                if not any(work.glob("*.tar")):
                    shutil.rmtree(work)
                yield None
                return
            yield work


@contextlib.contextmanager
def hold(target: Path) -> Iterator[Path]:
    """Make the work folder of `target`, if need be, and be the only one who writes there.

    Yields:
        The work folder.

    Raises:
        BuildError: Somebody else holds it, or it is a link to another place.
    """
    work = target / WORK_FOLDER
    for path in (work, work / _LOCK_NAME, target / REPAIR_FOLDER):
        if path.is_symlink():
            raise BuildError(
                "is a link, and nothing is written or removed where it leads",
                file=path,
                remedy="Remove it.",
            )
    work.mkdir(parents=True, exist_ok=True)
    # A lock of the operating system: gone with the process that held it, however it died.
    lock = filelock.FileLock(work / _LOCK_NAME)
    try:
        lock.acquire(timeout=0)
    except filelock.Timeout:
        raise BuildError(
            "another build or repair is at work in this folder",
            file=work.parent,
            remedy="Wait for it to end.",
        ) from None
    try:
        yield work
    finally:
        lock.release()


def finish_repair(target: Path) -> bool:
    """Go on where a repair was killed as it put a set of fewer utterances in its place.

    Whatever else an interrupted repair left is removed. The caller holds `target`.

    Returns:
        Whether there was such a set, which is in its place now.
    """
    work = target / REPAIR_FOLDER
    pending = work / MANIFEST_NAME
    if not _is_finished(target) and pending.exists():
        data = read_at_most(pending, MAX_MANIFEST_BYTES)
        files = decode_manifest(data, pending).files()
        if all(_has_size(work, name, info.bytes) for name, info in files.items()):
            install(work, files, data)
            return True
    shutil.rmtree(work, ignore_errors=True)
    return False


def _has_size(work: Path, name: str, expected: int) -> bool:
    path = work / name if (work / name).exists() else work.parent / name
    return path.is_file() and path.stat().st_size == expected


def let_go(work: Path) -> None:
    """Remove a work folder that holds nothing but the lock; for its holder."""
    if all(path.name == _LOCK_NAME for path in work.iterdir()):
        shutil.rmtree(work)


def keep_finished(tasks: Sequence[ShardTask], work: Path) -> dict[str, ShardRecord]:
    """Records of the shards of an earlier run that still hold, by file name.

    What else earlier runs left in the work folder is removed.
    """
    kept = {task.plan.file: record for task in tasks if (record := _kept(task, work))}
    for path in work.iterdir():
        name = path.name.removesuffix(RECORD_SUFFIX)
        if name not in kept and (_OURS.fullmatch(name) or path.suffix == ".tmp"):
            path.unlink()
    return kept


@dataclass(frozen=True)
class FolderWork:
    """An unfinished build in a work folder; see `Work`."""

    work: Path

    @property
    def target(self) -> Path:
        """The shard folder."""
        return self.work.parent

    def keep_finished(self, tasks: Sequence[ShardTask]) -> dict[str, ShardRecord]:
        """See `keep_finished`."""
        return keep_finished(tasks, self.work)

    def publish(self, name: str, data: bytes) -> None:
        """See `Work.publish`."""
        publish_bytes(self.work / name, data)

    def install(self, files: Mapping[str, FileInfo | ShardInfo], manifest: bytes) -> None:
        """See `install`."""
        install(self.work, files, manifest)

    def __call__(self, task: ShardTask, advance: Advance) -> ShardRecord:
        """See `Work.__call__`."""
        with publish(self.work / task.plan.file) as file:
            record = write_shard(task, file, advance)
            publish_bytes(_record_path(self.work, task), msgspec.json.encode(record))
        return record


def install(work: Path, names: Collection[str], manifest: bytes) -> None:
    """Move the files of a complete set to their places, in the place of a set before it.

    A build that is killed here finds the files where they are, and moves the rest.

    Args:
        work: The work folder; it is removed at the end.
        names: All files of the set but the manifest, each in the work folder or moved already.
        manifest: Content of manifest.json, which comes last.
    """
    target = work.parent
    with storage_errors(target):
        # Before the set that is there is given up.
        for path in (target / MANIFEST_NAME, *(target / name for name in names), *_ours(target)):
            if path.is_dir():
                raise BuildError(
                    "a folder is in the place of a file of the set",
                    file=path,
                    remedy="Remove it, then run the same command again.",
                )
        (target / MANIFEST_NAME).unlink(missing_ok=True)
        sync_folder(target)
        for path in (*_ours(target), *_ours(work)):
            if path.name not in names:
                path.unlink()
        for name in names:
            if (work / name).exists():
                os.replace(work / name, target / name)
        sync_folder(target)
        publish_bytes(target / MANIFEST_NAME, manifest, scratch=work)
        shutil.rmtree(work)
        sync_folder(target)


def _ours(folder: Path) -> list[Path]:
    return [path for path in folder.iterdir() if _OURS.fullmatch(path.name)]


def _check_manifest_of(target: Path) -> None:
    path = target / MANIFEST_NAME
    try:
        data = read_at_most(path, MAX_MANIFEST_BYTES)
    except (FileNotFoundError, NotADirectoryError):
        return
    except OSError:
        data = b""
    check_manifest_is_ours(path, data)


def _is_finished(target: Path) -> bool:
    return (target / MANIFEST_NAME).exists()


def _is_foreign(target: Path) -> bool:
    ours = _is_finished(target) or any(
        (target / name).is_dir() for name in (WORK_FOLDER, REPAIR_FOLDER)
    )
    return target.is_dir() and not ours and any(target.iterdir())


def _kept(task: ShardTask, work: Path) -> ShardRecord | None:
    most = _MOST_RECORD * (1 + len(task.plan.utterances))
    try:
        data = read_at_most(_record_path(work, task), most)
        record = msgspec.json.decode(data, type=ShardRecord)
        shard = work / task.plan.file
        if not shard.exists():
            # Killed while it was moving files, an earlier build has brought it home already.
            shard = work.parent / task.plan.file
        # From the cheap check to the costly one.
        if not is_of(record, task) or shard.stat().st_size != record.info.bytes:
            return None
        whole = not shard.is_symlink() and sha256_of(shard) == record.info.sha256
        return record if whole else None
    except (OSError, ValueError, RecursionError):
        return None


def _record_path(work: Path, task: ShardTask) -> Path:
    return work / f"{task.plan.file}{RECORD_SUFFIX}"
