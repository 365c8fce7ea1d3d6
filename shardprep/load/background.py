"""A thread that makes items ahead of those who take them.

It ends when its owner is closed or dropped, and with the process. A process that is forked waits
for nothing of it: the fork comes between two items, and the thread stays with the parent.
"""

from __future__ import annotations

import atexit
import contextlib
import threading
import weakref
from collections.abc import Generator, Iterator
from queue import Empty, SimpleQueue
from typing import Any, TypeVar

from shardprep.errors import ShardprepError
from shardprep.system import at_fork

Item = TypeVar("Item")

# Most seconds that a close, a fork or the end of the process waits for the item that is being made,
# since one from a store may take minutes; and how often it is looked whether the thread lives.
_PATIENCE = 2.0


class Line(Iterator[Item]):
    """Items that the thread makes one after another, as many as are asked for.

    An error of the items is raised where its item would come.

    Args:
        items: What is made.
        worker: The thread that makes it.
    """

    def __init__(self, items: Iterator[Item], worker: _Worker) -> None:
        self._items = items
        self._worker = worker
        self._made: SimpleQueue[tuple[Item] | BaseException] = SimpleQueue()
        self._over = False
        self._on_the_way = 0

    @property
    def is_lost(self) -> bool:
        """Whether its thread stayed with the process that this one was forked from."""
        return self._worker.is_lost

    def keep(self, count: int) -> None:
        """Have up to `count` items made that are not taken yet."""
        while self._on_the_way < count and not self._over:
            self._on_the_way += 1
            self._worker.tickets.put(self)

    def __next__(self) -> Item:
        if self._worker.is_lost:
            raise ShardprepError(
                "an iteration over a loader goes on in a process that was forked since it began",
                remedy="Begin a new iteration in the new process.",
            )
        self.keep(1)
        if self._over:
            raise StopIteration
        made = self._wait()
        self._on_the_way -= 1
        if isinstance(made, tuple):
            return made[0]
        self._over = True
        try:
            raise made
        finally:
            # The error holds this frame.
            del made

    def _wait(self) -> tuple[Item] | BaseException:
        while True:
            try:
                return self._made.get(timeout=_PATIENCE)
            except Empty:
                # Another thread has closed the owner: nobody serves the last ticket.
                if not self._worker.thread.is_alive():
                    return StopIteration()

    def close(self) -> None:
        """Have nothing more made."""
        self._over = True

    def make(self) -> None:
        """Make the next item; called in the thread."""
        made: tuple[Item] | BaseException
        try:
            if self._over or self._worker.is_stopped:
                made = StopIteration()
            else:
                made = (next(self._items),)
        except BaseException as error:
            made = error
        self._made.put(made)


class Background:
    """A thread that makes the items of its lines, in the order in which they are asked for."""

    def __init__(self) -> None:
        self._worker: _Worker | None = None

    def __reduce__(self) -> tuple[Any, ...]:
        return Background, ()

    def line(self, items: Iterator[Item]) -> Line[Item]:
        """A line of items; the thread starts with the first."""
        if self._worker is None or self._worker.is_lost:
            worker = _Worker()
            worker.start()
            weakref.finalize(self, worker.stop).atexit = False
            self._worker = worker
        return Line(items, self._worker)

    def close(self) -> None:
        """End the thread after the item that it makes; a later line starts another one.

        It is waited for, but not for long: one that a store keeps ends when that answers.
        """
        worker, self._worker = self._worker, None
        # One that is stopped already was waited for at the end of the process.
        if worker is not None and not (worker.is_lost or worker.is_stopped):
            worker.stop()
            if worker.thread is not threading.current_thread():
                worker.thread.join(_PATIENCE)


def ahead(items: Iterator[Item], count: int) -> Generator[Item, None, None]:
    """The same items in the same order; a thread makes up to `count` of them ahead.

    An error of `items` is raised where its item would come. To close the generator, as a loop
    that is broken off does, ends the thread, as `Background.close` does. What is open at the end of
    the process is closed there.
    """
    made = _ahead(items, count)
    _open.add(made)
    return made


def _ahead(items: Iterator[Item], count: int) -> Generator[Item, None, None]:
    if not count:
        yield from items
        return
    background = Background()
    line = background.line(items)
    try:
        line.keep(count)
        for item in line:
            line.keep(count)
            yield item
    finally:
        line.close()
        background.close()


class _Worker:
    """The thread, without its owner, whom it does not keep alive.

    Attributes:
        tickets: The line of each item that is to be made; None for the end.
        is_stopped: Whether nothing more is to be made.
        is_lost: Whether the thread is one of the process that this one was forked from.
        making: Held while an item is made.
    """

    def __init__(self) -> None:
        self.tickets: SimpleQueue[Line[Any] | None] = SimpleQueue()
        self.is_stopped = False
        self.is_lost = False
        # RLock: making an item might fork.
        self.making = threading.RLock()
        self.thread = threading.Thread(target=self._run, name="shardprep-prefetch", daemon=True)

    def start(self) -> None:
        _running.add(self)
        try:
            self.thread.start()
        except BaseException:
            # After Ctrl-C, the thread may run.
            self.stop()
            _running.discard(self)
            raise

    def stop(self) -> None:
        self.is_stopped = True
        self.tickets.put(None)

    def _run(self) -> None:
        while (line := self.tickets.get()) is not None:
            with self.making:
                line.make()
            # Nothing is kept alive while there is nothing to do.
            del line
        _running.discard(self)


_running: set[_Worker] = set()
_open: weakref.WeakSet[Generator[Any]] = weakref.WeakSet()


class _Paused(threading.local):
    """The workers that a thread, which is about to fork, holds between two items."""

    def __init__(self) -> None:
        self.workers: list[_Worker] = []


_paused = _Paused()


def _end_all() -> None:
    # A daemon that is inside PyTorch when the interpreter is gone would end the process badly.
    running = list(_running)
    for worker in running:
        worker.stop()
    for worker in running:
        worker.thread.join(_PATIENCE)
    # Later, a generator would find modules that are emptied already.
    for made in list(_open):
        # In use by another thread.
        with contextlib.suppress(ValueError):
            made.close()


def _before_fork() -> None:
    for worker in list(_running):
        if worker.making.acquire(timeout=_PATIENCE):
            _paused.workers.append(worker)


def _after_in_parent() -> None:
    while _paused.workers:
        _paused.workers.pop().making.release()


def _after_in_child() -> None:
    for worker in list(_running):
        worker.is_lost = True
    _running.clear()
    _paused.workers.clear()


atexit.register(_end_all)
at_fork(_after_in_child, _before_fork, _after_in_parent)
