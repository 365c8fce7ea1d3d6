"""Measure loaders fairly: each in a process of its own, in several rounds.

When the process ends, its workers, threads and buffers are gone, so that nothing of one loader
runs while the next one is measured.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, TypeVar

from shardprep.bench.machine import free_memory

T = TypeVar("T")

# Time for a loader to start and to fill its queues, besides the time of the measurement.
_START_SECONDS = 120.0
_READ_BYTES = 1 << 22


@dataclass(frozen=True)
class Candidate:
    """A loader, or a way to gather from memory, to measure.

    Attributes:
        name: What the tables call it.
        kind: Which loader it is, e.g. "files" or "webdataset".
        start: Starts it; gives batches (mel (B, T, F), label (B,)) without end.
        files: The files that it reads; they are read into the page cache first.
        workers: Its worker processes.
    """

    name: str
    kind: str
    start: Callable[[], Iterator[tuple[Any, Any]]]
    files: Sequence[Path] = ()
    workers: int = 0


@dataclass(frozen=True)
class Rate:
    """One measurement: samples a second, number of batches, and pages read from the disk."""

    samples_per_s: float
    batches: int
    major_faults: int


@dataclass
class Measurements:
    """The rates of all rounds by candidate; a candidate that failed is in `failures` only."""

    rates: dict[str, list[Rate]] = field(default_factory=dict)
    failures: dict[str, str] = field(default_factory=dict)

    def median(self, name: str) -> float:
        """Samples a second, median over the rounds."""
        return statistics.median(rate.samples_per_s for rate in self.rates[name])


def measure_in_rounds(
    candidates: Sequence[Candidate],
    *,
    rounds: int,
    seconds: float,
    on_measurement: Callable[[str, Rate | None], None],
    keep_going: bool = False,
) -> Measurements:
    """Measure all candidates, one after the other, in each of several rounds.

    Args:
        candidates: What to measure; each has another name.
        rounds: How often each candidate is measured.
        seconds: Length of a measurement; half as long is spent on warming up before it.
        on_measurement: Called after each measurement, with None after a failed one.
        keep_going: Whether to note a candidate that fails and go on without it.

    Raises:
        Exception: A candidate failed, and `keep_going` is off.
    """
    measured = Measurements({candidate.name: [] for candidate in candidates})
    for _ in range(rounds):
        for candidate in candidates:
            if candidate.name in measured.failures:
                continue
            warm(candidate.files)
            try:
                rate = in_own_process(
                    partial(_measure_candidate, candidate, seconds), _START_SECONDS + 4 * seconds
                )
            except Exception as error:
                if not keep_going:
                    raise
                measured.failures[candidate.name] = f"{type(error).__name__}: {error}"
                del measured.rates[candidate.name]
                on_measurement(candidate.name, None)
            else:
                measured.rates[candidate.name].append(rate)
                on_measurement(candidate.name, rate)
    return measured


def _measure_candidate(candidate: Candidate, seconds: float) -> Rate:
    return measure(candidate.start(), seconds, candidate.workers)


def measure(batches: Iterator[tuple[Any, Any]], seconds: float, workers: int = 0) -> Rate:
    """Count the batches that come in a given time, then close the loader.

    Before that, wait for a batch of each worker, and warm up for half the time.
    """
    with contextlib.closing(batches):  # type: ignore[type-var]
        for _ in range(workers):
            next(batches)
        _draw(batches, seconds / 2)
        faults = _major_faults()
        samples, count, passed = _draw(batches, seconds)
        faults = _major_faults() - faults
    return Rate(samples / passed, count, faults)


def _major_faults() -> int:
    # Windows has no such module, and `shardprep --help` works there.
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_majflt


def _draw(batches: Iterator[tuple[Any, Any]], seconds: float) -> tuple[int, int, float]:
    samples, count, began = 0, 0, time.perf_counter()
    while not count or time.perf_counter() - began < seconds:
        mel, _ = next(batches)
        samples += len(mel)
        count += 1
    return samples, count, time.perf_counter() - began


def in_own_process(task: Callable[[], T], timeout: float) -> T:
    """Run a task in a forked process, then end every process that it has left.

    Args:
        task: What to run; its result must pickle.
        timeout: Seconds that the task may take.

    Raises:
        TimeoutError: It took longer.
        RuntimeError: Its process died.
        Exception: The error of the task.
    """
    context = multiprocessing.get_context("fork")
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=_run_and_send, args=(task, theirs))
    process.start()
    theirs.close()
    try:
        if not ours.poll(timeout):
            raise TimeoutError(f"no result within {timeout:.0f} s")
        good, value = ours.recv()
        process.join(timeout=10)
    except EOFError:
        process.join(timeout=10)
        raise RuntimeError(f"its process died with exit code {process.exitcode}") from None
    finally:
        _end_group(process.pid)
        process.join()
        ours.close()
    if not good:
        raise value
    result: T = value
    return result


def _end_group(leader: int | None) -> None:
    assert leader is not None
    # The group does not exist before the process has made it, nor after all have ended.
    for kill in (os.killpg, os.kill):
        with contextlib.suppress(ProcessLookupError, PermissionError):
            kill(leader, signal.SIGKILL)


def _run_and_send(task: Callable[[], Any], theirs: Connection[Any, Any]) -> None:
    # A process group of its own: the parent gets the Ctrl-C, and ends the group.
    os.setpgid(0, 0)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    try:
        outcome: tuple[bool, Any] = (True, task())
    except Exception as error:
        outcome = (False, error)
    try:
        theirs.send(outcome)
    except Exception:
        theirs.send((False, RuntimeError(f"{type(outcome[1]).__name__}: {outcome[1]}")))
    theirs.close()


def warm(files: Sequence[Path]) -> bool:
    """Read files into the page cache, if they fit there.

    Returns:
        Whether they fit.
    """
    if sum(path.stat().st_size for path in files) > free_memory():
        return False
    buffer = bytearray(_READ_BYTES)
    for path in files:
        with open(path, "rb", buffering=0) as file:
            while file.readinto(buffer):
                pass
    return True
