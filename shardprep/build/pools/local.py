"""A pool of worker processes on this machine; they report progress, stop, and end with us.

A worker is a Python program of its own, which is connected by a socket. Unlike multiprocessing,
this needs no shared memory and no semaphores, never runs the caller's main module, and works from a
thread, a notebook, a daemonic process, `python -c` and a script without `if __name__ ==
"__main__":`.
"""

from __future__ import annotations

import contextlib
import os
import pickle
import queue
import signal
import subprocess
import sys
import threading
import time
import traceback
from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass
from multiprocessing import Pipe
from multiprocessing.connection import Connection, wait
from typing import Any

from shardprep.build.pools.pool import Result, Task
from shardprep.build.shard import Advance
from shardprep.errors import BuildError, ShardprepError
from shardprep.system import usable_cores

_REPORT_SECONDS = 0.1
_STOP = b""

# The parent's path of imports may be another one than that of a new interpreter.
_PROGRAM = (
    "import sys; sys.path[:] = {path!r}; from shardprep.build.pools.local import serve; serve()"
)


class Stopped(Exception):
    """Raised within a task, by its `advance`, when the pool stops."""


@dataclass(frozen=True)
class LocalPool:
    """A `Pool` of processes; with one worker, the tasks run in the calling process.

    Attributes:
        workers: Number of processes; 0 for the number of cores.
    """

    workers: int = 0

    def run(
        self,
        work: Callable[[Task, Advance], Result],
        tasks: Sequence[Task],
        on_progress: Callable[[int, int], None],
    ) -> Generator[Result, None, None]:
        """See `Pool.run`. The other tasks stop at their next utterance.

        Raises:
            BuildError: A worker process died.
        """
        number = min(self.workers or usable_cores(), len(tasks))
        # A program that embeds Python may have no interpreter to start.
        if number <= 1 or not sys.executable:
            for task in tasks:
                yield work(task, lambda nbytes: on_progress(1, nbytes))
            return
        workers: dict[Connection[Any, Any], _Worker] = {}
        waiting = deque(tasks)
        try:
            for _ in range(number):
                worker = _Worker(work)
                workers[worker.connection] = worker
                worker.begin(waiting.popleft())
            yield from _results(workers, waiting, on_progress)
        finally:
            for worker in workers.values():
                worker.ask_to_stop()
            for worker in workers.values():
                worker.wait()


def _results(
    workers: dict[Connection[Any, Any], _Worker],
    waiting: deque[Any],
    on_progress: Callable[[int, int], None],
) -> Iterator[Any]:
    """The result of each task; each worker is busy with one. Idle workers are let go."""
    busy = set(workers)
    while busy:
        for connection in wait(busy):
            worker = workers[connection]  # type: ignore[index]
            answer = worker.receive()
            on_progress(answer.utterances, answer.nbytes)
            if answer.error is not None:
                raise answer.error
            if answer.done:
                if waiting:
                    worker.begin(waiting.popleft())
                else:
                    busy.discard(worker.connection)
                yield answer.result


@dataclass(frozen=True)
class _Answer:
    """What a worker sends: its progress since the last answer, and the end of a task, if any."""

    utterances: int
    nbytes: int
    done: bool = False
    result: Any = None
    error: Exception | None = None


class _Worker:
    """A worker process, as its parent sees it.

    Args:
        work: What it does with each task.
    """

    def __init__(self, work: Callable[[Any, Advance], Any]) -> None:
        self.connection, theirs = Pipe()
        # For PyTorch, if a file needs it: the workers already use all cores.
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        flags = subprocess._args_from_interpreter_flags()  # type: ignore[attr-defined]
        program = _PROGRAM.format(path=sys.path)
        with theirs, _ctrl_c_blocked():
            self._process = subprocess.Popen(
                [sys.executable, *flags, "-c", program], stdin=theirs.fileno(), env=environment
            )
        self._send(pickle.dumps(work))

    def begin(self, task: Any) -> None:
        """Give it a task. It must not be busy."""
        self._send(pickle.dumps(task))

    def receive(self) -> _Answer:
        """Its next answer.

        Raises:
            BuildError: It died.
        """
        try:
            answer: _Answer = self.connection.recv()
        except (EOFError, OSError):
            raise self._death() from None
        return answer

    def ask_to_stop(self) -> None:
        """Ask it to leave its task at the next utterance, and to end."""
        with contextlib.suppress(OSError):
            self.connection.send_bytes(_STOP)

    def wait(self) -> None:
        """Wait until it has ended."""
        # It may wait itself, for somebody to take its last answer.
        with contextlib.suppress(EOFError, OSError):
            while True:
                self.connection.recv_bytes()
        self.connection.close()
        self._process.wait()

    def _send(self, data: bytes) -> None:
        # Its death is reported where its answer is waited for.
        with contextlib.suppress(OSError):
            self.connection.send_bytes(data)

    def _death(self) -> BuildError:
        code = self._process.wait()
        why = f"exit code {code}" if code >= 0 else signal.Signals(-code).name
        return BuildError(
            f"a worker process died ({why}), perhaps for lack of memory",
            remedy="Run the same command again, with fewer --workers if memory is short; finished "
            "shards are kept.",
        )


@contextlib.contextmanager
def _ctrl_c_blocked() -> Iterator[None]:
    """Processes that are started meanwhile never get the Ctrl-C of the whole process group.

    The parent gets it, and decides what happens to the tasks.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def serve() -> None:
    """What a worker process does, whose standard input is a socket to its parent."""
    parent: Connection[Any, Any] = Connection(os.dup(0))
    tasks: queue.SimpleQueue[bytes] = queue.SimpleQueue()
    stop = threading.Event()
    threading.Thread(target=_listen, args=(parent, tasks, stop), daemon=True).start()
    progress = _Progress(parent, stop)
    work: Any = None
    while data := tasks.get():
        progress.begin()
        try:
            if work is None:
                work = pickle.loads(data)
                continue
            result = work(pickle.loads(data), progress.advance)
            progress.send(done=True, result=result)
        except Stopped:
            return
        except Exception as error:
            _send_error(progress, error)


def _listen(parent: Connection[Any, Any], tasks: queue.SimpleQueue[bytes], stop: Any) -> None:
    """Take what the parent sends; if the parent dies, end this process in the middle of its task.

    Otherwise it might publish a shard while the next build already writes to the folder.
    """
    try:
        while data := parent.recv_bytes():
            tasks.put(data)
        stop.set()
        tasks.put(_STOP)
        parent.recv_bytes()
    except (EOFError, OSError):
        os._exit(1)


class _Progress:
    """Counts what a task has done, and tells the parent now and then."""

    def __init__(self, parent: Connection[Any, Any], stop: threading.Event) -> None:
        self._parent = parent
        self._stop = stop
        self.begin()

    def begin(self) -> None:
        """Begin a task."""
        self._utterances, self._nbytes = 0, 0
        self._due = time.monotonic() + _REPORT_SECONDS

    def advance(self, nbytes: int) -> None:
        """Count an utterance of a task.

        Raises:
            Stopped: The pool stops.
        """
        if self._stop.is_set():
            raise Stopped
        self._utterances += 1
        self._nbytes += nbytes
        if time.monotonic() >= self._due:
            self.send()

    def send(self, **end: Any) -> None:
        """Send the progress, and the end of the task if it is given."""
        self._parent.send(_Answer(self._utterances, self._nbytes, **end))
        self.begin()


def _send_error(progress: _Progress, error: Exception) -> None:
    if not isinstance(error, ShardprepError):
        # An error of our own making: whoever looks for its cause needs to know where it arose.
        error.add_note(traceback.format_exc())
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:
        error = RuntimeError("".join(traceback.format_exception(error)))
    progress.send(error=error)
