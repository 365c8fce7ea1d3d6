"""The snippets of docs/loops.md run."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from shardprep import BuildOptions, build_shards

PAGE = Path(__file__).parents[2] / "docs" / "loops.md"
SECTIONS = PAGE.read_text().split("\n## ")[1:]
SNIPPETS = [
    (section.splitlines()[0], snippet)
    for section in SECTIONS
    for snippet in re.findall(r"^```python\n(.*?)^```", section, re.MULTILINE | re.DOTALL)
]

pytestmark = pytest.mark.loops


@pytest.mark.parametrize(("title", "snippet"), SNIPPETS, ids=[title for title, _ in SNIPPETS])
def test_every_snippet_runs(
    title: str, snippet: str, make_dataset: Callable[..., Path], tmp_path: Path
) -> None:
    build_shards(make_dataset(), tmp_path / "shards", BuildOptions(workers=1))
    done = subprocess.run(
        [sys.executable, "-c", snippet], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
