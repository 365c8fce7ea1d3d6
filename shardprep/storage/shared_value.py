"""A small value that a process shares with the processes that it starts.

It lies in a file without a name, which the other processes inherit: open files outlive a fork, and
`multiprocessing` hands them to processes that it spawns. The file needs no folder, nothing remains
of it, and a process that is killed leaves no lock behind.

Each process has a value of its own, and reaches that of its parent beside it. So the ranks of a
job that are forked from one process share nothing with one another.
"""

from __future__ import annotations

import contextlib
import os
import tempfile
import weakref
from collections.abc import Callable
from multiprocessing import reduction
from multiprocessing.context import get_spawning_popen
from typing import Any, Generic, TypeVar

import msgspec

from shardprep.system import at_fork, fcntl

T = TypeVar("T")

_MOST_BYTES = 1 << 20


class SharedValue(Generic[T]):
    """A value that the processes that this one starts can change.

    Args:
        value: The value at first, of a type that msgspec writes as JSON.
    """

    def __init__(self, value: T) -> None:
        self._begin(value, None)

    def _begin(self, value: T, parents: _File[T] | None) -> None:
        self._value = value
        # Made when another process may need it. From then on, it holds the value.
        self._own: _File[T] | None = None
        self._parents = parents
        _living.add(self)

    def get(self) -> T:
        """The value of this process."""
        return self._value if self._own is None else self._own.read()

    def change(self, change: Callable[[T], T]) -> T:
        """Replace the value of this process by what `change` makes of it; returns the new one."""
        if self._own is not None:
            return self._own.change(change)
        self._value = change(self._value)
        return self._value

    def change_parents(self, change: Callable[[T], T]) -> T | None:
        """The same for the value of the process that started this one; None if out of reach."""
        return None if self._parents is None else self._parents.change(change)

    def before_start(self) -> None:
        """Make sure that a process that is started now can reach the value.

        Raises:
            OSError: The system gives no file.
        """
        self._value = self.get()
        if self._own is None:
            self._own = _File.new(self._value)

    def after_fork(self) -> None:
        """Begin with a value of one's own, in a process that was just forked."""
        # `_value` is from just before the fork. The parent may have changed its value since.
        self._begin(self._value, self._own)

    def __getstate__(self) -> tuple[T, Any]:
        if get_spawning_popen() is None:
            return self.get(), None
        with contextlib.suppress(OSError):
            self.before_start()
        handle = None if self._own is None else reduction.DupFd(self._own.handle)
        return self._value, handle

    def __setstate__(self, state: tuple[T, Any]) -> None:
        value, handle = state
        self._begin(value, None if handle is None else _File(handle.detach(), type(value)))


class _File(Generic[T]):
    """A value as JSON, in a file without a name."""

    def __init__(self, handle: int, kind: type[T]) -> None:
        self.handle = handle
        self._kind = kind
        weakref.finalize(self, os.close, handle).atexit = False

    @classmethod
    def new(cls, value: T) -> _File[T]:
        if hasattr(os, "memfd_create"):
            handle = os.memfd_create("shardprep")
        else:
            with tempfile.TemporaryFile() as file:
                handle = os.dup(file.fileno())
        made = cls(handle, type(value))
        made._write(value)
        return made

    def read(self) -> T:
        return msgspec.json.decode(os.pread(self.handle, _MOST_BYTES, 0), type=self._kind)

    def change(self, change: Callable[[T], T]) -> T:
        # The system takes the lock back from a process that is killed.
        fcntl.lockf(self.handle, fcntl.LOCK_EX)
        try:
            value = change(self.read())
            self._write(value)
        finally:
            fcntl.lockf(self.handle, fcntl.LOCK_UN)
        return value

    def _write(self, value: T) -> None:
        # One call, so that a kill cannot leave half of it; spaces cover a longer text from before.
        text = msgspec.json.encode(value)
        os.pwrite(self.handle, text.ljust(os.fstat(self.handle).st_size), 0)


_living: weakref.WeakSet[SharedValue[Any]] = weakref.WeakSet()


def _before_fork() -> None:
    for value in list(_living):
        # Without a file, the other process cannot reach the value, and says so if it must.
        with contextlib.suppress(OSError):
            value.before_start()


def _after_fork() -> None:
    for value in list(_living):
        value.after_fork()


at_fork(before=_before_fork, after_in_child=_after_fork)
