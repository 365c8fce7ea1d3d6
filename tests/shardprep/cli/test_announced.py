"""The trainer's commands under `shardprep`: listed without PyTorch, with their own exit codes."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

import shardprep
from shardprep.cli.announced import announced_commands

COMMANDS = ["compare", "embed", "export", "identify", "predict", "score", "train"]

# Stands for an environment without these packages: importing them fails.
_HIDDEN = (
    "import sys; sys.modules.update(dict.fromkeys(['torch', 'accelerate', 'jsonargparse'])); "
    "from shardprep.cli import main; main()"
)


def run_without_extra(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", _HIDDEN, *arguments]
    return subprocess.run(command, capture_output=True, text=True)


def run_shardprep(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "shardprep", *arguments]
    return subprocess.run(command, capture_output=True, text=True)


def test_help_lists_the_commands_without_the_extra() -> None:
    done = run_without_extra("--help")
    assert done.returncode == 0
    listed = done.stdout.partition("Commands for speaker models:\n")[2].partition("\n\n")[0]
    rows = [line.split(maxsplit=1) for line in listed.splitlines()]
    assert [name for name, _ in rows] == COMMANDS
    assert all(text.endswith(".") and not text.endswith("...") for _, text in rows)
    assert "pip install 'shardprep[train]'" in done.stdout


@pytest.mark.parametrize("command", COMMANDS)
def test_without_the_extra_a_command_names_it(command: str) -> None:
    done = run_without_extra(command, "--help")
    assert (done.returncode, done.stdout) == (2, "")
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: the package ")
    assert line.endswith(" is not installed. Run: pip install 'shardprep[train]'")


def test_help_is_that_of_the_command() -> None:
    done = run_shardprep("predict", "--help")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("Usage: shardprep predict [OPTIONS] RUN...\n")
    assert "--checkpoint" in done.stdout
    assert max(map(len, done.stdout.splitlines())) <= 80


def test_options_reach_the_command_as_they_were_given() -> None:
    done = run_shardprep("train", "--print-config", "--optim.lr=3e-4", "--train.total_steps", "7")
    assert done.returncode == 0
    assert "lr: 0.0003" in done.stdout
    assert "total_steps: 7\n" in done.stdout


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        (["train", "--optim.lr", "fast"], 2, "error: the command line: "),
        (["train", "--data.shards", "."], 4, "no manifest.json"),
        (["predict", "nowhere"], 1, "error: nowhere: there is no best checkpoint"),
    ],
)
def test_exit_codes_are_those_of_the_command(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    words: list[str],
    code: int,
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    done = run_shardprep(*words)
    assert done.returncode == code
    assert message in done.stderr
    assert "Traceback" not in done.stderr


def test_a_module_that_is_missing_while_a_command_runs_is_no_missing_extra(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    info = tmp_path / "late-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: late\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[shardprep.commands]\nlate = late_command:main\n")
    (tmp_path / "late_command.py").write_text(
        "import click\n\n\n@click.command()\ndef main():\n    import no_such_package\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ModuleNotFoundError, match="no_such_package") as caught:
        announced_commands()["late"].main([], standalone_mode=False)
    assert not isinstance(caught.value, shardprep.MissingExtraError)


def test_an_entry_point_without_its_package_leaves_the_others_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    info = tmp_path / "gone-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: gone\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[shardprep.commands]\ngone = gone.command:main\n")
    monkeypatch.syspath_prepend(tmp_path)
    commands = announced_commands()
    assert commands.keys() == {*COMMANDS, "gone"}
    assert commands["gone"].get_short_help_str() == ""
