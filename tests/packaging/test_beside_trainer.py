"""Another project's package `trainer` in the same environment: neither harms the other."""

from __future__ import annotations

import base64
import csv
import hashlib
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.packaging.conftest import Environment, build

pytestmark = pytest.mark.slow

FOREIGN = "another-trainer"

PYPROJECT = f"""
[project]
name = "{FOREIGN}"
version = "1"

[tool.setuptools]
packages = ["trainer"]
"""


@pytest.fixture
def foreign(tmp_path: Path) -> Path:
    """A wheel whose package `trainer` has modules of the names that ours have."""
    folder = tmp_path / "foreign"
    (folder / "trainer").mkdir(parents=True)
    (folder / "pyproject.toml").write_text(PYPROJECT)
    for name in ("__init__", "train", "predict", "model"):
        (folder / "trainer" / f"{name}.py").write_text("raise SystemExit('of another project')\n")
    return build("build_wheel", folder, tmp_path / "foreign-made")


def assert_undamaged(environment: Environment, name: str) -> None:
    """Every file that an installed wheel lists is there, with the bytes of the wheel."""
    (info,) = environment.packages.glob(f"{name.replace('-', '_')}-*.dist-info")
    rows = list(csv.reader((info / "RECORD").read_text().splitlines()))
    assert len(rows) > 5
    for file, checksum, _ in rows:
        content = (environment.packages / file).read_bytes()
        if checksum:
            digest = base64.urlsafe_b64encode(hashlib.sha256(content).digest()).rstrip(b"=")
            assert checksum == f"sha256={digest.decode()}", file


def assert_both_launch_commands_train(
    environment: Environment, checkout: Path, shards: Path, runs: Path
) -> None:
    environment.see_packages_of_this()
    launch = ("python", "-m", "accelerate.commands.accelerate_cli", "launch", "--cpu")
    options = (
        *("--config", "smoke", "--data.shards", shards, "--train.runs", runs),
        *("--train.total_steps", "4", "--train.valid_steps", "4", "--train.save_steps", "4"),
        *("--optim.warmup_steps", "1"),
    )
    ways = {
        "module": (runs.parent, ("-m", "shardprep_trainer.train")),
        "checkout": (checkout, ("trainer/train.py",)),
    }
    for name, (folder, program) in ways.items():
        environment.succeed(*launch, *program, *options, "--name", name, cwd=folder)
        assert (runs / name / "checkpoints" / "step-00000004.pt").is_file()
    environment.see_only_its_own()


@pytest.mark.parametrize("first", ["ours", "theirs"])
def test_neither_harms_the_other(
    distribution: Callable[[str], Path],
    checkout: Path,
    environment: Environment,
    foreign: Path,
    make_dataset: Callable[..., Path],
    tmp_path: Path,
    first: str,
) -> None:
    wheel, shards = distribution("wheel"), tmp_path / "shards"
    source = make_dataset(speakers=3, utterances=8)
    subprocess.run([sys.executable, "-m", "shardprep", "build", source, shards], check=True)
    for file in (wheel, foreign) if first == "ours" else (foreign, wheel):
        environment.pip("install", "--no-deps", file)
    assert_undamaged(environment, "shardprep")
    assert_undamaged(environment, FOREIGN)
    assert_both_launch_commands_train(environment, checkout, shards, tmp_path / "runs")
    environment.pip("uninstall", "--yes", FOREIGN)
    assert_undamaged(environment, "shardprep")
    environment.pip("install", "--no-deps", foreign)
    environment.pip("uninstall", "--yes", "shardprep")
    assert_undamaged(environment, FOREIGN)
    assert not list(environment.packages.glob("shardprep*"))
