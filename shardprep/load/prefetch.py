"""Make the next items in a thread while the caller is at work on this one."""

from __future__ import annotations

from collections import deque
from collections.abc import Generator, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar, cast

Item = TypeVar("Item")


def ahead(items: Iterator[Item], count: int) -> Generator[Item, None, None]:
    """The same items in the same order, up to `count` of them made ahead.

    An error of `items` is raised where its item would come. Closing the generator, as the end of
    a broken-off loop does, waits for the item that is being made and ends the thread.
    """
    if not count:
        yield from items
        return
    done = object()
    with ThreadPoolExecutor(1, "shardprep-prefetch") as thread:
        waiting = deque(thread.submit(next, items, done) for _ in range(count))
        try:
            while (item := waiting.popleft().result()) is not done:
                waiting.append(thread.submit(next, items, done))
                yield cast(Item, item)
        finally:
            for future in waiting:
                future.cancel()
