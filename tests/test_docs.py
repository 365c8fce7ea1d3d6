"""What the documents say is so: their examples parse, and the README's commands run."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import msgspec

from shardprep.format import decode_manifest, index_dtype
from shardprep.source import Reject

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
FORMAT = (ROOT / "FORMAT.md").read_text()

# What makes the README's training commands end in seconds; a later option wins.
SHORTENED = (
    "--train.total_steps 2 --train.valid_steps 2 --data.batch_size 4 "
    "--model.dim 32 --model.ff_dim 64 --model.heads 2 --model.head_dim 16"
)


def code_blocks(text: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.MULTILINE | re.DOTALL)


def test_format_shows_a_manifest_that_readers_accept() -> None:
    manifest, reject = code_blocks(FORMAT, "json")
    assert decode_manifest(manifest.encode(), Path("FORMAT.md")).splits["test"].samples == 2
    assert msgspec.json.decode(reject, type=Reject, strict=True).reason


def test_format_shows_the_index_row_as_it_is() -> None:
    rows = re.findall(r"^\| `(\w+)` \| `([<|]?\w+)` \| (\S+) \|", FORMAT, re.MULTILINE)
    dtype = index_dtype(37)
    expected = [(name, dtype[name].str.lstrip("|")) for name in dtype.names or ()]
    assert [(name, kind) for name, kind, _ in rows] == expected
    shown = {name: value for name, _, value in rows}
    assert int(shown["nbytes"]) == 128 + int(shown["frames"]) * 40 * 2


def test_readme_commands_run(tmp_path: Path, make_dataset: Callable[..., Path]) -> None:
    make_dataset(speakers=3, utterances=14)
    (tmp_path / "trainer").symlink_to(ROOT / "trainer")
    commands = [line for block in code_blocks(README, "sh") for line in block.splitlines()]
    commands = [line.split("#")[0].strip() for line in commands if not line.startswith("make ")]
    assert sum("trainer/train.py" in command for command in commands) >= 4
    seen = set()
    for command in commands:
        if command in seen:
            continue
        seen.add(command)
        run_command(command, tmp_path)
    rows = (tmp_path / "submission.csv").read_text().splitlines()
    assert rows[0] == "Id,Category"
    assert len(rows) == 1 + 5
    for code in code_blocks(README, "python"):
        run([sys.executable, "-W", "error", "-c", code], tmp_path)


def run_command(command: str, folder: Path) -> None:
    if "trainer/train.py" in command:
        command += f" {SHORTENED}"
    run(["sh", "-c", command], folder)


def run(command: list[str], folder: Path) -> None:
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    environment = {**os.environ, "PATH": path, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"


def test_readme_names_only_targets_that_make_knows() -> None:
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    named = set(re.findall(r"\bmake ([a-z-]+)", README))
    assert {"demo", "test"} <= named <= targets


def test_no_table_is_missing() -> None:
    assert "@@" not in README
