"""Every call that may fail, with every errno, in every command: what comes of it."""

from __future__ import annotations

import errno
import os
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from scripts.torture.errors.commands import Command, Files
from scripts.torture.errors.failing_calls import KINDS, FailingCalls
from scripts.torture.errors.fork_server import HUNG, Ended, ForkServer
from scripts.torture.shards import contents

ERRORS = (
    "EACCES",
    "EPERM",
    "EINVAL",
    "ENOSYS",
    "ENOTSUP",
    "ENOLCK",
    "ENODEV",
    "ESTALE",
    "EIO",
    "EMFILE",
    "ENOMEM",
    "ETIMEDOUT",
    "EDQUOT",
    "ENOSPC",
)
PLACES = ("first", "middle", "last")
COMMANDS_MODULE = "scripts.torture.errors.commands"

WORKS, NOTED, REFUSED, UNREACHED, UNSTEADY, WRONG = (
    "works",
    "works with a note",
    "exit 6 with a remedy",
    "not reached",
    "wrong once",
    "wrong",
)
CLASSES = (WORKS, NOTED, REFUSED, UNREACHED, UNSTEADY, WRONG)
SIGNS = dict(zip(CLASSES, ("+", "n", "6", ".", "x", "X"), strict=True))
"""One letter for each class, for tables."""

_STORAGE_ERROR = 6
_NEVER = re.compile(r"damage|corrupt|--drop|Traceback", re.IGNORECASE)
_SPACE = re.compile(r"free space|make room|disk is full", re.IGNORECASE)
# What a remedy speaks of, by errno.
_FITTING = {
    **dict.fromkeys(("ENOSPC", "EDQUOT"), r"space|quota|room"),
    **dict.fromkeys(("EACCES", "EPERM"), r"who may read and write|permission|local disk"),
    "EMFILE": r"ulimit -n|open files",
    "ENOMEM": r"memory|ulimit|max_map_count",
    **dict.fromkeys(("EIO", "ESTALE", "ETIMEDOUT", "ENODEV"), r"disk|mount|network|again"),
    **dict.fromkeys(("EINVAL", "ENOSYS", "ENOTSUP", "ENOLCK"), r"local disk|file system|another"),
}


@dataclass(frozen=True)
class Cell:
    """One call that fails in one command."""

    command: Command
    kind: str
    error: str
    place: str
    """Which of the calls: the first, a middle or the last one."""
    lasting: bool
    """Whether later calls on the same path fail too."""


@dataclass(frozen=True)
class Outcome:
    """What came of a cell."""

    what: str
    """One of `CLASSES`."""
    why: str = ""
    """What is wrong."""
    path: str = ""
    """Path of the call that failed."""
    code: int = 0
    said: str = ""
    """What the command said that it does not say else."""


@dataclass(frozen=True)
class Undisturbed:
    """A command without errors."""

    counts: Mapping[str, int]
    """Calls of each kind."""
    result: Files
    out: str
    lines: frozenset[str]
    """What it says, numbers aside."""


def number_of(place: str, count: int) -> int:
    """The number of a call, from 1, of so many calls."""
    return {"first": 1, "middle": (count + 1) // 2, "last": count}[place]


def judge(error: str, ended: Ended, new: str, faults: Iterable[str]) -> Outcome:
    """What came of a command in which a call failed.

    Args:
        error: Name of the errno.
        ended: How the command ended.
        new: What it said beside what it always says.
        faults: What it has left that is not right, whatever its exit code.
    """
    wrong = list(faults)
    if ended.code == HUNG:
        wrong.append("does not end")
    elif ended.code not in (0, _STORAGE_ERROR):
        wrong.append(f"exit code {ended.code}")
    if found := _NEVER.search(new):
        wrong.append(f"says {found[0]!r}")
    if ended.code == _STORAGE_ERROR and not _fits(error, new):
        wrong.append("no remedy that fits")
    what = WRONG if wrong else REFUSED if ended.code else NOTED if new else WORKS
    return Outcome(what, "; ".join(wrong), "", ended.code, new)


def _fits(error: str, text: str) -> bool:
    """Whether an error's message has a remedy for an errno, and none for another."""
    if error not in ("ENOSPC", "EDQUOT") and _SPACE.search(text):
        return False
    said = text.replace(os.strerror(_number(error)), "")
    return bool(re.search(_FITTING[error], said, re.IGNORECASE))


def _number(error: str) -> int:
    return int(getattr(errno, error))


def _lines(text: str) -> list[str]:
    return [line.strip() for line in re.split(r"[\r\n]+", text) if line.strip()]


def _plain(line: str) -> str:
    """A line without its numbers."""
    return re.sub(r"\d[\d.,e+-]*", "#", line)


class Matrix:
    """Tries cells in a folder, by a fork server.

    Args:
        server: Runs the commands.
        template: What the commands begin with; see `commands.make_template`.
        folder: Where they run.
        url: Address of the shards of the template.
        cache_bytes: Budget of the cache.
    """

    def __init__(
        self, server: ForkServer, template: Path, folder: Path, url: str, cache_bytes: int
    ) -> None:
        self._server = server
        self._template = template
        self._folder = folder
        self._cell = folder / "cell"
        self._url = url
        self._cache_bytes = cache_bytes
        self._known: dict[str, Undisturbed] = {}
        # Calls after whose failure a command was given again.
        self._repeated: set[tuple[str, str, str, bool]] = set()

    def undisturbed(self, command: Command) -> Undisturbed:
        """Run a command without errors, and count its calls.

        Raises:
            RuntimeError: It fails.
        """
        if command.name not in self._known:
            # The first time, only to import what it takes.
            self._run(command, self._nothing())
            self._server.learn()
            calls = self._nothing()
            ended = self._run(command, calls)
            if ended.code:
                raise RuntimeError(f"{command.name} fails without errors:\n{ended.err}")
            said = map(_plain, _lines(ended.err) + _lines(ended.out))
            result = command.result(self._cell)
            lines = frozenset(said)
            self._known[command.name] = Undisturbed(calls.counts, result, ended.out, lines)
        return self._known[command.name]

    def try_cell(self, cell: Cell) -> Outcome:
        """Let the call of a cell fail, and look at what comes of it.

        A cell that is wrong is tried once more: threads and processes do not always call the same,
        and only what is wrong again can be studied.
        """
        found = self._try_once(cell)
        if found.what == WRONG and self._try_once(cell).what != WRONG:
            return replace(found, what=UNSTEADY)
        return found

    def _try_once(self, cell: Cell) -> Outcome:
        command, usual = cell.command, self.undisturbed(cell.command)
        count = usual.counts[cell.kind]
        if not count:
            return Outcome(UNREACHED)
        calls = FailingCalls(
            self._folder / "calls",
            self._cell,
            cell.kind,
            _number(cell.error),
            number_of(cell.place, count),
            lasting=cell.lasting,
        )
        ended = self._run(command, calls)
        if not calls.refused:
            # Threads do not always call the same.
            return Outcome(UNREACHED)
        path = calls.path.replace(f"{self._cell}/", "")
        said = _lines(ended.out) + _lines(ended.err)
        new = "\n".join(line for line in said if _plain(line) not in usual.lines)
        faults = [*self._lost(command, usual), *self._unlike(cell, ended, usual)]
        found = judge(cell.error, ended, new, faults)
        return Outcome(found.what, found.why, path, found.code, new.replace(str(self._cell), ""))

    def _lost(self, command: Command, usual: Undisturbed) -> Iterable[str]:
        """What was healthy before a command and is not any more."""
        before = {
            f"{part}/{path}": value
            for part in command.parts
            for path, value in contents(self._template / part).items()
        }
        if lost := command.lost(before, self._cell):
            yield f"{lost[0]} is lost or changed"
        for name in command.may_grow:
            old, new = (place / name for place in (self._template, self._cell))
            if not new.exists() or not new.read_bytes().startswith(old.read_bytes()):
                yield f"{name} is lost or cut"
        now = command.result(self._cell)
        if command.model and now.get(command.model) != usual.result[command.model]:
            path = str(self._cell / command.model)
            ended = self._server.run(COMMANDS_MODULE, "loads", [path], self._nothing())
            if ended.code:
                yield f"the model does not load: {_lines(ended.err)[-1:]}"

    def _unlike(self, cell: Cell, ended: Ended, usual: Undisturbed) -> Iterable[str]:
        """What a command has not done, at once or after an error when it is given again."""
        command = cell.command
        if ended.code == 0:
            yield from self._differences(command, ended, usual)
        # What is left does not depend on the errno, and a command takes a while.
        key = (command.name, cell.kind, cell.place, cell.lasting)
        if ended.code == _STORAGE_ERROR and key not in self._repeated:
            again = self._run(command, self._nothing(), anew=False)
            if again.code:
                yield f"the same command again: exit code {again.code} ({_lines(again.err)[-1:]})"
                return
            faults = list(self._differences(command, again, usual))
            yield from (f"the same command again: {fault}" for fault in faults)
            if not faults:
                self._repeated.add(key)

    def _differences(self, command: Command, ended: Ended, usual: Undisturbed) -> Iterable[str]:
        found = command.result(self._cell)
        if found != usual.result:
            names = sorted(name for name, _ in found.items() ^ usual.result.items())
            yield f"exit code 0, but {names[0]} is not as it should be"
        if command.place and ended.out != usual.out:
            yield "reads other data"

    def _nothing(self) -> FailingCalls:
        return FailingCalls(self._folder / "calls", self._cell)

    def _run(self, command: Command, calls: FailingCalls, *, anew: bool = True) -> Ended:
        if anew:
            command.begin(self._template, self._cell)
        function, arguments = command.call(self._cell, self._url, self._cache_bytes)
        return self._server.run(COMMANDS_MODULE, function, arguments, calls)


def table(found: Mapping[Cell, Outcome], commands: Iterable[Command]) -> str:
    """The outcomes as a table in Markdown: one row for each call and errno."""
    names = [command.name for command in commands]
    rows = {(cell.kind, cell.error): dict.fromkeys(names, "") for cell in found}
    for cell, outcome in found.items():
        rows[cell.kind, cell.error][cell.command.name] += SIGNS[outcome.what]
    lines = [f"| call | errno | {' | '.join(names)} |", "|---" * (2 + len(names)) + "|"]
    for (kind, error), signs in rows.items():
        lines.append(f"| {kind} | {error} | {' | '.join(signs.values())} |")
    return "\n".join(lines)


def tally(found: Mapping[Cell, Outcome]) -> dict[str, int]:
    """How many cells are of each class."""
    counts = Counter(outcome.what for outcome in found.values())
    return {what: counts[what] for what in CLASSES}


def cells(commands: Iterable[Command], *, lasting: bool) -> list[Cell]:
    """All cells of some commands."""
    return [
        Cell(command, kind, error, place, lasting)
        for kind in KINDS
        for error in ERRORS
        for command in commands
        for place in PLACES
    ]
