"""Shares of a batch: the caller works on them, and idle threads of this process help.

A thread takes the next share when it is done with one, so that a thread that the system delays
delays the batch by one share at most. The helpers are the same for all readers of the process.
"""

from __future__ import annotations

import contextlib
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from threading import Event

from shardprep.system import at_fork, loader_workers, usable_cores

Share = Callable[[], None]

_helpers: ThreadPoolExecutor | None = None


def threads() -> int:
    """Threads for the batches of this process; the workers of a DataLoader divide the cores."""
    return max(1, usable_cores() // loader_workers())


def work_on(shares: Sequence[Share], count: int) -> None:
    """Work on all shares, and return when none is being worked on.

    Args:
        shares: Functions without arguments.
        count: Most threads that work on them, the caller among them.

    Raises:
        Exception: What a share raises; of several that do, the first in the order given.
    """
    waiting = deque(enumerate(shares))
    failed: list[tuple[int, Exception]] = []
    helping: list[Event] = []

    def work() -> None:
        while True:
            try:
                number, share = waiting.popleft()
            except IndexError:
                return
            try:
                share()
            except Exception as error:
                failed.append((number, error))

    def help_out() -> None:
        helping.append(ended := Event())
        try:
            work()
        finally:
            ended.set()

    # At the end of the interpreter, or at the system's limit of threads, the caller works alone.
    with contextlib.suppress(RuntimeError):
        for _ in range(min(count, len(shares)) - 1):
            _pool().submit(help_out)
    try:
        work()
    finally:
        # A helper that begins only now finds nothing to do, and need not be waited for.
        waiting.clear()
        for ended in helping:
            ended.wait()
    if failed:
        raise min(failed, key=lambda failure: failure[0])[1]


def _pool() -> ThreadPoolExecutor:
    global _helpers
    if _helpers is None:
        _helpers = ThreadPoolExecutor(max(1, usable_cores() - 1), "shardprep-share")
    return _helpers


def _after_fork() -> None:
    # Threads stay behind in the parent.
    global _helpers
    _helpers = None


at_fork(_after_fork)
