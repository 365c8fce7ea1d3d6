"""The predictions as Markdown tables, as docs/gpu-speed.md has them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

# Batch sizes of the table of all recipes, each with the way that is best for it.
SHOWN = ((32, "graphs"), (512, "compiled"))


def table(result: dict[str, Any]) -> str:
    """All that a result has."""
    parts = []
    if "gpus" in result:
        parts += [
            "Predicted, not measured: segments/s of boss (share of the tensor cores' rate).",
            ways_table(result["gpus"], "boss"),
            "Predicted for every recipe: segments/s, and the time of its whole run.",
            recipes_table(result["gpus"]),
        ]
    if "published" in result:
        parts += ["Published speeds on GPUs, predicted:", published_table(result["published"])]
    if "check" in result:
        parts += ["The method, tested on a CPU:", check_table(result["check"])]
    if "compiler" in result:
        parts += ["Fused kernels, counted and compiled:", compiler_table(result["compiler"])]
    return "\n\n".join(parts)


def ways_table(rows: Sequence[dict[str, Any]], recipe: str) -> str:
    """A recipe's speed, and its share of the peak: a line for each GPU and way."""
    rows = [row for row in rows if row["recipe"] == recipe]
    batches = list(dict.fromkeys(row["batch"] for row in rows))
    lines = [f"| GPU | way | {' | '.join(f'batch {batch:,}' for batch in batches)} |"]
    lines.append("|---|---|" + "---|" * len(batches))
    for gpu, way in dict.fromkeys((row["gpu"], row["way"]) for row in rows):
        cells = [_cell(row) for row in rows if (row["gpu"], row["way"]) == (gpu, way)]
        lines.append(f"| {gpu} | {way} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _cell(row: dict[str, Any]) -> str:
    if not row["fits"]:
        return "too large"
    return f"{_rounded(row['segments_per_s'])} ({row['share_of_peak']:.0%})"


def recipes_table(rows: Sequence[dict[str, Any]]) -> str:
    """Every recipe's speed and time for its budget: a line for each recipe and batch size."""
    gpus = list(dict.fromkeys(row["gpu"] for row in rows))
    lines = [f"| recipe | batch | {' | '.join(gpus)} |", "|---|---|" + "---|" * len(gpus)]
    for recipe in dict.fromkeys(row["recipe"] for row in rows):
        for batch, way in SHOWN:
            found = {
                row["gpu"]: row
                for row in rows
                if (row["recipe"], row["batch"], row["way"]) == (recipe, batch, way)
            }
            cells = [_time(found[gpu]) for gpu in gpus]
            lines.append(f"| {recipe} | {batch:,}, {way} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _time(row: dict[str, Any]) -> str:
    if not row["fits"]:
        return "too large"
    return f"{_rounded(row['segments_per_s'])}/s, {_duration(row['hours'])}"


def _duration(hours: float) -> str:
    """Seconds below two minutes, minutes below two hours; in two figures."""
    for unit, count in (("s", 3600), ("min", 60)):
        if hours * count < 120:
            return f"{float(f'{hours * count:.2g}'):g} {unit}"
    return f"{float(f'{hours:.2g}'):g} h"


def _rounded(value: float) -> str:
    """Two figures: no prediction is more exact."""
    return f"{float(f'{value:.2g}'):,.0f}"


def published_table(rows: Sequence[dict[str, Any]]) -> str:
    """Predicted speeds beside those that others measured."""
    lines = [
        "| network | GPU, batch | predicted, images/s | published | ratio |",
        "|---|---|---|---|---|",
    ]
    lines += [
        f"| {row['network']} | {row['gpu']}, {row['batch']} | "
        f"{_rounded(row['predicted_images_per_s'])} | "
        f"[{row['published_images_per_s']:,.0f}]({row['source']}) | {row['ratio']:.2f} |"
        for row in rows
    ]
    return "\n".join(lines)


def check_table(found: dict[str, Any]) -> str:
    """Predicted and measured speed on the CPU."""
    lines = ["| recipe | predicted, segments/s | measured | ratio |", "|---|---|---|---|"]
    lines += [
        f"| {row['name']} | {row['predicted_segments_per_s']:,.1f} | "
        f"{row['measured_segments_per_s']:,.1f} | {row['ratio']:.2f} |"
        for row in found["recipes"]
    ]
    return "\n".join(lines)


def compiler_table(found: dict[str, Any]) -> str:
    """Counted kernels and their bytes beside those of TorchInductor."""
    lines = ["| what | counted | TorchInductor | ratio |", "|---|---|---|---|"]
    ours, theirs = found["counted"], found["inductor"]
    for name, scale in (("kernels", 1.0), ("bytes", 1e6)):
        unit = f"{name} [MB]" if scale > 1 else name
        values = (one[name] / scale for one in (ours, theirs))
        cells = " | ".join(f"{value:,.0f}" for value in values)
        lines.append(f"| {unit} | {cells} | {found[name]:.2f} |")
    return "\n".join(lines)
