"""Whatever grows while soaking is noticed."""

from __future__ import annotations

import subprocess
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from scripts.torture import soak


def rounds(**growing: float) -> list[Any]:
    """Twelve rounds, in each of which these figures grow by so much."""
    flat = dict.fromkeys(("memory_mib", "descriptors", "maps", "threads", "training_mib"), 100)
    base = soak.Round(**flat, seconds=0, epochs=0, steps=0, orphans=0, shared_files=0)
    return [
        replace(base, **{name: getattr(base, name) + step * n for name, step in growing.items()})
        for n in range(12)
    ]


def test_flat_figures_hold() -> None:
    assert all(figure["held"] for figure in soak.summarise(rounds(), growth=0).values())


@pytest.mark.parametrize(
    ("name", "step"),
    [
        ("memory_mib", 2),
        ("training_mib", 2),
        ("descriptors", 1),
        ("maps", 1),
        ("threads", 1),
        ("orphans", 1),
        ("shared_files", 1),
    ],
)
def test_growth_is_named(name: str, step: float) -> None:
    figures = soak.summarise(rounds(**{name: step}), growth=10)
    assert [key for key, figure in figures.items() if not figure["held"]] == [name]


def test_processes_of_a_group_are_found_until_they_end() -> None:
    command = ["sh", "-c", "sleep 60 & sleep 60"]
    with subprocess.Popen(command, start_new_session=True) as run:
        while len(soak.group(run.pid)) < 3:
            assert run.poll() is None
        assert soak.resident_mib(run.pid) > 0
        for pid in soak.group(run.pid):
            soak.os.kill(pid, soak.signal.SIGKILL)
    while soak.group(run.pid):
        pass
    assert soak.resident_mib(run.pid) == 0


def test_the_last_complete_line_tells_the_step(tmp_path: Path) -> None:
    metrics = tmp_path / "metrics.jsonl"
    assert soak.steps_of(metrics) == 0
    metrics.write_text('{"step": 3}\n{"step": 4}\n{"st')
    assert soak.steps_of(metrics) == 4
