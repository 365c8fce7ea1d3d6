"""A pool of worker processes on this machine; they report progress, stop, and end with us."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from multiprocessing.connection import wait as wait_for_connections
from typing import Any

from shardprep.build.pool import Result, Task
from shardprep.build.shard import Advance
from shardprep.errors import BuildError

_POLL_SECONDS = 0.2


class Stopped(Exception):
    """Raised within a task, by its `advance`, when the pool stops."""


# Shared memory, which `_enter_worker` sets in each worker. There is no lock: a worker that is
# killed while it holds a lock would block all others for ever. `_progress` holds the utterances
# and the bytes done of each task, so that each cell has a single writer.
_progress: Any
_stop: Any


@dataclass(frozen=True)
class LocalPool:
    """A `Pool` of processes; with one worker, the tasks run in the calling process.

    Attributes:
        workers: Number of processes; 0 for the number of cores.
    """

    workers: int = 0

    def run(
        self,
        work: Callable[[Task, Advance], Result],
        tasks: Sequence[Task],
        on_progress: Callable[[int, int], None],
    ) -> Generator[Result, None, None]:
        """See `Pool.run`. The other tasks stop at their next utterance.

        Raises:
            BuildError: A worker process died.
        """
        workers = min(self.workers or len(os.sched_getaffinity(0)), len(tasks))
        if workers <= 1:
            for task in tasks:
                yield work(task, lambda nbytes: on_progress(1, nbytes))
            return
        # A fork server gives workers a clean start, without the threads and locks of the caller,
        # and imports the modules once for all workers. A forked process would use the fork server
        # of its parent.
        forked = multiprocessing.parent_process() is not None
        context = multiprocessing.get_context("spawn" if forked else "forkserver")
        context.set_forkserver_preload(["shardprep.build.writer"])
        progress, stop = context.RawArray("Q", 2 * len(tasks)), context.RawValue("b", 0)
        executor = ProcessPoolExecutor(
            workers, context, _enter_worker, (progress, stop, dict(os.environ))
        )
        try:
            futures = {
                executor.submit(_run_one, work, number, task) for number, task in enumerate(tasks)
            }
            yield from _results(futures, _Meter(progress, on_progress))
        except BrokenProcessPool:
            raise BuildError(
                "a worker process died, perhaps for lack of memory",
                remedy="Run the same command again, with fewer --workers if memory is short; "
                "finished shards are kept. A script of your own must call build_shards under "
                "`if __name__ == '__main__':`.",
            ) from None
        finally:
            stop.value = 1
            executor.shutdown(cancel_futures=True)


class _Meter:
    """Reports the progress of the workers since the last call."""

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
            # A task returns None only after `_stop` was set, and then nobody reads the results.
            assert result is not None
            yield result


def _enter_worker(progress: Any, stop: Any, environment: dict[str, str]) -> None:
    global _progress, _stop
    _progress, _stop = progress, stop
    # The fork server keeps the environment of its start; stores are found by the current one.
    os.environ.clear()
    os.environ.update(environment)
    # Ctrl-C reaches the whole process group; the parent decides what happens to the tasks.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # For PyTorch, if a file needs it: the workers already use all cores.
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
