"""The distributions of a copy of the checkout, and environments of their own to install them in."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]

# Made by tools and tests anywhere, and by git, tools and `make` in the checkout itself.
_MADE = shutil.ignore_patterns("__pycache__", "*.egg-info")
_MADE_HERE = shutil.ignore_patterns(
    *(".git", ".venv*", ".*_cache", ".hypothesis", "build", "dist"),
    *("demo", "Dataset", "shards", "runs", "fuzz-found"),
)


def ignored(folder: str, names: list[str]) -> set[str]:
    """What a copy of the checkout leaves out; see `shutil.copytree`."""
    return _MADE(folder, names) | (_MADE_HERE(folder, names) if Path(folder) == ROOT else set())


def build(hook: str, folder: Path, out: Path) -> Path:
    """Build the project in a folder by a hook of setuptools, `build_wheel` or `build_sdist`."""
    code = f"import sys; from setuptools import build_meta; build_meta.{hook}(sys.argv[1])"
    out.mkdir(exist_ok=True)
    there = set(out.iterdir())
    command = [sys.executable, "-c", code, str(out)]
    done = subprocess.run(command, cwd=folder, env=plain(), capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    (made,) = set(out.iterdir()) - there
    return made


def plain(**more: str) -> dict[str, str]:
    """The environment of this process without what leads Python to the checkout."""
    kept = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    return {**kept, "OMP_NUM_THREADS": "1", **more}


class Environment:
    """A virtual environment of its own.

    Args:
        folder: Where to make it.
    """

    def __init__(self, folder: Path) -> None:
        subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder], check=True)
        self.python = folder / "bin" / "python"
        version = f"python{sys.version_info.major}.{sys.version_info.minor}"
        self.packages = folder / "lib" / version / "site-packages"

    def pip(self, *words: str | Path) -> None:
        """Run pip on it."""
        command = [sys.executable, "-m", "pip", "--python", self.python, *words]
        done = subprocess.run(command, env=plain(), capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr

    def see_packages_of_this(self) -> None:
        """Show it what this environment has installed, behind its own and without ours."""
        (self.packages / "others.pth").write_text(sysconfig.get_path("purelib") + "\n")

    def see_only_its_own(self) -> None:
        """Undo `see_packages_of_this`."""
        (self.packages / "others.pth").unlink()

    def run(self, *words: str | Path, **options: Any) -> subprocess.CompletedProcess[str]:
        """Run a program of it; `options` are those of `subprocess.run`."""
        command = [self.python.parent / words[0], *words[1:]]
        return subprocess.run(command, env=plain(), capture_output=True, text=True, **options)

    def succeed(self, *words: str | Path, **options: Any) -> str:
        """Run a program of it that must exit with 0; returns its stdout."""
        done = self.run(*words, **options)
        assert done.returncode == 0, f"{words}\n{done.stdout}\n{done.stderr}"
        return done.stdout


@pytest.fixture
def environment(tmp_path: Path) -> Environment:
    return Environment(tmp_path / "environment")


@pytest.fixture(scope="session")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the checkout, without what was made in it."""
    return Path(shutil.copytree(ROOT, tmp_path_factory.mktemp("copy") / "checkout", ignore=ignored))


@pytest.fixture(scope="session")
def distribution(checkout: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """`distribution("wheel")` or `distribution("sdist")`: the file that users install."""
    folder, made = tmp_path_factory.mktemp("distributions"), dict[str, Path]()

    def build_once(kind: str) -> Path:
        if kind not in made:
            copy = shutil.copytree(checkout, folder / kind)
            made[kind] = build(f"build_{kind}", Path(copy), folder / f"{kind}-made")
        return made[kind]

    return build_once
