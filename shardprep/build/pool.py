"""A pool of worker processes for shard tasks that can be watched, stopped, and dies with us."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from multiprocessing.connection import wait as wait_for_connections
from typing import Any, TypeVar

from shardprep.errors import BuildError

Task = TypeVar("Task")
Result = TypeVar("Result")
Advance = Callable[[int], None]

_POLL_SECONDS = 0.2


class Stopped(Exception):
    """Raised within a task, by its `advance`, when the pool is to stop."""


# Shared with the workers, and set in each by `_enter_worker`. Neither has a lock: a worker that
# was killed while it held one would keep everybody waiting for ever. `_progress` holds the
# utterances and bytes done of each task, so that each cell has one writer.
_progress: Any
_stop: Any


def run_tasks(
    work: Callable[[Task, Advance], Result],
    tasks: Sequence[Task],
    workers: int,
    on_progress: Callable[[int, int], None],
) -> Generator[Result, None, None]:
    """Run `work` on every task, in this process if `workers` is 1, and yield results as they come.

    Closing the iterator early, or an error from a task, stops the other tasks at their next
    utterance.

    Args:
        work: A module-level function; it calls its second argument with the bytes of each
            utterance done.
        tasks: Its first arguments; each must pickle.
        workers: Number of processes.
        on_progress: Called now and then with the utterances and bytes done since the last call.

    Raises:
        BuildError: A worker process died.
    """
    if min(workers, len(tasks)) <= 1:
        for task in tasks:
            yield work(task, lambda nbytes: on_progress(1, nbytes))
        return
    # A fork server gives workers a clean start (no threads, no locks of the caller's), and loads
    # the modules once for all of them.
    # In a process that was forked it would be that of the parent.
    forked = multiprocessing.parent_process() is not None
    context = multiprocessing.get_context("spawn" if forked else "forkserver")
    context.set_forkserver_preload(["shardprep.build.writer"])
    progress, stop = context.RawArray("Q", 2 * len(tasks)), context.RawValue("b", 0)
    executor = ProcessPoolExecutor(
        min(workers, len(tasks)), context, _enter_worker, (progress, stop, dict(os.environ))
    )
    try:
        futures = {
            executor.submit(_run_one, work, number, task) for number, task in enumerate(tasks)
        }
        yield from _results(futures, _Meter(progress, on_progress))
    except BrokenProcessPool:
        raise BuildError(
            "a worker process died, perhaps for want of memory",
            remedy="Run the same command again, with fewer --workers if memory is short; "
            "finished shards are kept. A script of your own must call build_shards under "
            "`if __name__ == '__main__':`.",
        ) from None
    finally:
        stop.value = 1
        executor.shutdown(cancel_futures=True)


class _Meter:
    """Reports how far the workers have come since the last call."""

    def __init__(self, progress: Any, report: Callable[[int, int], None]) -> None:
        self._progress = progress
        self._seen = 0, 0
        self._report = report

    def __call__(self) -> None:
        now = sum(self._progress[0::2]), sum(self._progress[1::2])
        self._report(now[0] - self._seen[0], now[1] - self._seen[1])
        self._seen = now


def _results(futures: set[Future[Result | None]], meter: _Meter) -> Iterator[Result]:
    while futures:
        done, futures = wait(futures, _POLL_SECONDS, FIRST_COMPLETED)
        meter()
        for future in done:
            result = future.result()
            # Only `_stop` makes a task return nothing, and then nobody reads on.
            assert result is not None
            yield result


def _enter_worker(progress: Any, stop: Any, environment: dict[str, str]) -> None:
    global _progress, _stop
    _progress, _stop = progress, stop
    # The fork server has that of its start, and stores are found by what the environment says now.
    os.environ.clear()
    os.environ.update(environment)
    # Ctrl-C reaches the whole process group; the parent decides what becomes of the tasks.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # For PyTorch, should a file need it: there are as many workers as there are cores to be used.
    os.environ["OMP_NUM_THREADS"] = "1"
    threading.Thread(target=_die_with_parent, daemon=True).start()


def _die_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        wait_for_connections([parent.sentinel])
        os._exit(1)


def _run_one(work: Callable[[Task, Advance], Result], number: int, task: Task) -> Result | None:
    def advance(nbytes: int) -> None:
        if _stop.value:
            raise Stopped
        _progress[2 * number] += 1
        _progress[2 * number + 1] += nbytes

    with contextlib.suppress(Stopped):
        return work(task, advance)
    return None
