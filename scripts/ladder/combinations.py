"""Runs of a ladder that are scored together: several seeds of a recipe, and unlike models."""

from __future__ import annotations

import hashlib
import json
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from threading import Event

from scripts.ladder.jobs import Job, Places, keep, measures, result_file, score_command
from scripts.ladder.summary import ALL_SEEDS, PAIR, PAIRED, REPEATED, Run


@dataclass(frozen=True)
class Combination:
    """Runs that are scored as one.

    Attributes:
        rung: Name of its row.
        members: The runs.
        score: The command that prints the measures of the test split as JSON.
    """

    rung: str
    members: tuple[Job, ...]
    score: tuple[str, ...]

    @property
    def name(self) -> str:
        """Name of its files."""
        names = " ".join(job.name for job in self.members)
        return f"combined-{hashlib.sha256(names.encode()).hexdigest()[:8]}"

    @property
    def seeds(self) -> list[int]:
        """The seeds of its runs."""
        return sorted({job.seed for job in self.members})

    @property
    def label(self) -> str:
        """What is told of it to people."""
        return f"{self.rung}, seed {', '.join(map(str, self.seeds))}"


def plan_combinations(jobs: Sequence[Job], places: Places) -> list[Combination]:
    """All seeds of best together, and best with trunk for each seed.

    Args:
        jobs: The runs of a ladder.
        places: Where files are.
    """

    def combine(rung: str, members: Sequence[Job]) -> Combination:
        score = score_command(places, [job.name for job in members])
        return Combination(rung, tuple(members), score)

    repeated = [job for job in jobs if job.rung == REPEATED]
    found = [combine(ALL_SEEDS, repeated)] if len(repeated) > 1 else []
    for seed in dict.fromkeys(job.seed for job in jobs):
        pair = [job for rung in PAIRED for job in jobs if (job.rung, job.seed) == (rung, seed)]
        if len(pair) == len(PAIRED):
            found.append(combine(PAIR, pair))
    return found


def run_combination(combination: Combination, places: Places, threads: int, stop: Event) -> Run:
    """Score a combination of finished runs, or read its result if it was scored earlier.

    Returns:
        As `run_job`; in place of its validation and its rates, `alone`: the test accuracy of one
        run alone, the mean over runs of one recipe, or the better of two recipes.

    Raises:
        RuntimeError: The command failed; the message names its log.
    """
    kept = places.work / "results" / f"{combination.name}.json"
    if kept.exists():
        run: Run = json.loads(kept.read_text())
        return run
    alone = [_accuracy(result_file(places, job)) for job in combination.members]
    of_one = len({job.rung for job in combination.members}) == 1
    run = {
        "rung": combination.rung,
        "seeds": combination.seeds,
        "name": combination.name,
        "members": [job.name for job in combination.members],
        "alone": statistics.fmean(alone) if of_one else max(alone),
    }
    log = places.work / "logs" / f"{combination.name}.log"
    run |= measures(combination.score, places, log, threads, stop)
    keep(kept, run)
    return run


def _accuracy(result: Path) -> float:
    found: float = json.loads(result.read_text())["test_accuracy"]
    return found
