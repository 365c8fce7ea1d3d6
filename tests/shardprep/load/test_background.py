"""Items made ahead come in order, errors in their place, and the thread ends."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Iterator

import pytest

from shardprep.load.background import ahead

#: Threads of other tests that broke a loop off; an error that the test keeps holds them.
others: set[threading.Thread] = set()


@pytest.fixture(autouse=True)
def know_the_others() -> None:
    others.update(threading.enumerate())


def threads() -> list[str]:
    names = [thread.name for thread in threading.enumerate() if thread not in others]
    return [name for name in names if name.startswith("shardprep-prefetch")]


@pytest.mark.parametrize("count", [0, 1, 3, 50])
@pytest.mark.parametrize("items", [0, 1, 2, 20])
def test_every_item_comes_once_and_in_order(items: int, count: int) -> None:
    assert list(ahead(iter(range(items)), count)) == list(range(items))
    assert threads() == []


@pytest.mark.parametrize("count", [1, 4])
def test_no_more_items_are_made_ahead_than_asked_for(count: int) -> None:
    made = itertools.count()
    taken = ahead(made, count)
    for _ in range(10):
        next(taken)
    taken.close()
    assert 10 <= next(made) <= 10 + count


@pytest.mark.parametrize("count", [0, 1, 4])
def test_an_error_comes_after_the_items_before_it(count: int) -> None:
    def items() -> Iterator[int]:
        yield from range(3)
        raise OSError("the fourth")

    taken = ahead(items(), count)
    assert [next(taken) for _ in range(3)] == [0, 1, 2]
    with pytest.raises(OSError, match="the fourth"):
        next(taken)
    assert threads() == []


def test_the_next_item_is_made_while_this_one_is_used() -> None:
    second = threading.Event()

    def items() -> Iterator[int]:
        yield 1
        second.set()
        yield 2

    taken = ahead(items(), 1)
    next(taken)
    assert second.wait(30)
    taken.close()


def test_a_loop_that_is_broken_off_ends_the_thread() -> None:
    for item in (taken := ahead(itertools.count(), 2)):
        if item == 3:
            break
    assert threads()
    taken.close()
    assert threads() == []
