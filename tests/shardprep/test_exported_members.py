"""The public surface: what `__all__` lists is there, and importing the package costs nothing."""

from __future__ import annotations

import ast
import importlib
import pkgutil
import subprocess
import sys
from pathlib import Path

import pytest

import shardprep


def test_all_is_sorted_and_held_to_the_lazy_table() -> None:
    assert shardprep.__all__ == sorted(set(shardprep.__all__))
    assert set(shardprep.__all__) == set(shardprep._HOMES)
    assert set(shardprep.__all__) <= set(dir(shardprep))


def test_type_checkers_see_the_same_names() -> None:
    tree = ast.parse(Path(shardprep.__file__).read_text())
    checked = next(node for node in tree.body if isinstance(node, ast.If))
    seen = {
        alias.name: str(node.module).removeprefix("shardprep.")
        for node in checked.body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    assert seen == shardprep._HOMES


@pytest.mark.parametrize("name", shardprep.__all__)
def test_every_name_is_that_of_its_home(name: str) -> None:
    home = importlib.import_module(f"shardprep.{shardprep._HOMES[name]}")
    assert getattr(shardprep, name) is getattr(home, name)


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
