"""Ends a run that no longer makes progress, and says what every process was doing.

If a disk hangs, a process is stopped or a machine is gone, the other processes wait in an exchange
of gradients and say nothing. So a thread in each process tells the others every few seconds how far
its process is, through the store by which they met. The training only notes what it does next, and
never waits for the watchdog.
"""

from __future__ import annotations

import contextlib
import faulthandler
import json
import os
import socket
import threading
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import astuple, dataclass
from typing import TypeVar

import click
from torch._C._distributed_c10d import Store

# That of `timeout`, so that scripts can tell a hang from a failure.
EXIT_CODE = 124

READING, COMPUTING, VALIDATING = "reading data", "computing", "validating"
MEETING = "meeting the other processes"
SAVING, WAITING = "saving", "waiting for process 0 to save"
# What a process does without the others; in all other phases it may be waiting for one of them.
_ALONE = (READING, SAVING)

Item = TypeVar("Item")


@dataclass(frozen=True)
class Report:
    """How far a process is, as it says itself."""

    ticks: int = 0
    """Rises while the process runs at all."""
    count: int = 0
    """Rises each time that the process begins something."""
    step: int = 0
    """Steps done."""
    phase: str = "starting"
    """What the process does."""
    seconds: float = 0.0
    """For how long it has done this [s]."""
    machine: str = ""
    """Name of its machine."""


class Watchdog:
    """Watches the run while entered, and notes what this process does.

    Only the time in which the process runs is counted: a process that was stopped and continues
    raises no alarm.

    Args:
        seconds: If no process begins anything for so long, all leave with `EXIT_CODE` [s]; 0 for
            never.
        rank: Of this process.
        world_size: Number of processes.
        store: Through which they have met; None for a single process, or before the meeting.
    """

    def __init__(
        self,
        seconds: float,
        *,
        rank: int = 0,
        world_size: int = 1,
        store: Store | None = None,
    ) -> None:
        self.seconds = seconds
        self.rank = rank
        self.world_size = world_size
        self._store = store
        self._interval = min(5.0, seconds / 8)
        self._note = (0, 0, "starting")
        self._reports = {rank: Report()}
        self._stopped = threading.Event()
        self._threads: list[threading.Thread] = []

    def enter(self, phase: str, step: int) -> None:
        """Note what this process does from now on, after `step` steps."""
        self._note = (self._note[0] + 1, step, phase)

    def each(self, items: Iterable[Item], phase: str, step: int) -> Iterator[Item]:
        """Yield the items, and note each of them."""
        for item in items:
            self.enter(phase, step)
            yield item

    def __enter__(self) -> Watchdog:
        targets = [self._watch, *([] if self._store is None else [self._exchange])]
        if self.seconds:
            self._threads = [threading.Thread(target=each, daemon=True) for each in targets]
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._stopped.set()
        for thread in self._threads:
            # The process must be able to leave even if the store hangs.
            thread.join(timeout=5.0)

    def _exchange(self) -> None:
        store = self._store
        assert store is not None
        # The group's own store is locked while the training waits for something in it, so take
        # another connection. Old releases of PyTorch cannot, and learn of a hang later.
        if hasattr(store, "clone"):
            store = store.clone()
        keys = [f"trainer/watchdog/{rank}" for rank in range(self.world_size)]
        while not self._stopped.wait(self._interval):
            # If the store's host is gone, no process answers any more, which is reported.
            with contextlib.suppress(RuntimeError):
                store.set(keys[self.rank], json.dumps(astuple(self._reports[self.rank])))
                rows = store.multi_get(keys)
                others = {rank: Report(*json.loads(row)) for rank, row in enumerate(rows)}
                self._reports.update({r: x for r, x in others.items() if r != self.rank})

    def _watch(self) -> None:
        known = [self.rank] if self._store is None else range(self.world_size)
        standstill, silence = Standstill(), Silence(known)
        while not self._stopped.wait(self._interval):
            before, (count, step, phase) = self._reports[self.rank], self._note
            seconds = before.seconds + self._interval if count == before.count else 0.0
            self._reports[self.rank] = Report(
                before.ticks + 1, count, step, phase, seconds, socket.gethostname()
            )
            reports = dict(self._reports)
            silence.update(reports, self._interval)
            if standstill.update(reports, self._interval) >= self.seconds:
                self._end(reports, silence.beyond(self.seconds / 2))
                return

    def _end(self, reports: Mapping[int, Report], silent: Sequence[int]) -> None:
        """Report, unless a process of lower rank answers and so reports itself; then leave."""
        if self._store is None or set(silent).issuperset(range(self.rank)):
            click.echo(describe(reports, silent, self.seconds), err=True)
        else:
            # The launcher ends all processes once one has left: let the other report first.
            time.sleep(1.0 + 3 * self._interval)
        if reports[self.rank].phase in _ALONE:
            faulthandler.dump_traceback(all_threads=True)
        os._exit(EXIT_CODE)


class Standstill:
    """For how long no process has begun anything, by the reports that one process has."""

    def __init__(self) -> None:
        self._counts: dict[int, int] = {}
        self._seconds = 0.0

    def update(self, reports: Mapping[int, Report], passed: float) -> float:
        """Compare with the reports of `passed` seconds before; returns the duration [s]."""
        counts = {rank: report.count for rank, report in reports.items()}
        self._seconds = self._seconds + passed if counts == self._counts else 0.0
        self._counts = counts
        return self._seconds


class Silence:
    """For how long each process has sent no report.

    Args:
        ranks: Of the processes that should report.
    """

    def __init__(self, ranks: Iterable[int]) -> None:
        self._ticks = dict.fromkeys(ranks, -1)
        self._seconds = dict.fromkeys(self._ticks, 0.0)

    def update(self, reports: Mapping[int, Report], passed: float) -> None:
        """Compare with the reports of `passed` seconds before."""
        for rank, ticks in self._ticks.items():
            now = reports[rank].ticks if rank in reports else ticks
            self._seconds[rank] = self._seconds[rank] + passed if now == ticks else 0.0
            self._ticks[rank] = now

    def beyond(self, seconds: float) -> list[int]:
        """Ranks that have been silent for at least `seconds`."""
        return [rank for rank, silent in self._seconds.items() if silent >= seconds]


def describe(reports: Mapping[int, Report], silent: Sequence[int], seconds: float) -> str:
    """The report of one process about all of them, as lines.

    Args:
        reports: The last report of each process by rank; a rank may be missing.
        silent: Ranks that no longer answer.
        seconds: For how long no process has begun anything [s].
    """
    phases = {rank: report.phase for rank, report in reports.items() if rank not in silent}
    alone = sorted(rank for rank, phase in phases.items() if phase in _ALONE)
    if silent:
        what = f"{_named(silent)} no longer answers: it was stopped, or its machine hangs"
        if len(silent) > 1:
            what = f"{_named(silent)} no longer answer: they were stopped, or a machine hangs"
        if len(silent) > 1 and 0 in silent:
            what += ", or process 0 hangs, through which the others report"
    elif MEETING in phases.values():
        what = "some processes have not come: see what the others say"
    elif alone:
        doing = " and ".join(sorted({phases[rank] for rank in alone}))
        what = f"{_named(alone)} is stuck in {doing}: look at its disks"
        if len(alone) > 1:
            what = f"{_named(alone)} are stuck in {doing}: look at their disks"
    else:
        what = "all are computing, or waiting for one another"
    lines = [f"error: no process has begun anything for {seconds:g} s, train.hang_seconds; {what}"]
    several = len({report.machine for report in reports.values()}) > 1
    for rank in sorted({*reports, *silent}):
        last = reports.get(rank)
        place = f" on {last.machine}" if several and last is not None and last.machine else ""
        status = "has never reported"
        if last is not None:
            status = f"after step {last.step:,}, {last.phase} for {last.seconds:.0f} s"
            status += ", no answer since" if rank in silent else ""
        lines.append(f"  process {rank}{place}: {status}")
    return "\n".join([*lines, "--resume continues from the newest checkpoint"])


def _named(ranks: Sequence[int]) -> str:
    return f"process{'es' if len(ranks) > 1 else ''} {' and '.join(map(str, ranks))}"
