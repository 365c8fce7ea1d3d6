"""The shape of the project: which package may import what, and names that must not clash."""

from __future__ import annotations

import ast
import importlib.metadata
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import shardprep

ROOT = Path(__file__).parents[1]
MODULES = sorted([*(ROOT / "shardprep").rglob("*.py"), *(ROOT / "trainer").rglob("*.py")])


def imported_names(path: Path) -> Iterator[str]:
    """Every dotted name that a module imports, anywhere in it."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative imports break under accelerate launch"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_follow_the_arrows(path: Path) -> None:
    package = path.relative_to(ROOT).parts[0]
    for name in imported_names(path):
        head, *rest = name.split(".")
        if package == "shardprep":
            assert head != "trainer", f"{path} imports {name}"
        elif head == "shardprep" and rest:
            assert rest[0] in shardprep.__all__, f"{path} imports {name}, which is not public"


def test_no_module_of_trainer_shadows_another() -> None:
    # `accelerate launch trainer/train.py` puts trainer/ first on sys.path.
    names = {path.stem for path in (ROOT / "trainer").glob("*.py")} - {"__init__"}
    installed = set(importlib.metadata.packages_distributions()) - {"shardprep", "trainer"}
    assert not names & (set(sys.stdlib_module_names) | installed)


def test_importing_shardprep_is_enough_to_reach_every_public_name() -> None:
    assert sorted(shardprep.__all__) == shardprep.__all__
    for name in shardprep.__all__:
        assert getattr(shardprep, name).__doc__


def test_large_modules_are_the_exception() -> None:
    long = {p.name: n for p in MODULES if (n := len(p.read_text().splitlines())) > 400}
    assert not long
