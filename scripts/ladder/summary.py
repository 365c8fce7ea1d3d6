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
ORDERED = ("homework", "simple", "medium", "strong", "boss", "best")
RUNGS = (*ORDERED, "best-lm", "trunk", "mfa")
# Rows of runs that are scored together: the runs of one recipe, and one run of each of two.
REPEATED, ALL_SEEDS = "best", "best, all seeds"
PAIRED, PAIR = ("best", "trunk"), "best + trunk"
TRIAL_MEASURES = ("eer", "min_dcf", "eer_as_norm", "min_dcf_as_norm")
MEASURES = (
    "test_accuracy",
    "val_accuracy",
    "top5_accuracy",
    *TRIAL_MEASURES,
    "samples_per_s",
    "seconds",
)
# Share of the errors of the first that should be gone in the second.
GONE = {("homework", "boss"): 0.5, ("boss", "best"): 0.6}
# The same for runs that are scored together, against one of them alone.
GONE_TOGETHER = {ALL_SEEDS: 0.15, PAIR: 0.2}
LABELS = {"homework": "homework's code, as published"}


def summarise(runs: Sequence[Run], combined: Sequence[Run] = ()) -> dict[str, Any]:
    """The spread of each rung, and the checks for which there are enough rungs.

    Args:
        runs: Of single models.
        combined: Of several models together; each has `alone`, the accuracy without the others.
    """
    rungs = {}
    for name in RUNGS:
        own = [run for run in runs if run["rung"] == name]
        if own:
            rungs[name] = {
                "seeds": sorted(run["seed"] for run in own),
                **{key: spread(run.get(key) for run in own) for key in MEASURES},
            }
    together = {}
    for name in GONE_TOGETHER:
        own = [run for run in combined if run["rung"] == name]
        if own:
            together[name] = {
                "seeds": sorted({seed for run in own for seed in run["seeds"]}),
                **{key: spread(run.get(key) for run in own) for key in ("alone", *MEASURES)},
            }
    return {"rungs": rungs, "combined": together, "checks": checks(rungs, together)}


def spread(values: Iterable[float | None]) -> dict[str, float] | None:
    """Mean, smallest and largest of the values, without those that are None."""
    known = [value for value in values if value is not None]
    if not known:
        return None
    return {"mean": statistics.fmean(known), "min": min(known), "max": max(known)}


def checks(rungs: dict[str, Any], combined: dict[str, Any]) -> list[dict[str, Any]]:
    """What the ladder should show, by mean test accuracy, for the rungs that were measured.

    Returns:
        For each check `name`, `found` and `passed`. A check of the order of two rungs also has
        `clear`: whether the worst seed of the upper rung is above the best seed of the lower rung.
    """
    own = [name for name in ORDERED if name in rungs and name != "homework"]
    pairs = list(zip(own, own[1:], strict=False))
    if {"homework", "strong"} <= set(rungs):
        pairs.insert(0, ("homework", "strong"))
    if {"best", "best-lm"} <= set(rungs):
        pairs.append(("best", "best-lm"))
    found = []
    for lower, upper in pairs:
        below, above = (rungs[name]["test_accuracy"] for name in (lower, upper))
        gain = above["mean"] - below["mean"]
        clear = above["min"] > below["max"]
        found.append(
            {"name": f"{upper} above {lower}", "found": gain, "passed": gain > 0, "clear": clear}
        )
    for (lower, upper), share in GONE.items():
        if {lower, upper} <= set(rungs):
            below, above = (rungs[name]["test_accuracy"]["mean"] for name in (lower, upper))
            found.append(_errors_check(upper, lower, below, above, share))
    for name, row in combined.items():
        below, above = row["alone"]["mean"], row["test_accuracy"]["mean"]
        one = "the better one" if name == PAIR else "one"
        found.append(_errors_check(name, one, below, above, GONE_TOGETHER[name]))
    return found


def _errors_check(
    upper: str, lower: str, before: float, after: float, share: float
) -> dict[str, Any]:
    gone = errors_gone(before, after)
    wanted = f"at least {100 * share:.0f} % of the errors of {lower} (share gone)"
    return {"name": f"{upper} without {wanted}", "found": gone, "passed": gone >= share}


def errors_gone(before: float, after: float) -> float:
    """Share of the errors that are gone between two accuracies; negative if there are more."""
    if before == 1.0:
        return 0.0 if after == 1.0 else float("-inf")
    return 1.0 - (1.0 - after) / (1.0 - before)


def table(summary: dict[str, Any]) -> str:
    """The rungs and combinations as a Markdown table, then the checks as a list."""
    lines = [
        "| rung | test | validation | EER | minDCF | EER, AS-norm | minDCF, AS-norm | samples/s |",
        "|---|---|---|---|---|---|---|---|",
    ]
    measures = ("test_accuracy", "val_accuracy", *TRIAL_MEASURES)
    for name, rung in (summary["rungs"] | summary["combined"]).items():
        cells = [_cell(rung[key], 4) for key in measures]
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
