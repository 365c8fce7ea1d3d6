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
from typing import Any, Protocol, TypeVar

from shardprep.errors import BuildError

Task = TypeVar("Task")
Result = TypeVar("Result")
Advance = Callable[[int], None]

_POLL_SECONDS = 0.2


class Stopped(Exception):
    """Raised within a task, by its `advance`, when the pool is to stop."""


class _Counter(Protocol):
    value: int

    def get_lock(self) -> Any: ...


# Set in each worker by `_enter_worker`.
_samples: _Counter
_nbytes: _Counter
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
    # PyTorch once for all of them.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch", "shardprep.writer"])
    samples, nbytes = context.Value("Q", 0), context.Value("Q", 0)
    stop = context.Event()
    executor = ProcessPoolExecutor(
        min(workers, len(tasks)), context, _enter_worker, (samples, nbytes, stop)
    )
    try:
        futures = {executor.submit(_run_one, work, task) for task in tasks}
        yield from _results(futures, _Meter(samples, nbytes, on_progress))
    except BrokenProcessPool:
        raise BuildError(
            "a worker process died, perhaps for want of memory",
            remedy="Run the same command again, with fewer --workers if memory is short; "
            "finished shards are kept.",
        ) from None
    finally:
        stop.set()
        executor.shutdown(cancel_futures=True)


class _Meter:
    """Reports how far the workers' counters have moved since the last call."""

    def __init__(
        self, samples: _Counter, nbytes: _Counter, report: Callable[[int, int], None]
    ) -> None:
        self._counters = samples, nbytes
        self._seen = 0, 0
        self._report = report

    def __call__(self) -> None:
        now = self._counters[0].value, self._counters[1].value
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


def _enter_worker(samples: _Counter, nbytes: _Counter, stop: Any) -> None:
    global _samples, _nbytes, _stop
    _samples, _nbytes, _stop = samples, nbytes, stop
    # Ctrl-C reaches the whole process group; the parent decides what becomes of the tasks.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    import torch

    torch.set_num_threads(1)
    threading.Thread(target=_die_with_parent, daemon=True).start()


def _die_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        wait_for_connections([parent.sentinel])
        os._exit(1)


def _run_one(work: Callable[[Task, Advance], Result], task: Task) -> Result | None:
    with contextlib.suppress(Stopped):
        return work(task, _advance)
    return None


def _advance(nbytes: int) -> None:
    if _stop.is_set():
        raise Stopped
    with _samples.get_lock():
        _samples.value += 1
    with _nbytes.get_lock():
        _nbytes.value += nbytes
