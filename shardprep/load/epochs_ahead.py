"""The batches of epoch after epoch, made ahead by one thread across the ends of the epochs."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator
from typing import Any, Generic, NamedTuple, TypeVar

from shardprep.load.background import Background, Line
from shardprep.load.course.position import Stretch
from shardprep.load.plan import BatchPlan

Item = TypeVar("Item")


class _Begun(NamedTuple, Generic[Item]):
    """Batches that are being made."""

    plan: BatchPlan
    stretch: Stretch
    line: Line[Item]


class EpochsAhead(Generic[Item]):
    """Gives the batches of one iteration after another, and makes those of the next one ahead.

    The first batches of the next epoch are ready before the last batch of this one is asked for. If
    another epoch comes, they are dropped; if none comes, there are never more than `count` of them.
    What is wrong with them is raised when they are read.

    Args:
        prepare: The batches of a stretch of a plan; called in the thread.
        count: Batches made ahead; with 0, each is made when it is due, without a thread.
    """

    def __init__(self, prepare: Callable[[BatchPlan, Stretch], Iterator[Item]], count: int) -> None:
        self._prepare = prepare
        self._count = count
        self._background = Background()
        self._next: _Begun[Item] | None = None

    def __reduce__(self) -> tuple[Any, ...]:
        return EpochsAhead, (self._prepare, self._count)

    def read(
        self, plan: BatchPlan, stretch: Stretch, following: Callable[[], Stretch | None]
    ) -> Generator[Item, None, None]:
        """The batches of an iteration; to close the generator drops those that are left.

        Args:
            plan: What is read.
            stretch: Which part of it.
            following: What the next iteration will probably read; None for nothing.
        """
        if not self._count:
            yield from self._prepare(plan, stretch)
            return
        line = self._take(plan, stretch) or self._line(plan, stretch)
        left = plan.count(stretch.start, stretch.every)
        try:
            self._make_ahead(line, plan, left, following)
            if not left:
                return
            for item in line:
                left -= 1
                self._make_ahead(line, plan, left, following)
                yield item
                if not left:
                    return
        finally:
            line.close()

    def expect(self, fits: Callable[[Stretch], bool]) -> None:
        """Drop what was made ahead for the next iteration, unless it is what will be read."""
        if self._next is not None and not fits(self._next.stretch):
            self._next.line.close()
            self._next = None

    def close(self) -> None:
        """Drop what was made ahead, and end the thread; a later iteration starts another one."""
        self.expect(lambda _: False)
        self._background.close()

    def _take(self, plan: BatchPlan, stretch: Stretch) -> Line[Item] | None:
        """The batches of an iteration, if their making has begun."""
        begun, self._next = self._next, None
        if begun is None or begun.line.is_lost:
            return None
        if begun.plan is plan and begun.stretch == stretch:
            return begun.line
        begun.line.close()
        return None

    def _make_ahead(
        self,
        line: Line[Item],
        plan: BatchPlan,
        left: int,
        following: Callable[[], Stretch | None],
    ) -> None:
        """Have the next of the `left` batches made, then those of the next epoch."""
        line.keep(min(self._count, left))
        if left > self._count:
            return
        if self._next is None:
            stretch = following()
            if stretch is None:
                return
            self._next = _Begun(plan, stretch, self._line(plan, stretch))
        begun = self._next
        most = plan.count(begun.stretch.start, begun.stretch.every)
        begun.line.keep(min(self._count + 1 - left, self._count, most))

    def _line(self, plan: BatchPlan, stretch: Stretch) -> Line[Item]:
        return self._background.line(self._prepare(plan, stretch))
