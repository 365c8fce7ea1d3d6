"""A pool on the nodes of a Ray cluster."""

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
from typing import Any

from shardprep.build.pools.pool import Result, Task
from shardprep.build.shard import Advance
from shardprep.errors import BuildError, ShardprepError
from shardprep.storage.remote import Location
from shardprep.system import usable_cores

# How often a task is started again after its node or its process is lost.
_RETRIES = 10
# Enough that no CPU waits for its next task, but not so many that they fill our memory.
_TASKS_PER_CPU = 2
_POLL_SECONDS = 0.5
_CONNECT_SECONDS = 10
_STOP_SECONDS = 30
# A cluster that grows on demand may need minutes to start its first node.
_NO_CPU_SECONDS = 600
# Of a Ray that we start ourselves; tasks and records are small.
_OBJECT_STORE_BYTES = 1 << 28

_RUN_AGAIN = "Run the same command again; finished shards are kept."


@dataclass(frozen=True)
class RayPool:
    """A `Pool` on a Ray cluster, whose nodes may come and go.

    Attributes:
        workers: Most tasks at a time; 0 for as many as there are CPUs.
        address: Address of the cluster, as `ray.init` takes it; None to start Ray on this machine.
        source: Where the tasks read, if anywhere. A folder must be shared by all nodes.
        destination: Where the tasks write, if anywhere. A folder must be shared by all nodes.
    """

    workers: int = 0
    address: str | None = None
    source: Location | None = None
    destination: Location | None = None

    def run(
        self,
        work: Callable[[Task, Advance], Result],
        tasks: Sequence[Task],
        on_progress: Callable[[int, int], None],
    ) -> Generator[Result, None, None]:
        """See `Pool.run`. Progress is reported after each task.

        If a node is lost, its task runs again on another node, so a task may run twice.

        Raises:
            BuildError: There is no cluster, or it cannot carry out the tasks.
        """
        if not tasks:
            return
        with (
            _connected(self.address, self.workers) as ray,
            _on_shared(work, self.source, self.destination) as checked,
        ):
            submit = ray.remote(num_cpus=1, max_retries=_RETRIES)(_run_one).remote
            running: dict[Future[Any], Any] = {}
            try:
                capacity = _Capacity(ray, self.workers)
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
                # No task may still write when the folder is free for the next build.
                wait(running, _STOP_SECONDS)


def _run_one(
    work: Callable[[Task, Advance], Result], task: Task
) -> tuple[Result | ShardprepError, int, int]:
    """Runs on a node: the result of a task, or our own error; and its utterances and bytes."""
    done: list[int] = []
    result: Result | ShardprepError
    try:
        result = work(task, done.append)
    except ShardprepError as error:
        # Returned as a value: Ray would wrap a raised exception, and its fields would be lost.
        result = error
    return result, len(done), sum(done)


def _outcomes(
    submit: Callable[[Any], Any],
    tasks: Sequence[Any],
    capacity: _Capacity,
    running: dict[Future[Any], Any],
) -> Iterator[tuple[Any, int, int]]:
    """The result of each task. No more tasks are submitted than the cluster can use."""
    waiting = deque(tasks)
    while waiting or running:
        room = capacity()
        while waiting and len(running) < room:
            ref = submit(waiting.popleft())
            running[ref.future()] = ref
        # Not `ray.wait`, which ignores a SIGTERM while it waits.
        done, _ = wait(running, _POLL_SECONDS, FIRST_COMPLETED)
        for future in done:
            del running[future]
            yield future.result()


class _Capacity:
    """The number of tasks that the cluster can use; it changes as nodes come and go."""

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
                remedy=f"Start nodes. {_RUN_AGAIN}",
            )
        # At least one: a waiting task makes a cluster on demand start a node.
        return max(1, min(room, self._workers or room))


@contextlib.contextmanager
def _connected(address: str | None, workers: int) -> Iterator[Any]:
    """The module ray, connected to a cluster; a connection of ours is closed at the end."""
    # Ray prints messages about lost nodes to stdout, except those that match this pattern.
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
                num_cpus=workers or usable_cores(),
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
    """Keep the program's SIGTERM handler, which Ray replaces when it starts."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    handler = signal.getsignal(signal.SIGTERM)
    try:
        yield
    except SystemExit:
        # Ray's handler turns a SIGTERM into this.
        signal.signal(signal.SIGTERM, handler)
        signal.raise_signal(signal.SIGTERM)
        raise
    finally:
        signal.signal(signal.SIGTERM, handler)


def _check_answers(address: str) -> None:
    """OSError if nothing listens at an address; Ray itself would try for minutes."""
    if address == "auto":
        address = os.environ.get("RAY_ADDRESS", address)
    host, _, port = address.rpartition("://")[2].rpartition(":")
    if host and port.isdecimal():
        socket.create_connection((host.strip("[]"), int(port)), _CONNECT_SECONDS).close()


def _unreachable(address: str | None, error: Exception) -> BuildError:
    if address is None:
        return BuildError(f"Ray does not start on this machine ({error})", remedy=_RUN_AGAIN)
    return BuildError(
        f"cannot connect to a Ray cluster ({error})",
        key=f"address {address}",
        remedy="Run this on a node of the cluster, with --address auto or the HOST:PORT that "
        "`ray start --head` printed.",
    )


def _explained(error: Any, ray: Any) -> Exception:
    """An error that tells the user what to do; or the task's own error, if it has failed."""
    cause = getattr(error, "cause", None)
    # If a node cannot unpickle a task, Ray reports an error within the task.
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
        f"the Ray cluster gave up a task ({type(error).__name__}), perhaps for lack of memory "
        "or of nodes",
        remedy=f"{_RUN_AGAIN} With nodes of more memory, or fewer CPUs each, if memory is short.",
    )


@dataclass(frozen=True)
class _Checked:
    """Work that refuses to run on a node that does not share our folders.

    Attributes:
        work: What to do on the node.
        start: The folder that relative paths start from.
        needed: Paths that must exist, each with the folder to name in an error.
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
    work: Callable[[Task, Advance], Result],
    source: Location | None,
    destination: Location | None,
) -> Iterator[Callable[[Task, Advance], Result]]:
    """`work` that refuses to run on nodes that do not share the folders."""
    folders = [place for place in (source, destination) if isinstance(place, Path)]
    start = os.sep if all(folder.is_absolute() for folder in folders) else os.getcwd()
    needed = [(os.path.abspath(source), str(source))] if isinstance(source, Path) else []
    if not isinstance(destination, Path):
        yield _Checked(work, start, tuple(needed))
        return
    # Another machine may have a different folder of the same name, but without this file in it.
    with tempfile.NamedTemporaryFile(prefix="shared.", suffix=".tmp", dir=destination) as token:
        needed.append((os.path.abspath(token.name), str(destination)))
        yield _Checked(work, start, tuple(needed))
