"""The style of the pictures in `scripts/results/`, and the command that draws one."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

OURS, OTHER, INK, FAINT = "#c2410c", "#475569", "#1e293b", "#64748b"
# Inches and dots per inch: about twice the width of a README in a browser.
WIDTH, DPI = 9.0, 200


def start(height: float) -> tuple[Any, Any]:
    """A figure of WIDTH x height [inches], drawn without a display, and its axes."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(WIDTH, height), dpi=DPI)
    return figure, axes


def finish(figure: Any, path: Path) -> None:
    """Write a figure as PNG, and close it."""
    from matplotlib import pyplot

    figure.savefig(path, bbox_inches="tight", facecolor="white")
    pyplot.close(figure)


def bare(axes: Any, values: str) -> None:
    """Remove the frame, and draw a grid for the axis of the values, "x" or "y"."""
    axes.grid(axis=values, color="#e2e8f0", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(axis=values, length=0, labelsize=8, labelcolor=FAINT)
    for side in ("top", "right", "left", "bottom"):
        axes.spines[side].set_visible(False)


def title(axes: Any, headline: str, about: str) -> None:
    """Write a headline, and beneath it what was measured and how."""
    axes.set_title(headline, loc="left", fontsize=12, color=INK, pad=34, weight="bold")
    axes.annotate(
        about,
        (0, 1),
        (0, 7),
        xycoords="axes fraction",
        textcoords="offset points",
        fontsize=8,
        color=FAINT,
        va="bottom",
    )


def command(draw: Callable[[dict[str, Any], Path], None]) -> click.Command:
    """A command that draws a result file."""

    @click.command()
    @click.argument("result", type=click.Path(exists=True, dir_okay=False, path_type=Path))
    @click.argument("picture", type=click.Path(dir_okay=False, path_type=Path))
    def main(result: Path, picture: Path) -> None:
        """Draw the RESULT file into PICTURE (PNG)."""
        draw(json.loads(result.read_text()), picture)

    return main
