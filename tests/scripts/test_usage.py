"""Every script starts with `python -m` and its module's name, and its docstring shows how."""

from __future__ import annotations

import ast
import re
import runpy
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__main__" else parts)


SCRIPTS = {
    module_name(path): path
    for path in sorted((ROOT / "scripts").rglob("*.py"))
    if '__name__ == "__main__"' in path.read_text()
}


def usages(path: Path) -> list[str]:
    """The commands in the docstring of a module, each with its continuation lines."""
    docstring = ast.get_docstring(ast.parse(path.read_text()), clean=False) or ""
    blocks = re.findall(r"(?:^ {4}.*\n)+", f"{docstring}\n", re.MULTILINE)
    lines = (usage for block in blocks for usage in re.split(r"^ {4}(?=\S)", block, flags=re.M))
    return [usage for usage in lines if usage.startswith("python -m scripts.")]


# This executes modules that are imported already.
@pytest.mark.filterwarnings("ignore:.*found in sys.modules:RuntimeWarning")
@pytest.mark.parametrize("name", SCRIPTS)
def test_each_script_starts_and_has_the_options_that_its_docstring_shows(
    name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", [name, "--help"])
    with pytest.raises(SystemExit) as stop:
        runpy.run_module(name, run_name="__main__", alter_sys=True)
    assert not stop.value.code
    help_text = capsys.readouterr().out
    assert help_text.startswith(f"Usage: python -m {name} ")
    own = [usage for usage in usages(SCRIPTS[name]) if usage.split()[2] == name]
    assert own
    for option in re.findall(r"--[a-z][a-z-]*", " ".join(own)):
        assert re.search(rf"{option}\b", help_text), option


def test_docstrings_show_only_scripts_that_exist() -> None:
    paths = (ROOT / "scripts").rglob("*.py")
    assert {usage.split()[2] for path in paths for usage in usages(path)} == set(SCRIPTS)
