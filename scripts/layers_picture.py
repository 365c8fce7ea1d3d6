"""Draw the layers of both packages.

    python -m scripts.layers_picture        writes docs/layers.svg

The layers are those of tests/test_architecture.py. An arrow leads from a room to a room that it
imports; arrows that follow from others are left out.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping, Set
from itertools import pairwise
from pathlib import Path

import click

ROOT = Path(__file__).parents[1]
PICTURE = ROOT / "docs" / "layers.svg"
WIDTH, ROW, BOX, GAP = 500, 76, (92, 36), 80
MARGIN = 20

Layers = Mapping[str, Set[str]]
Place = tuple[float, float]


def layers() -> dict[str, Layers]:
    """The rooms of each package and what each may import, from the test."""
    file = ROOT / "tests" / "test_architecture.py"
    spec = importlib.util.spec_from_file_location("layers_of_the_test", file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    found: dict[str, Layers] = module.MAY_IMPORT
    return {
        package: {room: below for room, below in rooms.items() if room != "__main__"}
        for package, rooms in found.items()
    }


def levels(rooms: Layers) -> dict[str, int]:
    """The row of each room: above all that it may import, and near to what imports it."""
    found: dict[str, int] = {}
    while len(found) < len(rooms):
        for room, below in rooms.items():
            if room not in found and below <= found.keys():
                found[room] = 1 + max((found[other] for other in below), default=-1)
    pairs = arrows(rooms)
    for room in found:
        above = [found[other] for other, below in pairs if below == room]
        if len(above) > len([below for other, below in pairs if other == room]):
            found[room] = min(above) - 1
    return found


def arrows(rooms: Layers) -> list[tuple[str, str]]:
    """Pairs (room, other) that do not follow from other pairs."""
    return [
        (room, other)
        for room, below in rooms.items()
        for other in sorted(below)
        if not any(other in rooms[between] for between in below)
    ]


def draw(packages: Mapping[str, Layers]) -> str:
    """The picture as SVG, the packages side by side."""
    height = ROW * (1 + max(max(levels(rooms).values()) for rooms in packages.values())) + 30
    width = (WIDTH + GAP) * len(packages) - GAP + 2 * MARGIN
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height + 2 * MARGIN}" '
        'font-family="sans-serif" font-size="15" text-anchor="middle">',
        '<defs><marker id="head" viewBox="0 0 8 8" refX="8" refY="4" markerWidth="8" '
        'markerHeight="8" orient="auto"><path d="M0,0 L8,4 L0,8 z" fill="#555"/></marker></defs>',
        '<rect width="100%" height="100%" fill="white"/>',
    ]
    for number, (package, rooms) in enumerate(packages.items()):
        left = MARGIN + number * (WIDTH + GAP)
        parts.append(
            f'<rect x="{left}" y="{MARGIN}" width="{WIDTH}" height="{height}" rx="12" '
            'fill="#f4f6fa" stroke="#aab"/>'
            f'<text x="{left + WIDTH / 2}" y="{MARGIN + 26}" font-weight="bold">{package}</text>'
        )
        parts += _package(rooms, left, height)
    parts.append(_between(height))
    return "\n".join([*parts, "</svg>", ""])


def _package(rooms: Layers, left: float, height: float) -> list[str]:
    rows = levels(rooms)
    places: dict[str, Place] = {}
    for level in sorted(set(rows.values())):
        row = [room for room in rooms if rows[room] == level]
        for n, room in enumerate(row):
            places[room] = (left + WIDTH * (n + 0.5) / len(row), height - 20 - ROW * level)
    lines = [
        f'<polyline points="{_route(room, other, places, (left, left + WIDTH))}" fill="none" '
        'stroke="#555" marker-end="url(#head)"/>'
        for room, other in arrows(rooms)
    ]
    boxes = [
        f'<rect x="{x - BOX[0] / 2:.0f}" y="{y - BOX[1] / 2:.0f}" width="{BOX[0]}" '
        f'height="{BOX[1]}" rx="6" fill="white" stroke="#335"/>'
        f'<text x="{x:.0f}" y="{y + 5:.0f}">{room}</text>'
        for room, (x, y) in places.items()
    ]
    return lines + boxes


def _route(room: str, other: str, places: Mapping[str, Place], sides: tuple[float, float]) -> str:
    """The points of an arrow; it passes the rows between its ends beside their boxes."""
    (x, y), (end_x, end_y) = places[room], places[other]
    points = [(x, y + BOX[1] / 2), (end_x, end_y - BOX[1] / 2 - 2)]
    passed = [place for place in places.values() if y < place[1] < end_y]
    if passed:
        borders = sorted([*sides, *(place[0] for place in passed)])
        middles = [(one + two) / 2 for one, two in pairwise(borders)]
        free = [
            column
            for column in (*middles, x, end_x)
            if all(abs(column - place[0]) > BOX[0] / 2 + 6 for place in passed)
        ]
        column = min(free, key=lambda column: abs(column - (x + end_x) / 2))
        rows = [place[1] for place in passed]
        points[1:1] = [(column, min(rows) - BOX[1] / 2), (column, max(rows) + BOX[1] / 2)]
    return " ".join(f"{x:.0f},{y:.0f}" for x, y in points)


def _between(height: float) -> str:
    """The arrow from the trainer to shardprep."""
    x, y = MARGIN + WIDTH, MARGIN + height / 2
    return (
        f'<line x1="{x + GAP}" y1="{y}" x2="{x + 2}" y2="{y}" stroke="#555" stroke-width="2" '
        'marker-end="url(#head)"/>'
        f'<text x="{x + GAP / 2}" y="{y - 12}" font-size="12">public</text>'
        f'<text x="{x + GAP / 2}" y="{y + 22}" font-size="12">names</text>'
    )


@click.command()
def main() -> None:
    """Write docs/layers.svg."""
    PICTURE.write_text(draw(layers()))


if __name__ == "__main__":
    main()
