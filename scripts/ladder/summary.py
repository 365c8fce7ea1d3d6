"""The results of a ladder: means and spreads over the seeds, checks, a table.

Pure functions of the runs. A run is a dict with `rung`, `seed`, `test_accuracy` and `val_accuracy`,
and with `eer` and others if they were measured.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence
from typing import Any

Run = dict[str, Any]

# From low to high. The homework's code comes first; its recipe corresponds to strong.
RUNGS = ("homework", "simple", "medium", "strong", "boss", "best")
MEASURES = (
    "test_accuracy",
    "val_accuracy",
    "top5_accuracy",
    "eer",
    "min_dcf",
    "samples_per_s",
    "seconds",
)
# Share of errors that should be gone: from the homework's code to boss, and from boss to best.
HALF = 0.5
LABELS = {"homework": "homework's code, as published"}


def summarise(runs: Sequence[Run]) -> dict[str, Any]:
    """The spread of each rung, and the checks for which there are enough rungs."""
    rungs = {}
    for name in RUNGS:
        own = [run for run in runs if run["rung"] == name]
        if own:
            rungs[name] = {
                "seeds": sorted(run["seed"] for run in own),
                **{key: spread(run.get(key) for run in own) for key in MEASURES},
            }
    return {"rungs": rungs, "checks": checks(rungs)}


def spread(values: Iterable[float | None]) -> dict[str, float] | None:
    """Mean, smallest and largest of the values, without those that are None."""
    known = [value for value in values if value is not None]
    if not known:
        return None
    return {"mean": statistics.fmean(known), "min": min(known), "max": max(known)}


def checks(rungs: dict[str, Any]) -> list[dict[str, Any]]:
    """What the ladder should show, by mean test accuracy, for the rungs that were measured.

    Returns:
        For each check `name`, `found` and `passed`. A check of the order of two rungs also has
        `clear`: whether the worst seed of the upper rung is above the best seed of the lower rung.
    """
    own = [name for name in RUNGS if name in rungs and name != "homework"]
    pairs = list(zip(own, own[1:], strict=False))
    if {"homework", "strong"} <= set(rungs):
        pairs.insert(0, ("homework", "strong"))
    found = []
    for lower, upper in pairs:
        below, above = (rungs[name]["test_accuracy"] for name in (lower, upper))
        gain = above["mean"] - below["mean"]
        clear = above["min"] > below["max"]
        found.append(
            {"name": f"{upper} above {lower}", "found": gain, "passed": gain > 0, "clear": clear}
        )
    for lower, upper in (("homework", "boss"), ("boss", "best")):
        if {lower, upper} <= set(rungs):
            below, above = (rungs[name]["test_accuracy"]["mean"] for name in (lower, upper))
            gone = errors_gone(below, above)
            name = f"{upper} without at least half of the errors of {lower} (share gone)"
            found.append({"name": name, "found": gone, "passed": gone >= HALF})
    return found


def errors_gone(before: float, after: float) -> float:
    """Share of the errors that are gone between two accuracies; negative if there are more."""
    if before == 1.0:
        return 0.0 if after == 1.0 else float("-inf")
    return 1.0 - (1.0 - after) / (1.0 - before)


def table(summary: dict[str, Any]) -> str:
    """The rungs as a Markdown table, then the checks as a list."""
    lines = [
        "| rung | test | validation | EER | minDCF | samples/s |",
        "|---|---|---|---|---|---|",
    ]
    for name, rung in summary["rungs"].items():
        cells = [_cell(rung[key], 4) for key in ("test_accuracy", "val_accuracy", "eer", "min_dcf")]
        cells.append(_cell(rung["samples_per_s"], 0))
        lines.append(f"| {LABELS.get(name, name)} | {' | '.join(cells)} |")
    lines.append("")
    for check in summary["checks"]:
        state = "ok" if check["passed"] else "FAILED"
        seeds = {True: ", at every seed", False: ", but not at every seed", None: ""}
        seen = seeds[check.get("clear") if check["passed"] else None]
        lines.append(f"- {state}: {check['name']}: {check['found']:+.4f}{seen}")
    return "\n".join(lines)


def _cell(found: dict[str, float] | None, digits: int) -> str:
    if found is None:
        return "-"
    mean, low, high = (f"{found[key]:,.{digits}f}" for key in ("mean", "min", "max"))
    return mean if low == high else f"{mean} ({low} to {high})"
