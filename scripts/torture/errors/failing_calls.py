"""Calls of the operating system that fail, one at a time, in any program: see failing_calls.c."""

from __future__ import annotations

import ctypes
import os
import shutil
import struct
import subprocess
from pathlib import Path

KINDS = (
    "open",
    "read",
    "mmap",
    "fsync",
    "fchmod",
    "flock",
    "rename",
    "link",
    "unlink",
    "statvfs",
    "shm",
)
"""What can fail; each stands for all functions of the C library that do such a thing.

Calls are counted on paths below a folder, and `shm` on those in /dev/shm. `open` also lists
folders, `flock` is every kind of lock, `unlink` also removes folders.
"""

_SOURCE = Path(__file__).with_name("failing_calls.c")
_VARIABLE = "FAILING_CALLS"
_LONGEST = 2048
# struct settings of failing_calls.c.
_SETTINGS = struct.Struct(f"<5i{len(KINDS)}i{_LONGEST}s{_LONGEST}s")


def can_compile() -> bool:
    """Whether this machine has gcc."""
    return shutil.which("gcc") is not None


def compile_library(folder: Path) -> Path:
    """Compile failing_calls.c; the library is to be named in LD_PRELOAD.

    Args:
        folder: Gets the library.

    Raises:
        subprocess.CalledProcessError: gcc refuses.
    """
    library = folder / "failing_calls.so"
    command = ["gcc", "-shared", "-fPIC", "-O2", "-o", str(library), str(_SOURCE), "-ldl"]
    subprocess.run(command, check=True)
    return library


class FailingCalls:
    """What is to fail, and what was called; shared with all processes that use its file.

    Args:
        file: The file, which is made anew.
        root: Only calls on paths below this folder count.
        kind: The kind of call that fails; None for none.
        error: Its errno.
        number: Which of these calls fails, from 1.
        lasting: Whether later calls of this kind on the same path fail too.

    Attributes:
        file: The file.
        fails: Whether anything is to fail.
    """

    def __init__(
        self,
        file: Path,
        root: Path,
        kind: str | None = None,
        error: int = 0,
        number: int = 0,
        *,
        lasting: bool = False,
    ) -> None:
        self.file, self.fails = file, kind is not None
        which = -1 if kind is None else KINDS.index(kind)
        nothing = [0] * (1 + len(KINDS))
        below = os.fsencode(f"{root}/")
        file.write_bytes(_SETTINGS.pack(which, error, number, lasting, *nothing, below, b""))

    @property
    def counts(self) -> dict[str, int]:
        """Calls of each kind so far."""
        return dict(zip(KINDS, self._read()[5:-2], strict=True))

    @property
    def refused(self) -> int:
        """Calls that have failed so far."""
        return int(self._read()[4])

    @property
    def path(self) -> str:
        """The path of the first call that failed."""
        return os.fsdecode(self._read()[-1].rstrip(b"\0"))

    def _read(self) -> tuple[int | bytes, ...]:
        return _SETTINGS.unpack(self.file.read_bytes())


def use(file: str) -> None:
    """Let the settings in a file hold for this process and for those that it starts."""
    os.environ[_VARIABLE] = file
    library = ctypes.CDLL(None)
    library.failing_calls_use.argtypes = [ctypes.c_char_p]
    library.failing_calls_use(os.fsencode(file))
