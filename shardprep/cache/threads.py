"""Threads for work that nobody has to wait for: a program may end before the work is done."""

from __future__ import annotations

import queue
import threading
import weakref
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any

_Jobs = queue.SimpleQueue[tuple[Future[Any], Callable[..., Any], tuple[Any, ...]] | None]


class BackgroundThreads:
    """Like a ThreadPoolExecutor, but a program that ends does not wait for the jobs.

    Args:
        count: Most threads; each is started when it is needed.
        name: Name of the threads.
    """

    def __init__(self, count: int, name: str) -> None:
        self._count, self._name = count, name
        self._started = 0
        self._lock = threading.Lock()
        self._jobs: _Jobs = queue.SimpleQueue()
        weakref.finalize(self, _end, self._jobs, count).atexit = False

    def submit(self, work: Callable[..., Any], *arguments: Any) -> Future[Any]:
        """Have a function called; the future gets its result or its error."""
        future: Future[Any] = Future()
        self._jobs.put((future, work, arguments))
        with self._lock:
            if self._started < self._count:
                self._started += 1
                threading.Thread(
                    target=_serve, args=(self._jobs,), name=self._name, daemon=True
                ).start()
        return future


def _serve(jobs: _Jobs) -> None:
    while (job := jobs.get()) is not None:
        future, work, arguments = job
        if future.set_running_or_notify_cancel():
            try:
                future.set_result(work(*arguments))
            except BaseException as error:
                future.set_exception(error)
        # The last job is not kept alive while there is nothing to do.
        del job, future, work, arguments


def _end(jobs: _Jobs, count: int) -> None:
    for _ in range(count):
        jobs.put(None)
