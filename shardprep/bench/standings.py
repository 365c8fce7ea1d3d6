"""What the turns came to: medians, ratios to the files and to the limit, and on which machine."""

from __future__ import annotations

import os
import platform
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import date
from importlib.metadata import version
from pathlib import Path

from shardprep.bench.turns import Candidate, Turns

LIMIT = "limit: gather from memory"


@dataclass(frozen=True)
class Machine:
    """Where it was measured."""

    cpu: str
    cores: int
    date: str
    versions: dict[str, str]


@dataclass(frozen=True)
class LoaderResult:
    """What a loader reached.

    Attributes:
        name: What the tables call it.
        kind: "files", "webdataset", "shardprep", "limit", or the name of another library.
        workers: Processes beside the first.
        samples_per_s: Segments a second, median over the rounds.
        gb_per_s: Bytes of segments a second, in 1e9.
        rounds: Segments a second in each round.
        to_files: Ratio to the faster loader of the files, if these were measured.
        to_limit: Ratio to the limit.
    """

    name: str
    kind: str
    workers: int
    samples_per_s: float
    gb_per_s: float
    rounds: list[float]
    to_files: float | None
    to_limit: float


@dataclass(frozen=True)
class LimitResult:
    """The bare gather: the way that was fastest, and all that were tried, in segments a second.

    Attributes:
        method: The fastest way.
        nbytes: Size of the array in memory.
        tried: Segments a second of every way.
    """

    method: str
    nbytes: int
    tried: dict[str, float]


def best_limit(turns: Turns, candidates: Sequence[Candidate], nbytes: int) -> LimitResult:
    """The fastest of the ways to gather."""
    tried = {candidate.name: turns.median(candidate.name) for candidate in candidates}
    return LimitResult(max(tried, key=lambda name: tried[name]), nbytes, tried)


def summarise(
    turns: Turns, candidates: Sequence[Candidate], limit: LimitResult, nbytes: int
) -> list[LoaderResult]:
    """Medians and ratios, in the order of the candidates.

    Args:
        turns: What was measured.
        candidates: Loaders and ways to gather. A loader that failed is left out, and so are all
            ways to gather but the fastest.
        limit: The limit.
        nbytes: Bytes of a segment.
    """
    rated = [
        candidate
        for candidate in candidates
        if candidate.name in turns.rates and candidate.kind != "limit"
    ]
    files = [turns.median(candidate.name) for candidate in rated if candidate.kind == "files"]
    rated += [candidate for candidate in candidates if candidate.name == limit.method]
    results = []
    for candidate in rated:
        rate = turns.median(candidate.name)
        results.append(
            LoaderResult(
                LIMIT if candidate.kind == "limit" else candidate.name,
                candidate.kind,
                candidate.workers,
                rate,
                rate * nbytes / 1e9,
                [turn.samples_per_s for turn in turns.rates[candidate.name]],
                rate / max(files) if files else None,
                rate / limit.tried[limit.method],
            )
        )
    return results


def machine() -> Machine:
    """This machine, and the libraries that the figures depend on."""
    packages = ("shardprep", "torch", "numpy", "webdataset", "zstandard")
    versions = {"python": platform.python_version(), **{name: version(name) for name in packages}}
    return Machine(cpu_name(), usable_cores(), date.today().isoformat(), versions)


def cpu_name() -> str:
    """The processor's name, where the system tells."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def usable_cores() -> int:
    """Cores that this process may run on."""
    return len(os.sched_getaffinity(0))
