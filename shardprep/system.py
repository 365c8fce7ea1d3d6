"""What differs between operating systems, and what a process may use."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from typing import Any

from shardprep.errors import PlatformError

fcntl: Any
"""The module of this name, None on Windows."""
try:
    import fcntl
except ImportError:
    fcntl = None


def check_supported() -> None:
    """Make sure that this system can read and write shards, before anything is made.

    Raises:
        PlatformError: It cannot.
    """
    if sys.platform == "win32":
        raise PlatformError(
            "shardprep reads and writes shards on Linux and macOS, not on Windows",
            remedy="On Windows, run it in WSL.",
        )


def check_linux(what: str) -> None:
    """Make sure that this system is Linux, for what needs its own calls.

    Args:
        what: What does, as the subject of a sentence.

    Raises:
        PlatformError: It is another system.
    """
    if sys.platform != "linux":
        raise PlatformError(f"{what} needs Linux, and this system is {sys.platform}")


def usable_cores() -> int:
    """Cores that this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def loader_workers() -> int:
    """Workers of the DataLoader if this process is one of them, else 1."""
    data = sys.modules.get("torch.utils.data")
    worker = data.get_worker_info() if data is not None else None
    return 1 if worker is None else int(worker.num_workers)


def at_fork(
    after_in_child: Callable[[], None],
    before: Callable[[], None] | None = None,
    after_in_parent: Callable[[], None] | None = None,
) -> None:
    """Have functions called when this process is forked, where systems have that.

    Args:
        after_in_child: Called in the new process.
        before: Called in this process, before.
        after_in_parent: Called in this process, after.
    """
    if hasattr(os, "register_at_fork"):
        os.register_at_fork(after_in_child=after_in_child)
        if before is not None:
            os.register_at_fork(before=before)
        if after_in_parent is not None:
            os.register_at_fork(after_in_parent=after_in_parent)
