"""The shape of the project: which room may import which, no circles, and what the core loads."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import shardprep

ROOT = Path(__file__).parents[1]
PACKAGES = {
    "shardprep": ROOT / "shardprep",
    "shardprep_trainer": ROOT / "trainer" / "shardprep_trainer",
}
MODULES = sorted(path for folder in PACKAGES.values() for path in folder.rglob("*.py"))
MOST_MODULES = 12

# Each room, a folder or a module of its package, and the rooms that it may import besides itself.
BASE = {"errors"}
CORE = {*BASE, "system"}
READ = {*CORE, "format", "storage", "cache", "read", "load"}
BUILD = {*CORE, "format", "storage", "audio", "source", "build", "read"}
LEARN = {*BASE, "config", "processes", "model"}
USE = {*LEARN, "checkpoint", "evaluation"}
MAY_IMPORT: dict[str, dict[str, set[str]]] = {
    "shardprep": {
        "errors": set(),
        "format": BASE,
        "system": BASE,
        "storage": CORE,
        "cache": {*CORE, "format", "storage"},
        "read": {*CORE, "format", "storage", "cache"},
        "load": {*CORE, "format", "storage", "cache", "read"},
        "audio": {*CORE, "format", "storage"},
        "source": {*CORE, "format", "storage", "audio"},
        "build": {*CORE, "format", "storage", "audio", "source", "read"},
        "check": READ | BUILD,
        "bench": READ | BUILD,
        "cli": READ | BUILD | {"check", "bench"},
        "__main__": {"cli"},
    },
    "shardprep_trainer": {
        "errors": set(),
        "config": BASE,
        "processes": BASE,
        "model": {*BASE, "config", "processes"},
        "checkpoint": LEARN,
        "learning": LEARN,
        "evaluation": LEARN,
        "run": USE | {"learning"},
        "pretrained": USE,
        "inference": USE | {"pretrained"},
        "train": USE | {"learning", "run"},
        "commands": {*BASE, "config"},
        "convert": {*BASE, "model"},
        **{
            command: USE | {"pretrained", "inference", "commands"}
            for command in ("predict", "score", "embed", "compare", "identify")
        },
        "export": {*BASE, "checkpoint", "model", "convert", "commands"},
    },
}


def dotted(path: Path) -> str:
    """The name that a module is imported by."""
    (package, folder) = next(item for item in PACKAGES.items() if path.is_relative_to(item[1]))
    parts = path.relative_to(folder).with_suffix("").parts
    return ".".join((package, *(part for part in parts if part != "__init__")))


NAMES = {dotted(path): path for path in MODULES}


def imported_names(path: Path) -> Iterator[str]:
    """Every dotted name that a module imports, anywhere in it, also for types only."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: write imports with the package's name"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def imported_modules(path: Path) -> set[str]:
    """The project's modules that a module imports."""
    found = set()
    for name in imported_names(path):
        for module in (name, name.rpartition(".")[0]):
            if module in NAMES and module not in PACKAGES:
                found.add(module)
                break
    return found - {dotted(path)}


@pytest.mark.parametrize("path", MODULES, ids=lambda path: dotted(path))
def test_imports_follow_the_arrows(path: Path) -> None:
    package, *rest = dotted(path).split(".")
    for name in imported_names(path):
        head, *inner = name.split(".")
        if package == "shardprep":
            assert head != "shardprep_trainer", f"{path} imports {name}"
        elif head == "shardprep" and inner:
            assert inner[0] in shardprep.__all__, f"{path} imports {name}, which is not public"
        if head == package and rest:
            assert inner, f"{path} imports {name}"
            room, other = rest[0], inner[0]
            assert room in MAY_IMPORT[package], f"{path}: the layers do not know this room"
            allowed = MAY_IMPORT[package][room] | {room}
            # The package's public names would lead around the layers.
            assert other in allowed or name == "shardprep.__version__", f"{path} imports {name}"


def test_every_room_stands_in_the_layers() -> None:
    for package, folder in PACKAGES.items():
        rooms = {
            path.stem
            for path in folder.iterdir()
            if path.suffix == ".py" or (path / "__init__.py").exists()
        }
        assert rooms - {"__init__"} == set(MAY_IMPORT[package])


def test_no_modules_import_one_another_in_a_circle() -> None:
    arrows = {name: imported_modules(path) for name, path in NAMES.items()}
    # Remove modules that import no module that is left. What remains is in a circle or imports one.
    while free := [name for name, others in arrows.items() if not others & arrows.keys()]:
        for name in free:
            del arrows[name]
    assert not arrows


def test_a_folder_holds_at_most_a_dozen_modules() -> None:
    folders = [*PACKAGES.values(), ROOT / "scripts"]
    for folder in {path.parent for top in folders for path in top.rglob("*.py")}:
        modules = {path.name for path in folder.glob("*.py")} - {"__init__.py"}
        assert len(modules) <= MOST_MODULES, folder


def test_large_modules_are_the_exception() -> None:
    long = {p.name: n for p in MODULES if (n := len(p.read_text().splitlines())) > 400}
    assert not long


def test_importing_shardprep_is_enough_to_reach_every_public_name() -> None:
    assert sorted(shardprep.__all__) == shardprep.__all__
    for name in shardprep.__all__:
        assert getattr(shardprep, name).__doc__


def loaded(program: str, *arguments: object) -> set[str]:
    """The modules that a program has loaded when it ends."""
    tell = "\nimport sys; print(*sys.modules, sep='\\n')"
    command = [sys.executable, "-c", program + tell, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return set(done.stdout.split())


def test_reading_an_utterance_loads_only_what_reading_takes(tmp_path: Path) -> None:
    from tests.conftest import write_dataset

    shardprep.build_shards(write_dataset(tmp_path / "Dataset"), tmp_path / "shards")
    program = (
        "import sys, shardprep\nshardprep.open_shards(sys.argv[1])['train'].read(0)\n"
        "assert 'shardprep.read.shard_set' in sys.modules"
    )
    found = loaded(program, tmp_path / "shards")
    assert "torch" not in found
    assert "webdataset" not in found
    for room in ("source", "build", "check", "bench", "cli", "load"):
        assert not any(name.startswith(f"shardprep.{room}") for name in found), room
