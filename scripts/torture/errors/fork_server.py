"""Runs commands in processes that are forked when everything is imported: a start takes moments.

The server is a process with the library of `failing_calls` in LD_PRELOAD. It imports modules, and
forks a process for each job, which has settings of its own. Jobs and answers are lines of JSON.
"""

from __future__ import annotations

import atexit
import contextlib
import gc
import importlib
import json
import os
import select
import signal
import subprocess
import sys
import threading
import traceback
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from scripts.torture.errors import failing_calls
from scripts.torture.errors.failing_calls import FailingCalls

_SERVE = "from scripts.torture.errors import fork_server; fork_server.serve()"
_OUT, _ERR, _MODULES = "stdout", "stderr", "modules"

HUNG = 1000
"""Exit code in place of that of a process that did not end in time."""


@dataclass(frozen=True)
class Ended:
    """How a process ended."""

    code: int
    """Its exit code; the number of a signal, negative; or `HUNG`."""
    out: str
    err: str


class ForkServer:
    """A process that forks others; see `fork_server`.

    Args:
        process: It.
        folder: For the output of the jobs.
    """

    def __init__(self, process: subprocess.Popen[str], folder: Path) -> None:
        self._process = process
        self._folder = folder
        self._imported: set[str] = set()

    def run(
        self, module: str, function: str, arguments: Iterable[Any], calls: FailingCalls
    ) -> Ended:
        """Call a function of a module in a new process.

        Args:
            module: Name of the module.
            function: Name of the function in it.
            arguments: What to call it with; JSON.
            calls: What is to fail in the process.
        """
        job = {"module": module, "function": function, "arguments": list(arguments)}
        answer = self._ask({**job, "calls": str(calls.file), "folder": str(self._folder)})
        out, err = ((self._folder / name).read_text(errors="replace") for name in (_OUT, _ERR))
        return Ended(answer["code"], out, err)

    def learn(self) -> None:
        """Import what the process of the last job had imported: the next ones start faster."""
        names = (self._folder / _MODULES).read_text().split()
        # In their order: asyncio, for one, is another if a part of it is imported first.
        self._ask({"import": [name for name in names if name not in self._imported]})
        self._imported.update(names)

    def _ask(self, job: dict[str, Any]) -> dict[str, Any]:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps(job) + "\n")
        self._process.stdin.flush()
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError("the fork server has ended; see its last message")
        answer: dict[str, Any] = json.loads(line)
        return answer


@contextlib.contextmanager
def fork_server(library: Path, folder: Path) -> Iterator[ForkServer]:
    """Start a server; it ends with the context.

    Args:
        library: That of `failing_calls.compile_library`.
        folder: For the output of the jobs; made anew.
    """
    folder.mkdir(parents=True)
    environment = {
        **os.environ,
        "LD_PRELOAD": str(library),
        "OMP_NUM_THREADS": "1",
        "ACCELERATE_USE_CPU": "true",
    }
    with subprocess.Popen(
        [sys.executable, "-c", _SERVE],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=environment,
    ) as process:
        try:
            yield ForkServer(process, folder)
        finally:
            assert process.stdin is not None
            process.stdin.close()


def serve(patience: float = 60.0) -> None:
    """Answer jobs from stdin on stdout, until stdin ends.

    Args:
        patience: Longest time of a job [s].
    """
    # Where the garbage collector walks, a forked process copies memory.
    gc.disable()
    answers = os.fdopen(os.dup(1), "w")
    # What modules print when they are imported is no answer.
    os.dup2(2, 1)
    for line in sys.stdin:
        job = json.loads(line)
        if "import" in job:
            for name in job["import"]:
                with contextlib.suppress(Exception):
                    importlib.import_module(name)
            code = 0
        else:
            gc.freeze()
            child = os.fork()
            if child == 0:
                answers.close()
                _work(job)
            code = _wait(child, patience)
        print(json.dumps({"code": code}), file=answers, flush=True)


def _work(job: dict[str, Any]) -> NoReturn:
    """Do a job in this process, which was forked for it, and end."""
    gc.enable()
    os.setsid()
    folder = Path(job["folder"])
    # The standard input has the next jobs.
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    for number, name in ((1, _OUT), (2, _ERR)):
        os.dup2(os.open(folder / name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
    function: Callable[..., int]
    function = getattr(importlib.import_module(job["module"]), job["function"])
    failing_calls.use(job["calls"])
    try:
        code = function(*job["arguments"])
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(bool(end.code))
    except BaseException:
        traceback.print_exc()
        code = 1
    (folder / _MODULES).write_text("\n".join(sys.modules))
    # What the interpreter does at its end, but not to forget each module: that takes a second.
    threading._shutdown()  # type: ignore[attr-defined]
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _wait(child: int, patience: float) -> int:
    """Wait for a process; all of its session is ended then."""
    handle = os.pidfd_open(child)
    ended = select.select([handle], [], [], patience)[0]
    os.close(handle)
    _end(child)
    status = os.waitpid(child, 0)[1]
    return os.waitstatus_to_exitcode(status) if ended else HUNG


def _end(session: int) -> None:
    """Kill the processes of a session; a dead leader that nobody waited for keeps its number."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(session, signal.SIGKILL)
