"""Results of the measurements: medians, and ratios to the files and to the limit."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from shardprep.bench.measure import Candidate, Measurements

LIMIT = "limit: gather from memory"


@dataclass(frozen=True)
class LoaderResult:
    """The result of a loader.

    Attributes:
        name: What the tables call it.
        kind: "files", "webdataset", "shardprep", "limit", or the name of another library.
        workers: Its worker processes.
        samples_per_s: Segments a second, median over the rounds.
        gb_per_s: Bytes of segments a second, in units of 1e9.
        rounds: Segments a second in each round.
        to_files: Ratio to the fastest loader of the files, if these were measured.
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
    """The limit: gathering from memory, in the fastest of several ways.

    Attributes:
        method: The fastest way.
        nbytes: Size of the array in memory.
        tried: Segments a second of each way.
    """

    method: str
    nbytes: int
    tried: dict[str, float]


def best_limit(measured: Measurements, candidates: Sequence[Candidate], nbytes: int) -> LimitResult:
    """The limit, from the measured ways to gather."""
    tried = {candidate.name: measured.median(candidate.name) for candidate in candidates}
    return LimitResult(max(tried, key=lambda name: tried[name]), nbytes, tried)


def summarise(
    measured: Measurements, candidates: Sequence[Candidate], limit: LimitResult, nbytes: int
) -> list[LoaderResult]:
    """Medians and ratios, in the order of the candidates.

    Args:
        measured: The measurements.
        candidates: Loaders and ways to gather. The result omits loaders that failed, and all
            ways to gather but the fastest.
        limit: The limit.
        nbytes: Bytes of a segment.
    """
    rated = [
        candidate
        for candidate in candidates
        if candidate.name in measured.rates and candidate.kind != "limit"
    ]
    files = [measured.median(candidate.name) for candidate in rated if candidate.kind == "files"]
    rated += [candidate for candidate in candidates if candidate.name == limit.method]
    results = []
    for candidate in rated:
        rate = measured.median(candidate.name)
        results.append(
            LoaderResult(
                LIMIT if candidate.kind == "limit" else candidate.name,
                candidate.kind,
                candidate.workers,
                rate,
                rate * nbytes / 1e9,
                [rate.samples_per_s for rate in measured.rates[candidate.name]],
                rate / max(files) if files else None,
                rate / limit.tried[limit.method],
            )
        )
    return results
