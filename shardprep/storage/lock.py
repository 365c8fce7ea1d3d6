"""A lock file: one process holds it at a time, and the lock ends with the process.

    LOCK          locked by the operating system (flock); it says which process holds the lock
    LOCK.holder   where the file system has no such locks (Lustre without -o flock, NFS without
                  lockd, some FUSE): this file is the lock, as long as the process in it runs

A LOCK.holder of this machine is taken over when its process has ended. Whether a process of another
machine still runs, nobody can see from here: its LOCK.holder counts until it is removed by hand.
"""

from __future__ import annotations

import contextlib
import errno
import os
import socket
from collections.abc import Iterator
from pathlib import Path

import msgspec

from shardprep.errors import StorageError
from shardprep.storage.courtesies import NOT_HERE, note_once
from shardprep.storage.trouble import storage_errors
from shardprep.system import at_fork, fcntl

_NO_LOCKS = NOT_HERE | {errno.ENOLCK, errno.ENODEV}
_SUFFIX = ".holder"
_FLAGS = os.O_RDWR | getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_NOFOLLOW", 0)
# More bytes than a holder takes.
_MOST = 4096
# How often the file that was opened may be another one than the file of that name by then. Some
# file systems give a file a new number each time.
_TRIES = 20

# Descriptors of the locks that this process holds.
_held: set[int] = set()


def _after_fork() -> None:
    # The child has the same open files, and would keep the locks as long as it lives.
    for handle in _held:
        os.close(handle)
    _held.clear()


at_fork(_after_fork)


class LockHeldError(StorageError):
    """A lock is held already; the message names the process and its machine.

    Attributes:
        note: What the process says of itself; see `HeldLock.say`.
        leftover: The file to remove if the process runs no longer; None where the lock ends by
            itself.
        own: Whether it is this very process.
    """

    note = ""
    leftover: Path | None = None
    own = False


class HeldLock:
    """A lock that this process holds.

    Args:
        file: The file that names this process, or its descriptor.
    """

    def __init__(self, file: int | Path) -> None:
        self._file = file

    def say(self, note: str) -> None:
        """Leave a note for other processes that want the lock; nothing else depends on it."""
        with contextlib.suppress(OSError):
            if isinstance(self._file, int):
                _write(self._file, note)
                return
            handle = os.open(self._file, _FLAGS)
            try:
                _write(handle, note)
            finally:
                os.close(handle)


class _Holder(msgspec.Struct, frozen=True):
    """A process that holds a lock.

    Attributes:
        pid: Its number.
        host: Name of its machine.
        machine: Id of this machine; "" if unknown.
        boot: Id of this start of the machine; "" if unknown.
        numbers: Id of the numbers of processes: a container has its own; "" if unknown.
        began: When the process was started, in the system's own unit; "" if unknown.
        note: What it says of itself.
    """

    pid: int
    host: str
    machine: str
    boot: str
    numbers: str
    began: str
    note: str = ""

    def is_this_process(self) -> bool:
        """Whether it is this process."""
        return msgspec.structs.replace(self, note="") == _this_process()

    def has_ended(self) -> bool:
        """Whether the process certainly runs no longer."""
        here = _this_process()
        # Machines without a name of their own are all called localhost.
        if self.host != here.host or self.host.startswith("localhost"):
            return False
        if self.boot != here.boot:
            return self.machine == here.machine != ""
        # On Windows, os.kill would end the process.
        if self.numbers != here.numbers or os.name == "nt":
            return False
        try:
            os.kill(self.pid, 0)
        except ProcessLookupError:
            return True
        except OSError:
            return False
        # Another process may have its number by now.
        return self.began != _beginning(self.pid)


@contextlib.contextmanager
def hold_lock(path: Path) -> Iterator[HeldLock]:
    """Hold a lock file as long as the context lasts; never waits for the lock.

    Args:
        path: The lock file; it and its folder are made if need be. It stays there afterwards.

    Yields:
        The lock.

    Raises:
        LockHeldError: Another process holds the lock, or this process does already.
        StorageError: The file cannot be opened or locked.
    """
    with storage_errors(path):
        handle, locked = _open(path)
    _held.add(handle)
    own = os.getpid()
    holder_file = Path(f"{path}{_SUFFIX}")
    try:
        if locked:
            _check_holder(path, holder_file)
            # The name of the holder is for messages only.
            with contextlib.suppress(OSError):
                _write(handle)
            yield HeldLock(handle)
        else:
            _check_holder(path, path)
            with storage_errors(holder_file):
                _be_holder(path, holder_file)
            note_once(
                "locks",
                f"the file system of {path} has no locks, so {holder_file.name} takes the place "
                "of one: if this process is killed, remove that file before a process of another "
                "machine starts",
            )
            try:
                yield HeldLock(holder_file)
            finally:
                # The folder may have been removed meanwhile, and made again by another process.
                found = _read(holder_file)
                if found is not None and found.is_this_process():
                    holder_file.unlink(missing_ok=True)
    finally:
        # In a forked process, `_after_fork` has closed it.
        if os.getpid() == own:
            _held.discard(handle)
            if locked:
                with contextlib.suppress(OSError):
                    os.ftruncate(handle, 0)
                # Whoever was forked without our knowledge has the same open file.
                with contextlib.suppress(OSError):
                    fcntl.flock(handle, fcntl.LOCK_UN)
            os.close(handle)


def _open(path: Path) -> tuple[int, bool]:
    """Open the lock file; its descriptor, and whether the system has locked it."""
    for last in (*[False] * _TRIES, True):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            handle = os.open(path, _FLAGS | os.O_CREAT, 0o666)
        except FileNotFoundError:
            # Whoever held the lock before has removed the folder just now.
            if last:
                raise
            continue
        try:
            locked = _flock(handle, path)
            # Whoever held the lock before may have removed the file.
            with contextlib.suppress(FileNotFoundError):
                if last or not locked or os.path.samestat(os.fstat(handle), os.stat(path)):
                    return handle, locked
        except BaseException:
            os.close(handle)
            raise
        os.close(handle)
    raise AssertionError("the last try returns")


def _flock(handle: int, path: Path) -> bool:
    """Lock an open file; False if its file system has no locks."""
    if fcntl is None:
        return False
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise _held_error(path, _read(path)) from None
    except OSError as error:
        if error.errno in _NO_LOCKS:
            return False
        error.filename = os.fspath(path)
        raise
    return True


def _be_holder(path: Path, file: Path) -> None:
    """Make the holder file, with the name of this process."""
    while True:
        try:
            handle = os.open(file, _FLAGS | os.O_CREAT | os.O_EXCL, 0o666)
            break
        except FileExistsError:
            _check_holder(path, file)
            _remove_ended(file)
    try:
        _write(handle)
    except OSError:
        file.unlink()
        raise
    finally:
        os.close(handle)


def _remove_ended(file: Path) -> None:
    """Remove the holder file of a process that has ended."""
    # Renamed first: of two processes that want to remove it, one gets it. Should that one get the
    # file of a new holder, it puts the file back.
    aside = file.with_name(f"{file.name}.{os.getpid()}")
    with contextlib.suppress(FileNotFoundError):
        os.rename(file, aside)
        holder = _read(aside)
        if holder is not None and holder.has_ended():
            aside.unlink()
        else:
            os.rename(aside, file)


def _check_holder(path: Path, file: Path) -> None:
    """Make sure that no other process holds a lock by its name in a file.

    Raises:
        LockHeldError: One does, or perhaps.
    """
    try:
        size = file.stat().st_size
    except FileNotFoundError:
        return
    holder = _read(file)
    # A lock file is empty unless a process holds it; a holder file never is for long.
    if (size or file != path) and (holder is None or not holder.has_ended()):
        raise _held_error(path, holder, leftover=file)


def _held_error(path: Path, holder: _Holder | None, leftover: Path | None = None) -> LockHeldError:
    who = "another process" if holder is None else f"process {holder.pid} on {holder.host}"
    remedy = "Wait for its end, or end it."
    if leftover is not None:
        remedy += f" If it no longer runs, remove {leftover}."
    error = LockHeldError(f"is in use by {who}", file=path, remedy=remedy)
    error.leftover = leftover
    if holder is not None:
        error.note = holder.note
        error.own = msgspec.structs.replace(holder, note="") == _this_process()
    return error


def _read(file: Path) -> _Holder | None:
    """The process that a file names; None if it names none."""
    try:
        with open(file, "rb") as opened:
            return msgspec.json.decode(opened.read(_MOST), type=_Holder)
    except (OSError, ValueError, RecursionError):
        return None


def _write(handle: int, note: str = "") -> None:
    data = msgspec.json.encode(msgspec.structs.replace(_this_process(), note=note))
    # In one go and never shorter than before: somebody may read it meanwhile.
    os.pwrite(handle, data.ljust(os.fstat(handle).st_size) + b"\n", 0)


def _this_process() -> _Holder:
    numbers = ""
    with contextlib.suppress(OSError):
        numbers = os.readlink("/proc/self/ns/pid")
    pid = os.getpid()
    return _Holder(
        pid,
        socket.gethostname(),
        _text("/etc/machine-id"),
        _text("/proc/sys/kernel/random/boot_id"),
        numbers,
        _beginning(pid),
    )


def _beginning(pid: int) -> str:
    # The fields before the name of the program, which may hold spaces, are not wanted.
    fields = _text(f"/proc/{pid}/stat").rpartition(")")[2].split()
    return fields[19] if len(fields) > 19 else ""


def _text(path: str) -> str:
    try:
        with open(path, encoding="utf-8", errors="replace") as file:
            return file.read(_MOST).strip()
    except OSError:
        return ""
