"""The results of `scripts.bench_train`: medians, ratios, a table."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any

from scripts.bench_train.arithmetic import utilisation
from scripts.bench_train.measurement import Spec


def summarise(
    found: dict[str, list[dict[str, Any]]],
    ways: dict[str, Spec],
    flops: float,
    peaks: dict[str, dict[str, Any]],
) -> list[dict[str, Any]]:
    """Medians over the rounds, and shares of the peak.

    Args:
        found: Measurements of each way.
        ways: All ways by name.
        flops: Operations for each segment.
        peaks: Peaks of the device by precision.
    """
    rows = []
    for name, measured in found.items():
        rate = statistics.median(one["samples_per_s"] for one in measured)
        peak = peaks[ways[name].precision]
        nominal = peak["nominal"]
        rows.append(
            {
                "name": name,
                "kind": ways[name].kind,
                "precision": ways[name].precision,
                "compile": ways[name].compile,
                "samples_per_s": rate,
                "rounds": [one["samples_per_s"] for one in measured],
                "waiting": statistics.median(one["waiting"] for one in measured),
                "peak_memory_mib": max(one["peak_memory_mib"] for one in measured),
                "share_of_peak": utilisation(rate, flops, peak["measured"]),
                "share_of_nominal_peak": nominal and utilisation(rate, flops, nominal),
            }
        )
    return rows


def ratios(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The speed of each of our ways relative to others; None where those were not measured."""
    rates = {row["name"]: row["samples_per_s"] for row in rows}
    files = [row["samples_per_s"] for row in rows if row["kind"] == "homework files"]
    return [
        {
            "name": row["name"],
            "to_homework": _ratio(row["samples_per_s"], max(files, default=None)),
            "to_homework_on_shards": _ratio(row["samples_per_s"], rates.get("homework, shards")),
            "to_one_batch": _ratio(row["samples_per_s"], rates.get(f"{row['name']}, one batch")),
        }
        for row in rows
        if row["kind"] == "ours"
    ]


def _ratio(rate: float, other: float | None) -> float | None:
    return rate / other if other else None


def table(result: dict[str, Any]) -> str:
    """The measurements as Markdown tables, one for each batch size."""
    lines = []
    for batch in result["batches"]:
        lines += [
            f"Batches of {batch['batch']}:",
            "",
            "| way | samples/s | relative to the homework's | waiting | MiB | of the peak |",
            "|---|---|---|---|---|---|",
        ]
        files = [row["samples_per_s"] for row in batch["ways"] if row["kind"] == "homework files"]
        for row in batch["ways"]:
            to_homework = f"{row['samples_per_s'] / max(files):.2f}x" if files else "-"
            lines.append(
                f"| {row['name']} | {row['samples_per_s']:,.1f} | {to_homework} | "
                f"{row['waiting']:.1%} | {row['peak_memory_mib']:,.0f} | "
                f"{row['share_of_peak']:.1%} |"
            )
        lines.append("")
        for ratio in batch["ratios"]:
            found = ratio["to_one_batch"]
            if found is not None:
                lines.append(f"- {ratio['name']}: {found:.3f} of its speed on one batch")
        lines.append("")
    for precision, peak in result["arithmetic"]["peak"].items():
        lines.append(f"- peak, precision {precision}: {peak['measured'] / 1e12:.3f} TFLOP/s")
    lines.append(f"- {result['arithmetic']['flops_per_sample'] / 1e9:.3f} GFLOP a segment")
    if result["whole"]:
        whole = result["whole"]
        lines.append(
            f"- an utterance of {whole['frames']:,} frames through boss on the CPU: "
            f"{whole['peak_memory_mib']:,.0f} MiB at most, {whole['before_mib']:,.0f} before it"
        )
    return "\n".join(lines)
