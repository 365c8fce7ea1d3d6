"""The public surface: what `__all__` lists is there, and importing the package costs nothing."""

from __future__ import annotations

import ast
import importlib
import os
import pkgutil
import subprocess
import sys
from pathlib import Path

import pytest

import shardprep


def homes() -> dict[str, str]:
    """The module of each public name, as type checkers read it."""
    stub = Path(shardprep.__file__).with_suffix(".pyi")
    return {
        alias.name: f"shardprep.{node.module}"
        for node in ast.parse(stub.read_text()).body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }


def test_names_are_those_that_type_checkers_see() -> None:
    assert shardprep.__all__ == sorted(homes())
    assert set(shardprep.__all__) <= set(dir(shardprep))


@pytest.mark.parametrize("name", shardprep.__all__)
def test_every_name_is_that_of_its_home(name: str) -> None:
    home = importlib.import_module(homes()[name])
    assert getattr(shardprep, name) is getattr(home, name)
    assert getattr(shardprep, name).__module__ == home.__name__


@pytest.mark.slow
def test_type_checkers_see_the_types(tmp_path: Path) -> None:
    pytest.importorskip("mypy", reason="mypy is in the extra dev")
    (tmp_path / "user.py").write_text(
        "import shardprep\n"
        "from shardprep import *\n"
        "reveal_type(shardprep.SegmentLoader)\n"
        "reveal_type(open_shards('shards')['train'])\n"
        "shardprep.open_shard\n"
    )
    # To read all of PyTorch would take minutes.
    (tmp_path / "mypy.ini").write_text("[mypy]\n[mypy-torch.*]\nfollow_imports = skip\n")
    command = [sys.executable, "-m", "mypy", "--strict", "--cache-dir", "cache", "user.py"]
    done = subprocess.run(
        [*command, "--follow-imports", "silent"],
        cwd=tmp_path,
        env={**os.environ, "MYPYPATH": str(Path(shardprep.__file__).parents[1])},
        capture_output=True,
        text=True,
    )
    found = done.stdout
    assert "shardprep.load.segments.SegmentLoader" in found
    assert 'Revealed type is "shardprep.read.split.Split"' in found
    assert 'Module has no attribute "open_shard"' in found
    assert "Found 1 error" in found


def test_no_module_hides_a_public_name() -> None:
    # Importing a submodule binds it in the package, in front of the lazy table.
    modules = {module.name for module in pkgutil.iter_modules(shardprep.__path__)}
    assert not modules & set(shardprep.__all__)


def test_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no_such_name"):
        shardprep.no_such_name  # noqa: B018


def test_import_loads_neither_torch_nor_numpy() -> None:
    code = "import sys, shardprep; print(*{name.partition('.')[0] for name in sys.modules})"
    loaded = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    ).stdout.split()
    assert "shardprep" in loaded
    assert not {"torch", "numpy", "webdataset", "zstandard", "click"} & set(loaded)
