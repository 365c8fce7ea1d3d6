"""What comes of a failing call is judged rightly, and no file system makes a command wrong."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from scripts.torture.errors import matrix
from scripts.torture.errors.__main__ import summary, try_all
from scripts.torture.errors.commands import COMMANDS, Command
from scripts.torture.errors.failing_calls import KINDS, FailingCalls, can_compile
from scripts.torture.errors.fork_server import HUNG, Ended
from scripts.torture.errors.matrix import ERRORS, PLACES, Cell, Matrix, Outcome, cells, judge

ROOT = Path(__file__).parents[4]
BY_NAME = {command.name: command for command in COMMANDS}
needs_gcc = pytest.mark.skipif(not can_compile(), reason="needs gcc")

RIGHTS = "error: a.tar: Permission denied. Check who may read and write it. Then run it again."


@pytest.mark.parametrize(
    ("error", "code", "new", "faults", "expected"),
    [
        ("EIO", 0, "", [], matrix.WORKS),
        ("EIO", 0, "shardprep: note: no locks here", [], matrix.NOTED),
        ("EACCES", 6, RIGHTS, [], matrix.REFUSED),
        ("EMFILE", 6, "error: a: Too many open files. Raise ulimit -n.", [], matrix.REFUSED),
        ("ENOSPC", 6, "error: a: No space left on device. Free space.", [], matrix.REFUSED),
        # The text of the errno alone is no remedy, nor is that of another errno.
        ("EDQUOT", 6, f"error: a: {os.strerror(errno.EDQUOT)}", [], matrix.WRONG),
        ("EACCES", 6, "error: a: Permission denied. Check free space.", [], matrix.WRONG),
        ("ESTALE", 6, RIGHTS, [], matrix.REFUSED),
        ("EMFILE", 6, RIGHTS, [], matrix.WRONG),
        ("EIO", 1, "a.tar: its sha256 is another", [], matrix.WRONG),
        ("EIO", 4, "error: no set", [], matrix.WRONG),
        ("EIO", 0, "a.tar: is damaged", [], matrix.WRONG),
        ("EACCES", 6, f"{RIGHTS} Or repair it with --drop.", [], matrix.WRONG),
        ("EACCES", 6, f"Traceback (most recent call last):\n{RIGHTS}", [], matrix.WRONG),
        ("EIO", 0, "", ["a.tar is lost or changed"], matrix.WRONG),
        ("EIO", HUNG, "", [], matrix.WRONG),
        ("EIO", -9, "", [], matrix.WRONG),
    ],
)
def test_a_cell_is_of_one_class(
    error: str, code: int, new: str, faults: list[str], expected: str
) -> None:
    found = judge(error, Ended(code, "", ""), new, faults)
    assert found.what == expected
    assert bool(found.why) == (expected == matrix.WRONG)


@pytest.mark.parametrize(
    ("count", "expected"), [(1, [1, 1, 1]), (2, [1, 1, 2]), (3, [1, 2, 3]), (10, [1, 5, 10])]
)
def test_the_first_a_middle_and_the_last_call_fail(count: int, expected: list[int]) -> None:
    assert [matrix.number_of(place, count) for place in PLACES] == expected


def test_the_matrix_has_every_cell_once() -> None:
    found = cells(COMMANDS, lasting=False)
    assert len(found) == len(set(found)) == len(KINDS) * len(ERRORS) * len(COMMANDS) * len(PLACES)


def test_a_table_has_a_row_for_each_call_and_errno_and_a_sign_for_each_place() -> None:
    chosen = [BY_NAME["build"], BY_NAME["verify"]]
    found = {cell: Outcome(matrix.WORKS) for cell in cells(chosen, lasting=False)}
    odd = Cell(BY_NAME["verify"], "flock", "EIO", "middle", lasting=False)
    found[odd] = Outcome(matrix.WRONG, "exit code 1")
    lines = matrix.table(found, chosen).splitlines()
    assert lines[0] == "| call | errno | build | verify |"
    assert "| flock | EIO | +++ | +X+ |" in lines
    assert len(lines) == 2 + len(KINDS) * len(ERRORS)
    told = summary(found)
    assert told["counts"] == {**dict.fromkeys(matrix.CLASSES, 0), "works": 923, "wrong": 1}
    assert [(row["command"], row["call"], row["place"]) for row in told["wrong"]] == [
        ("verify", "flock", "middle")
    ]


def test_files_that_a_command_may_not_change_are_missed(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    for name in ("kept", "free", "gone", "changed"):
        (tmp_path / "a" / name).write_text(name)
    before = {f"a/{name}": value for name, value in matrix.contents(tmp_path / "a").items()}
    (tmp_path / "a" / "free").unlink()
    (tmp_path / "a" / "gone").unlink()
    (tmp_path / "a" / "changed").write_text("x")
    command = Command("test", ("a",), (), may_change=("a/free",))
    assert sorted(command.lost(before, tmp_path)) == ["a/changed", "a/gone"]


def reached(found: dict[Cell, Outcome]) -> set[str]:
    return {cell.kind for cell, outcome in found.items() if outcome.what != matrix.UNREACHED}


@pytest.mark.slow
@needs_gcc
def test_no_command_of_shards_takes_trouble_of_the_machine_for_damage(tmp_path: Path) -> None:
    chosen = [BY_NAME[name] for name in ("open and read", "verify", "repair --drop, intact")]
    asked = [
        cell
        for cell in cells(chosen, lasting=True)
        if cell.kind in ("open", "read", "mmap") and cell.error in ("EACCES", "EMFILE")
    ]
    found = try_all(asked, tmp_path, jobs=1)
    assert summary(found)["wrong"] == []
    assert reached(found) == {"open", "read", "mmap"}


class Server:
    """In place of a `ForkServer`: a program that handles errors badly.

    Args:
        cell: Folder of the program.
        harm: Done to the folder when a call fails.
        code: The exit code then.
    """

    def __init__(self, cell: Path, harm: Callable[[Path], object], code: int) -> None:
        self.cell, self.harm, self.code = cell, harm, code

    def learn(self) -> None:
        """Nothing."""

    def run(self, module: str, function: str, words: list[str], calls: FailingCalls) -> Ended:
        """Do it."""
        if not calls.fails:
            (self.cell / "out").write_text("result")
            return Ended(0, "", "")
        self.harm(self.cell)
        return Ended(self.code, "", RIGHTS if self.code else "")


@pytest.mark.parametrize(
    ("harm", "code", "why"),
    [
        (lambda cell: (cell / "out").write_text("result"), 0, ""),
        (lambda cell: None, 6, ""),
        (lambda cell: None, 0, "exit code 0, but out is not as it should be"),
        (lambda cell: (cell / "set" / "a.tar").unlink(), 6, "set/a.tar is lost or changed"),
        (lambda cell: (cell / "set" / "a.tar").write_text("b"), 6, "set/a.tar is lost or changed"),
        (lambda cell: (cell / "set" / "log").write_text("ol"), 6, "set/log is lost or cut"),
        (lambda cell: (cell / "set" / "log").write_text("older"), 6, ""),
    ],
)
def test_what_a_command_leaves_is_judged_whatever_it_says(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    harm: Callable[[Path], object],
    code: int,
    why: str,
) -> None:
    (tmp_path / "template" / "set").mkdir(parents=True)
    (tmp_path / "template" / "set" / "a.tar").write_text("a")
    (tmp_path / "template" / "set" / "log").write_text("old")
    command = Command("test", ("set",), ("x",), results=("out",), may_grow=("set/log",))
    monkeypatch.setattr(FailingCalls, "counts", dict.fromkeys(KINDS, 1))
    monkeypatch.setattr(FailingCalls, "refused", 1)
    server: Any = Server(tmp_path / "cell", harm, code)
    found = Matrix(server, tmp_path / "template", tmp_path, "", 0)
    outcome = found.try_cell(Cell(command, "open", "EACCES", "first", lasting=False))
    assert (outcome.what == matrix.WRONG, outcome.why) == (bool(why), why)


@pytest.mark.parametrize(("times", "expected"), [(1, matrix.UNSTEADY), (2, matrix.WRONG)])
def test_a_cell_is_wrong_if_it_is_so_twice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, times: int, expected: str
) -> None:
    (tmp_path / "template").mkdir()
    command = Command("test", (), ("x",), results=("out",))
    monkeypatch.setattr(FailingCalls, "counts", dict.fromkeys(KINDS, 1))
    monkeypatch.setattr(FailingCalls, "refused", 1)
    tries: list[Path] = []

    def harm(cell: Path) -> None:
        tries.append(cell)
        (cell / "out").write_text("other" if len(tries) <= times else "result")

    server: Any = Server(tmp_path / "cell", harm, 0)
    found = Matrix(server, tmp_path / "template", tmp_path, "", 0)
    outcome = found.try_cell(Cell(command, "open", "EACCES", "first", lasting=False))
    assert (outcome.what, outcome.why) == (expected, "exit code 0, but out is not as it should be")


@needs_gcc
@pytest.mark.slow
@pytest.mark.remote
@pytest.mark.timeout(1800)
def test_every_command_meets_every_call_rightly(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "scripts.torture.errors", "--out", "errors.json"]
    command += ["--mode", "once", "--errno", "EACCES", "--errno", "EIO"]
    done = subprocess.run(
        command,
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'trainer'}"},
    )
    assert done.returncode == 0, done.stdout + done.stderr
    told = json.loads((tmp_path / "errors.json").read_text())
    assert told["once"]["wrong"] == []
    assert told["once"]["cells"] == len(KINDS) * 2 * len(COMMANDS) * len(PLACES)
    assert (tmp_path / "errors.md").read_text().count("| flock | EIO |") == 1
