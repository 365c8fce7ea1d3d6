"""An unfinished build in a folder of this machine.

A build collects its files in the work folder `.shardprep-build` of its destination: a lock, every
finished shard, and a record of each. When all files are there, they move to their places, and the
manifest moves last. A set that is replaced stays in use until then. A later build keeps each
shard whose inputs are the same and whose bytes are undamaged, and writes the others.
"""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import msgspec

from shardprep.build.beside import new_card, notes_beside
from shardprep.build.lock import locked, remove_if_unused
from shardprep.build.plan import ShardTask
from shardprep.build.shard import Advance, ShardRecord, write_shard
from shardprep.build.work import (
    RECORD_SUFFIX,
    check_manifest_is_ours,
    is_of,
    is_ours_and_complete,
    may_lie_beside,
)
from shardprep.errors import BuildError
from shardprep.format.card import CARD_NAME, MAX_CARD_BYTES
from shardprep.format.limits import MAX_MANIFEST_BYTES
from shardprep.format.manifest import (
    MANIFEST_NAME,
    REPAIR_FOLDER,
    SOURCE_TIMES_NAME,
    WORK_FOLDER,
    FileInfo,
    ShardInfo,
    decode_manifest,
)
from shardprep.storage.courtesies import without_notes
from shardprep.storage.local import (
    exists,
    move,
    publish,
    publish_bytes,
    read_at_most,
    remove_folder,
    sha256_of,
    sync_folder,
)
from shardprep.storage.trouble import machine_errors, storage_errors

# Work folders that may hold the manifest of a complete set.
_PENDING = (REPAIR_FOLDER, WORK_FOLDER)
# Most bytes in the record of a shard for each utterance.
_MOST_RECORD = 1 << 14


@dataclass(frozen=True)
class FolderWork:
    """An unfinished build in a folder; see `Work`.

    Attributes:
        folder: The work folder, which lies in the shard folder.
    """

    folder: Path

    @property
    def target(self) -> Path:
        """The shard folder."""
        return self.folder.parent

    @classmethod
    @contextlib.contextmanager
    def claim(cls, target: Path, overwrite: bool) -> Iterator[FolderWork | None]:
        """See `Work.claim`. The lock of the work folder keeps all other builds out."""
        with storage_errors(target):
            if foreign := _foreign(target):
                raise BuildError(
                    f"the folder is not empty and holds no shards, but {foreign[0]}",
                    file=target,
                    remedy="Name a new folder, or one that is empty.",
                )
            unfinished = _is_folder(target / WORK_FOLDER) or _is_folder(target / REPAIR_FOLDER)
            if _is_finished(target) and not unfinished and not overwrite:
                yield None
                return
            _check_manifest_of(target)
            with locked(target) as folder:
                finish_install(target)
                # Only under the lock is it certain that no other build finishes the set.
                if _is_finished(target) and not overwrite:
                    # Without shards, a build left the work folder that was killed in its last
                    # step. With shards, it is that of an unfinished build with --overwrite.
                    if not any(name.endswith(".tar") for name in os.listdir(folder)):
                        remove_folder(folder)
                    yield None
                    return
                try:
                    yield cls(folder)
                finally:
                    # What an append that had nothing to write leaves, or one that was refused.
                    with contextlib.suppress(OSError):
                        if _is_finished(target):
                            remove_if_unused(folder)

    def keep_finished(self, tasks: Sequence[ShardTask]) -> dict[str, ShardRecord]:
        """See `Work.keep_finished`."""
        kept = {task.plan.file: record for task in tasks if (record := self._kept(task))}
        for path in self.folder.iterdir():
            name = path.name.removesuffix(RECORD_SUFFIX)
            ours = is_ours_and_complete(name) or name == MANIFEST_NAME or path.suffix == ".tmp"
            if name not in kept and ours:
                path.unlink()
        return kept

    def __call__(self, task: ShardTask, advance: Advance) -> ShardRecord:
        """See `Work.__call__`."""
        # The build itself flushes files to the same disk, and logs a note for all workers.
        with without_notes(), publish(self.folder / task.plan.file) as file:
            record = write_shard(task, file, advance)
            publish_bytes(self._record(task), msgspec.json.encode(record))
        return record

    def publish(self, name: str, data: bytes) -> None:
        """See `Work.publish`."""
        publish_bytes(self.folder / name, data)

    def install(self, files: Mapping[str, FileInfo | ShardInfo], manifest: bytes) -> list[str]:
        """See `Work.install`."""
        own_card = self.move_files(files, manifest)
        with storage_errors(self.target):
            self.remove()
            sync_folder(self.target)
            return list(notes_beside(os.listdir(self.target), own_card))

    def remove(self) -> None:
        """See `Work.remove`."""
        remove_folder(self.folder)

    def move_files(self, files: Collection[str], manifest: bytes) -> bool:
        """`install`, but keep the work folder, which may have the lock.

        Returns:
            Whether a README.md stays that no build has written.
        """
        target = self.target
        with storage_errors(target):
            # Checked before the old set is given up.
            places = (target / MANIFEST_NAME, *(target / name for name in files), *_ours(target))
            refuse_folders(places)
            (target / MANIFEST_NAME).unlink(missing_ok=True)
            sync_folder(target)
            for path in (*_ours(target), *_ours(self.folder)):
                if path.name not in files:
                    path.unlink()
            for name in files:
                if exists(self.folder / name):
                    move(self.folder / name, target / name)
            written = self._write_card(manifest)
            sync_folder(target)
            publish_bytes(target / MANIFEST_NAME, manifest, scratch=self.folder)
            sync_folder(target)
        return not written

    def _write_card(self, manifest: bytes) -> bool:
        """Write the dataset card; whether it was written."""
        path = self.target / CARD_NAME
        present: bytes | None
        try:
            present = read_at_most(path, MAX_CARD_BYTES)
        except FileNotFoundError:
            present = None
        except OSError:
            # It is no file, or too large for a card, or not ours to read.
            return False
        text = new_card(present, decode_manifest(manifest, self.target / MANIFEST_NAME))
        if text is not None:
            publish_bytes(path, text, scratch=self.folder)
        return text is not None

    def _record(self, task: ShardTask) -> Path:
        return self.folder / f"{task.plan.file}{RECORD_SUFFIX}"

    def _kept(self, task: ShardTask) -> ShardRecord | None:
        most = _MOST_RECORD * (1 + len(task.plan.utterances))
        try:
            with machine_errors(self.folder):
                data = read_at_most(self._record(task), most)
                record = msgspec.json.decode(data, type=ShardRecord)
                shard = self.folder / task.plan.file
                if not exists(shard):
                    # An earlier build, killed during `install`, has moved the shard already.
                    shard = self.target / task.plan.file
                # From the cheap check to the costly one.
                if not is_of(record, task) or shard.stat().st_size != record.info.bytes:
                    return None
                same = not shard.is_symlink() and sha256_of(shard) == record.info.sha256
            return record if same else None
        except (OSError, ValueError, RecursionError):
            return None


def has_pending(target: Path) -> bool:
    """Whether a folder without a set holds a complete one, whose files a killed program moved."""
    return not _is_finished(target) and any(exists(target / n / MANIFEST_NAME) for n in _PENDING)


def finish_install(target: Path) -> str | None:
    """Finish a `repair --drop` or `build --append` that was killed while it moved its files.

    Both leave the manifest of the complete set in their work folder until then. Everything else
    that an interrupted repair has left is removed. The caller holds the lock of `target`.

    Returns:
        The work folder of the set that is in its place now; None if there was none.
    """
    finished = None
    for name in _PENDING:
        work = FolderWork(target / name)
        manifest = work.folder / MANIFEST_NAME
        if not _is_finished(target) and exists(manifest):
            data = read_at_most(manifest, MAX_MANIFEST_BYTES)
            files = decode_manifest(data, manifest).files()
            if all(_has_size(work, file, info.bytes) for file, info in files.items()):
                # A repair leaves no times of source files.
                times = [SOURCE_TIMES_NAME] if name == WORK_FOLDER else []
                work.move_files([*files, *times], data)
                work.keep_finished([])
                finished = name
        if _is_finished(target):
            # The manifest of a program that was killed before it moved anything.
            manifest.unlink(missing_ok=True)
    shutil.rmtree(target / REPAIR_FOLDER, ignore_errors=True)
    return finished


def refuse_folders(places: Iterable[Path]) -> None:
    """BuildError if a folder is where a file of a set is to be: no file can replace it."""
    for path in places:
        if path.is_dir() and not path.is_symlink():
            raise BuildError(
                "a folder is in the place of a file of the set",
                file=path,
                remedy="Remove it, then run the same command again.",
            )


def _has_size(work: FolderWork, name: str, expected: int) -> bool:
    """Whether a file, moved to its place already or not, has the expected size."""
    path = work.folder / name if exists(work.folder / name) else work.target / name
    return exists(path) and path.is_file() and path.stat().st_size == expected


def _ours(folder: Path) -> list[Path]:
    return [path for path in folder.iterdir() if is_ours_and_complete(path.name)]


def _check_manifest_of(target: Path) -> None:
    path = target / MANIFEST_NAME
    try:
        with machine_errors(path):
            data = read_at_most(path, MAX_MANIFEST_BYTES)
    except (FileNotFoundError, NotADirectoryError):
        return
    except OSError:
        data = b""
    check_manifest_is_ours(path, data)


def _is_finished(target: Path) -> bool:
    return exists(target / MANIFEST_NAME)


def _foreign(target: Path) -> list[str]:
    """What a folder without a set holds that a new set must not lie beside."""
    ours = _is_finished(target) or any(
        _is_folder(target / name) for name in (WORK_FOLDER, REPAIR_FOLDER)
    )
    if ours or not _is_folder(target):
        return []
    return sorted(name for name in os.listdir(target) if not may_lie_beside(name))


def _is_folder(path: Path) -> bool:
    return exists(path) and path.is_dir()
