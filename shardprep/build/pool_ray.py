"""Shard tasks on a Ray cluster: what `pool` does on one machine, on nodes that may go."""

from __future__ import annotations

import contextlib
import logging
import os
import platform
import signal
import socket
import tempfile
import threading
import time
from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from shardprep.build.pool import Advance
from shardprep.errors import BuildError, ShardprepError

Task = TypeVar("Task")
Result = TypeVar("Result")

# How often a task is begun anew whose node or process is gone.
_RETRIES = 10
# Enough that no CPU waits for its next task; not so many that they fill the driver's memory.
_TASKS_PER_CPU = 2
_POLL_SECONDS = 0.5
_CONNECT_SECONDS = 10
_STOP_SECONDS = 30
# A cluster that grows on demand may take minutes for its first node.
_NO_CPU_SECONDS = 600
# Of a Ray that we start: room for tasks and records, which are small.
_OBJECT_STORE_BYTES = 1 << 28

_GO_ON = "Run the same command again; finished shards are kept."


def run_on_ray(
    work: Callable[[Task, Advance], Result],
    tasks: Sequence[Task],
    workers: int,
    on_progress: Callable[[int, int], None],
    address: str | None = None,
    places: tuple[object, object] = (None, None),
) -> Generator[Result, None, None]:
    """Run `work` on every task as a task of Ray, and yield results as they come.

    A task whose node is lost runs again on another, so it may run twice. Closing the iterator
    early, or an error from a task, cancels the others.

    Args:
        work: It calls its second argument with the bytes of each utterance done.
        tasks: Its first arguments; each must pickle.
        workers: Most tasks at a time; 0 for as many as there are CPUs.
        on_progress: Called after each task with its utterances and bytes.
        address: Of a cluster, as `ray.init` takes it; None to start Ray on this machine.
        places: Where the tasks read, and where they write. Those that are a Path must be folders
            that every node shares.

    Raises:
        BuildError: There is no cluster, or it cannot carry out the tasks.
    """
    if not tasks:
        return
    with _connected(address, workers) as ray, _on_shared(work, *places) as checked:
        submit = ray.remote(num_cpus=1, max_retries=_RETRIES)(_run_one).remote
        running: dict[Future[Any], Any] = {}
        try:
            capacity = _Capacity(ray, workers)
            for done in _outcomes(partial(submit, checked), tasks, capacity, running):
                result, utterances, nbytes = done
                on_progress(utterances, nbytes)
                if isinstance(result, ShardprepError):
                    raise result
                yield result
        except ray.exceptions.RayError as error:
            raise _explained(error, ray) from error
        finally:
            for ref in running.values():
                ray.cancel(ref)
            # Nobody may write in the folder when it is free for the next build.
            wait(running, _STOP_SECONDS)


def _run_one(
    work: Callable[[Task, Advance], Result], task: Task
) -> tuple[Result | ShardprepError, int, int]:
    """On a node: the result of a task, or our own error, and the utterances and bytes done."""
    done: list[int] = []
    result: Result | ShardprepError
    try:
        result = work(task, done.append)
    except ShardprepError as error:
        # As a value; Ray would wrap an exception, and lose its fields.
        result = error
    return result, len(done), sum(done)


def _outcomes(
    submit: Callable[[Any], Any],
    tasks: Sequence[Any],
    capacity: _Capacity,
    running: dict[Future[Any], Any],
) -> Iterator[tuple[Any, int, int]]:
    """What came of each task; no more are in flight than the cluster has use for."""
    waiting = deque(tasks)
    while waiting or running:
        room = capacity()
        while waiting and len(running) < room:
            ref = submit(waiting.popleft())
            running[ref.future()] = ref
        # Not `ray.wait`, in which a SIGTERM goes unheard.
        done, _ = wait(running, _POLL_SECONDS, FIRST_COMPLETED)
        for future in done:
            del running[future]
            yield future.result()


class _Capacity:
    """How many tasks the cluster has use for, asked anew as nodes come and go."""

    def __init__(self, ray: Any, workers: int) -> None:
        self._ray = ray
        self._workers = workers
        self._last_seen = time.monotonic()

    def __call__(self) -> int:
        now = time.monotonic()
        room = int(_TASKS_PER_CPU * self._ray.cluster_resources().get("CPU", 0))
        if room:
            self._last_seen = now
        elif now - self._last_seen > _NO_CPU_SECONDS:
            raise BuildError(
                "no node of the Ray cluster has a CPU",
                remedy=f"Start nodes. {_GO_ON}",
            )
        # At least one, to which a cluster can grow that starts nodes on demand.
        return max(1, min(room, self._workers or room))


@contextlib.contextmanager
def _connected(address: str | None, workers: int) -> Iterator[Any]:
    """The module ray, connected; what was not there before is shut down at the end."""
    # Ray prints its news of lost nodes and processes to stdout, less what this matches.
    os.environ.setdefault("RAY_DEDUP_LOGS_SKIP_REGEX", "^")
    try:
        import ray
    except ImportError as error:
        raise BuildError(
            f"the engine ray cannot be loaded ({error})",
            remedy="Install it by `pip install 'shardprep[ray]'`.",
        ) from error
    if ray.is_initialized():
        yield ray
        return
    try:
        with _sigterm_kept():
            _start(ray, address, workers)
        yield ray
    finally:
        ray.shutdown()


def _start(ray: Any, address: str | None, workers: int) -> None:
    quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
    try:
        if address is None:
            os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
            ray.init(
                "local",
                num_cpus=workers or len(os.sched_getaffinity(0)),
                object_store_memory=_OBJECT_STORE_BYTES,
                include_dashboard=False,
                **quiet,
            )
        else:
            _check_answers(address)
            ray.init(address, **quiet)
    except (OSError, RuntimeError, ValueError, ray.exceptions.RayError) as error:
        raise _unreachable(address, error) from error


@contextlib.contextmanager
def _sigterm_kept() -> Iterator[None]:
    """Undo that Ray, as it starts, puts its own handler in the place of the program's."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    handler = signal.getsignal(signal.SIGTERM)
    try:
        yield
    except SystemExit:
        # What Ray's handler makes of a SIGTERM.
        signal.signal(signal.SIGTERM, handler)
        signal.raise_signal(signal.SIGTERM)
        raise
    finally:
        signal.signal(signal.SIGTERM, handler)


def _check_answers(address: str) -> None:
    """OSError if nobody listens at an address; Ray itself tries for minutes."""
    if address == "auto":
        address = os.environ.get("RAY_ADDRESS", address)
    host, _, port = address.rpartition("://")[2].rpartition(":")
    if host and port.isdecimal():
        socket.create_connection((host.strip("[]"), int(port)), _CONNECT_SECONDS).close()


def _unreachable(address: str | None, error: Exception) -> BuildError:
    if address is None:
        return BuildError(f"Ray does not start on this machine ({error})", remedy=_GO_ON)
    return BuildError(
        f"cannot connect to a Ray cluster ({error})",
        key=f"address {address}",
        remedy="Run this on a node of the cluster, with --address auto or the HOST:PORT that "
        "`ray start --head` printed.",
    )


def _explained(error: Any, ray: Any) -> Exception:
    """What a user can do about an error of Ray; the cause itself of one within a task."""
    cause = getattr(error, "cause", None)
    # What a node cannot unpickle is an error of Ray's within the task.
    unloaded = isinstance(cause, (ImportError, ray.exceptions.RaySystemError))
    if unloaded or "failed to import" in str(error):
        reason = str(error).strip().splitlines()[-1]
        return BuildError(
            f"a node of the Ray cluster cannot load the tasks ({reason})",
            remedy="Install the same releases of shardprep, Python and Ray on every node.",
        )
    if isinstance(cause, Exception) and not isinstance(cause, ray.exceptions.RayError):
        return cause
    return BuildError(
        f"the Ray cluster gave up a task ({type(error).__name__}), perhaps for want of memory "
        "or of nodes",
        remedy=f"{_GO_ON} With nodes of more memory, or fewer CPUs each, if memory is short.",
    )


@dataclass(frozen=True)
class _Checked:
    """Work that is refused on a node that does not see what we see.

    Attributes:
        work: What to do there.
        start: The folder in which relative paths begin.
        needed: What must be there, and the folder that it stands for.
    """

    work: Callable[[Any, Advance], Any]
    start: str
    needed: tuple[tuple[str, str], ...]

    def __call__(self, task: Any, advance: Advance) -> Any:
        for path, folder in ((self.start, self.start), *self.needed):
            if not os.path.exists(path):
                raise BuildError(
                    f"is not the same folder, or none, on the node {platform.node()}",
                    file=folder,
                    remedy="With Ray, source and destination must be folders that all nodes "
                    "share, or URLs.",
                )
        with contextlib.chdir(self.start):
            return self.work(task, advance)


@contextlib.contextmanager
def _on_shared(
    work: Callable[[Task, Advance], Result], source: object, destination: object
) -> Iterator[Callable[[Task, Advance], Result]]:
    """`work`, refused on nodes that do not share the folders."""
    folders = [place for place in (source, destination) if isinstance(place, Path)]
    start = os.sep if all(folder.is_absolute() for folder in folders) else os.getcwd()
    needed = [(os.path.abspath(source), str(source))] if isinstance(source, Path) else []
    if not isinstance(destination, Path):
        yield _Checked(work, start, tuple(needed))
        return
    # A folder of the same name may be another one; one with this file in it is not.
    with tempfile.NamedTemporaryFile(prefix="shared.", suffix=".tmp", dir=destination) as token:
        needed.append((os.path.abspath(token.name), str(destination)))
        yield _Checked(work, start, tuple(needed))
