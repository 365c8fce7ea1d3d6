"""Files of this machine: a file gets its final name only when it is complete and on the disk."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import io
import os
import re
import shutil
import stat
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO, cast

from shardprep.storage.courtesies import NOT_HERE, note_once
from shardprep.storage.trouble import BadPlaceError, FileFault, storage_errors

_BLOCK = 1 << 20
# Errors of a system that flushes no folders, or opens none, beside the usual ones.
_NOT_FOR_FOLDERS = NOT_HERE | {errno.EBADF, errno.EISDIR}
# Names of files that this process has open.
_OPEN = re.compile(r"/(?:dev|proc/self)/fd/([0-9]{1,9})")
_STANDARD = {"/dev/stdout": 1, "/dev/stderr": 2}


@contextlib.contextmanager
def publish(path: Path, scratch: Path | None = None) -> Iterator[BinaryIO]:
    """Write a file under a temporary name and rename it to `path` after a clean finish.

    The data are flushed to the disk before the rename, and the folder after it: after a power cut,
    `path` is complete or does not exist.

    Args:
        path: The final name; an existing file is replaced, a missing folder made. A device, and
            the name of an open file such as /dev/stdout, is written to as it is.
        scratch: Folder of the temporary name, on the same file system; by default that of `path`.

    Yields:
        The file, to write to.

    Raises:
        StorageError: The file cannot be written. Nothing is left behind.
    """
    with storage_errors(path):
        if (stream := _stream(path)) is not None:
            with os.fdopen(stream, "wb", buffering=_BLOCK) as file:
                yield file
            return
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(
            prefix=f"{path.name}.", suffix=".tmp", dir=scratch or path.parent
        )
        try:
            with os.fdopen(handle, "wb", buffering=_BLOCK) as file:
                yield file
                file.flush()
                _open_to_others(file.fileno())
                _flush(file.fileno(), path)
            if scratch is None:
                os.replace(name, path)
            else:
                move(Path(name), path)
        except BaseException:
            with contextlib.suppress(OSError):
                os.unlink(name)
            raise
        sync_folder(path.parent)


def _stream(path: Path) -> int | None:
    """A handle for what no file may replace: a device, or the name of an open file."""
    found = _OPEN.fullmatch(str(path))
    number = int(found[1]) if found else _STANDARD.get(str(path))
    if number is not None:
        return os.dup(number)
    with contextlib.suppress(FileNotFoundError, NotADirectoryError):
        if stat.S_ISCHR(os.lstat(path).st_mode):
            return os.open(path, os.O_WRONLY)
    return None


def lasting(path: Path) -> Path:
    """The same path where the program goes to another folder before it opens the file."""
    with contextlib.suppress(FileNotFoundError):
        return path.absolute()
    # The current folder was removed, but the path may lead out of it.
    with contextlib.suppress(OSError):
        handle = os.open(path, os.O_RDONLY)
        try:
            return Path(os.readlink(f"/proc/self/fd/{handle}"))
        finally:
            os.close(handle)
    return path


def publish_bytes(path: Path, data: bytes, scratch: Path | None = None) -> None:
    """Publish `data` as the file `path`; see `publish`."""
    with publish(path, scratch) as file:
        file.write(data)


def sync_folder(folder: Path) -> None:
    """Flush the entries of a folder (new names, removed names) to the disk.

    Some file systems cannot (CIFS, vboxsf, WSL on a share), and some let nobody open a folder. Then
    a note says so.
    """
    try:
        handle = os.open(folder, os.O_RDONLY)
    except OSError as error:
        if error.errno not in _NOT_FOR_FOLDERS:
            raise
        _note_unflushed(folder, error)
        return
    try:
        _flush(handle, folder)
    finally:
        os.close(handle)


def _flush(handle: int, path: Path) -> None:
    """Flush an open file or folder to the disk, if its file system can do that."""
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno not in _NOT_FOR_FOLDERS:
            raise
        _note_unflushed(path, error)


def _note_unflushed(path: Path, error: OSError) -> None:
    note_once(
        "flush",
        f"the file system of {path} cannot flush it to the disk ({error.strerror}): what is "
        "written there may not survive a power cut",
    )


def move(source: Path, target: Path) -> None:
    """Give a complete file another name, in place of a file that has it.

    Raises:
        OSError: The file cannot be moved. It is where it was.
    """
    try:
        os.replace(source, target)
    except OSError as error:
        # Some file systems are several disks behind one mount.
        if error.errno != errno.EXDEV:
            raise
        with publish(target) as file, open_regular(source) as contents:
            shutil.copyfileobj(contents, file, _BLOCK)
        source.unlink()


def remove_folder(folder: Path) -> None:
    """Remove a folder with all that is in it.

    Where a file in it is open, as a lock may be, NFS gives the file another name, and the folder
    stays until the file is closed. Nobody has to wait for that.

    Raises:
        OSError: A file cannot be removed.
    """
    try:
        shutil.rmtree(folder)
    except OSError as error:
        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST, errno.EBUSY):
            raise


def temporary_place() -> str:
    """Where temporary files go, for messages."""
    return os.environ.get("TMPDIR") or "/tmp"


def exists(path: Path) -> bool:
    """Whether there is a file or a folder of this name, or what a link leads to.

    Raises:
        OSError: Nobody can tell; `Path.exists` of newer Pythons says no.
    """
    try:
        os.stat(path)
    except (FileNotFoundError, NotADirectoryError):
        return False
    return True


def fetch(path: str | os.PathLike[str]) -> None:
    """Have the system read a file into its cache, without waiting for it.

    An error is ignored here: the reader of the file will get it.
    """
    with contextlib.suppress(OSError):
        handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
        try:
            if hasattr(os, "posix_fadvise"):
                os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_WILLNEED)
        finally:
            os.close(handle)


_readinto = io.FileIO.readinto


class _SecondLook(io.FileIO):
    """A file whose reads are tried twice where the disk fails: some errors pass."""

    def readinto(self, buffer: Any) -> Any:
        """See `io.FileIO`. BadPlaceError if the disk fails again."""
        try:
            return _readinto(self, buffer)
        except OSError as error:
            if error.errno != errno.EIO:
                raise
        try:
            return _readinto(self, buffer)
        except OSError as error:
            if error.errno != errno.EIO:
                raise
            raise BadPlaceError(os.fspath(self.name), self.tell()) from error


def open_regular(path: str | os.PathLike[str]) -> io.BufferedReader:
    """Open a regular file for reading; where the disk fails, each read is tried twice.

    Raises:
        FileFault: It is a pipe, a device or a folder. Those could keep their reader waiting, or
            never end.
        OSError: The file cannot be opened.
    """
    # Without O_NONBLOCK, to open a pipe waits for a writer.
    flags = os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC
    try:
        file = _SecondLook(path, opener=lambda name, _: os.open(name, flags))
    except OSError as error:
        # A folder; or a socket, which cannot be opened.
        if error.errno in (errno.EISDIR, errno.ENXIO) and not stat.S_ISREG(os.stat(path).st_mode):
            raise _not_regular(path) from None
        raise
    if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
        file.close()
        raise _not_regular(path)
    return io.BufferedReader(file)


def _not_regular(path: str | os.PathLike[str]) -> FileFault:
    return FileFault(errno.EINVAL, "it is not a regular file", os.fspath(path))


def read_span(file: io.BufferedReader, offset: int, size: int) -> bytes:
    """The bytes of a file of `open_regular` from a place on; fewer where the file ends.

    Nothing around them is read, which a failing disk may refuse.

    Raises:
        BadPlaceError: The disk cannot read them.
        OSError: They cannot be read.
    """
    raw = cast(io.FileIO, file.raw)
    raw.seek(offset)
    data = bytearray(size)
    view, done = memoryview(data), 0
    while done < size and (count := raw.readinto(view[done:])):
        done += count
    return bytes(view[:done])


def read_at_most(path: str | os.PathLike[str], most: int) -> bytes:
    """The bytes of a regular file of at most `most` bytes.

    Raises:
        FileFault: The file is larger, or is not a regular file.
        OSError: The file cannot be read.
    """
    with open_regular(path) as file:
        size = os.fstat(file.fileno()).st_size
        if size > most:
            what = f"it has {size} bytes, more than the {most} that such a file may have"
            raise FileFault(errno.EFBIG, what, os.fspath(path))
        return file.read(size)


def sha256_of(path: Path) -> str:
    """SHA-256 of a file's bytes, as lower-case hex digits. OSError if it is no regular file."""
    with open_regular(path) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _open_to_others(handle: int) -> None:
    """Give a temporary file, which is its owner's alone, the permissions of an ordinary file."""
    try:
        os.fchmod(handle, 0o666 & ~_umask())
    except OSError as error:
        # The permissions of all files follow from the mount.
        if error.errno not in NOT_HERE:
            raise


def _umask() -> int:
    # To ask by os.umask changes the umask of all threads for a moment.
    with contextlib.suppress(OSError), open("/proc/self/status", "rb") as status:
        for line in status:
            if line.startswith(b"Umask:"):
                return int(line.split()[1], 8)
    mask = os.umask(0)
    os.umask(mask)
    return mask
