"""Make calls that change the disk fail, and find the processes that a program leaves."""

from __future__ import annotations

import io
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

CHANGES = ("fsync", "replace", "fchmod", "mkdir", "unlink", "rmdir")


@dataclass
class Calls:
    """The number of calls that change the disk."""

    made: int = 0


@contextmanager
def refusing(step: int, number: int, buffered: int = 0) -> Iterator[Calls]:
    """Let the `step`-th call of this process that changes the disk fail.

    Args:
        step: Number of the call, from 1; each write to a file counts.
        number: Number of the error, such as errno.ENOSPC.
        buffered: Bytes that a file collects before it writes them; 0 for the size it asks for.
    """
    calls = Calls()

    def count() -> None:
        calls.made += 1
        if calls.made == step:
            raise OSError(number, os.strerror(number))

    def wrap(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **options: Any) -> Any:
            count()
            return function(*arguments, **options)

        return call

    class Raw(io.FileIO):
        def write(self, data: Any) -> int | None:
            count()
            return super().write(data)

    def fdopen(handle: int, mode: str, buffering: int) -> io.BufferedWriter:
        return io.BufferedWriter(Raw(handle, mode), buffered or buffering)

    patches = {name: wrap(getattr(os, name)) for name in CHANGES}
    with mock.patch.multiple(os, fdopen=fdopen, **patches):
        yield calls


def group(number: int) -> list[int]:
    """The running processes of a process group."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, _, own = stat.read_text().rpartition(")")[2].split()[:3]
        except (OSError, ValueError):
            continue
        if int(own) == number and state != "Z":
            found.append(int(stat.parent.name))
    return found
