"""Draw a result of `scripts.bench.loader`: bars on a logarithmic scale, the fastest first.

    python -m scripts.bench.loader_plot scripts/results/loader.json scripts/results/loader.png

This needs matplotlib (extra `[bench]`).
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from scripts.plot_style import FAINT, INK, OTHER, OURS, bare, command, finish, start, title

PEER = "#94a3b8"
# Heights [inches].
BAR, MARGIN = 0.30, 1.5


def best_by_loader(loaders: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Each loader with its best number of workers, slowest first; without the limit."""
    best: dict[str, dict[str, Any]] = {}
    for row in loaders:
        name = row["name"].partition(",")[0]
        if row["kind"] != "limit" and (
            name not in best or row["samples_per_s"] > best[name]["samples_per_s"]
        ):
            best[name] = row
    return sorted(best.values(), key=lambda row: row["samples_per_s"])


def draw(result: dict[str, Any], path: Path) -> None:
    """Write the picture of a result."""
    rows = best_by_loader(result["loaders"])
    limit = next(row for row in result["loaders"] if row["kind"] == "limit")["samples_per_s"]
    figure, axes = start(MARGIN + BAR * len(rows))
    rates = [row["samples_per_s"] for row in rows]
    colours = [{"shardprep": OURS, "files": OTHER}.get(row["kind"], PEER) for row in rows]
    axes.barh([row["name"] for row in rows], rates, color=colours, height=0.72)
    for place, (row, rate) in enumerate(zip(rows, rates, strict=True)):
        ours = row["kind"] == "shardprep"
        axes.annotate(
            f"{rate:,.0f}",
            (rate, place),
            (4, 0),
            textcoords="offset points",
            va="center",
            fontsize=9,
            color=INK,
            fontweight="bold" if ours else "normal",
            bbox={"facecolor": "white", "edgecolor": "none", "pad": 0.8},
        )
    axes.axvline(limit, color=INK, linewidth=1.2, linestyle=(0, (4, 3)), zorder=0)
    axes.annotate(
        f"memory: {limit:,.0f}",
        (limit, 0),
        (-5, 0),
        textcoords="offset points",
        ha="right",
        va="center",
        fontsize=9,
        color=INK,
    )
    _frame(axes, min(rates), limit)
    _title(axes, result)
    finish(figure, path)


def _frame(axes: Any, slowest: float, limit: float) -> None:
    axes.set_xscale("log")
    # A power of ten, so that the bars of two runs begin at the same value.
    axes.set_xlim(10 ** math.floor(math.log10(slowest / 2)), limit * 1.3)
    axes.minorticks_off()
    axes.set_xlabel("segments per second", fontsize=9, color=FAINT)
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
    bare(axes, "x")
    axes.tick_params(axis="y", length=0, labelsize=9, labelcolor=INK)


def _title(axes: Any, result: dict[str, Any]) -> None:
    size, frames, n_mels = result["batch"]
    title(
        axes,
        "Random segments a second, by loader",
        f"{result['dataset']['utterances']:,} utterances, batches of {size} of {frames} x {n_mels} "
        f"{result['dtype']}, warm page cache, each with its best number of workers\n"
        f"{result['cores']} cores, {result['cpu']}, {result['date']}; "
        f"medians of {result['rounds']} rounds in one run",
    )


main = command(draw)

if __name__ == "__main__":
    main()
