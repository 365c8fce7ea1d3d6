"""A fixture that the tests of reading share."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest


@pytest.fixture
def damaged(
    edge_sets: dict[tuple[str, str], Path], tmp_path: Path
) -> Callable[[str, str, Callable[[bytearray], Any]], Path]:
    """`damaged(codec, file, edit)`: a copy of a set with one file edited."""

    def damage(codec: str, name: str, edit: Callable[[bytearray], Any]) -> Path:
        folder = tmp_path / "damaged"
        shutil.copytree(edge_sets["float16", codec], folder)
        data = bytearray((folder / name).read_bytes())
        edit(data)
        (folder / name).write_bytes(data)
        return folder

    return damage
