"""Draw a result file of `scripts.ladder`: test and validation accuracy of every rung.

    python -m scripts.ladder.plot scripts/results/ladder.json scripts/results/ladder.png

This needs matplotlib (extra `[bench]`).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from scripts.plot_style import FAINT, INK, OTHER, OURS, bare, command, finish, start, title

# The dots of a rung's seeds take this share of the distance between two rungs.
SPREAD = 0.22


def draw(result: dict[str, Any], path: Path) -> None:
    """Write the picture of a result."""
    names = list(result["rungs"])
    figure, axes = start(4.6)
    for place, name in enumerate(names):
        colour = OTHER if name == "homework" else OURS
        runs = [run for run in result["runs"] if run["rung"] == name]
        middle = (len(runs) - 1) / 2
        for number, run in enumerate(sorted(runs, key=lambda run: run["seed"])):
            at = place + SPREAD * (number - middle) / max(1, len(runs))
            axes.scatter(at, run["test_accuracy"], s=42, color=colour, zorder=3)
            axes.scatter(
                at, run["val_accuracy"], s=42, facecolor="white", edgecolor=colour, zorder=3
            )
        mean = result["rungs"][name]["test_accuracy"]["mean"]
        axes.hlines(mean, place - 0.28, place + 0.28, color=colour, linewidth=1.4, zorder=2)
        axes.annotate(
            f"{mean:.3f}",
            (place + 0.3, mean),
            (2, 0),
            textcoords="offset points",
            va="center",
            fontsize=9,
            color=INK,
        )
    _frame(axes, names)
    _title(axes, result)
    finish(figure, path)


def _frame(axes: Any, names: list[str]) -> None:
    labels = [name if name != "homework" else "homework's code,\nas published" for name in names]
    axes.set_xticks(range(len(names)), labels, fontsize=10, color=INK)
    axes.set_xlim(-0.6, len(names) - 0.3)
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:.2f}")
    axes.set_ylabel("accuracy", fontsize=9, color=FAINT)
    bare(axes, "y")
    axes.tick_params(axis="x", length=0)
    for label, face in (("test, whole utterances", OURS), ("validation, best", "white")):
        axes.scatter([], [], s=42, facecolor=face, edgecolor=OURS, label=label)
    axes.legend(loc="lower right", fontsize=9, frameon=False, labelcolor=INK)


def _title(axes: Any, result: dict[str, Any]) -> None:
    settings, data = result["settings"], result["dataset"]
    width = f"Conformers of width {settings['width']}, " if settings["width"] else ""
    title(
        axes,
        "Accuracy of every rung",
        f"{data['speakers']:,} speakers, {data['labelled']:,} labelled and {data['test']:,} test "
        f"utterances; {settings['segments']:,} training segments in each run, {width}"
        f"{len(settings['seeds'])} seed(s)\n"
        f"{result['device']}, {result['date']}; dots are runs, lines are means on the test set",
    )


main = command(draw)

if __name__ == "__main__":
    main()
