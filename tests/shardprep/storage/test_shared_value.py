"""Each process has a value of its own, which the processes that it starts can change."""

from __future__ import annotations

import copy
import multiprocessing
import os
import pickle
from typing import Any, NamedTuple

import pytest

from shardprep.storage.shared_value import SharedValue


class Count(NamedTuple):
    number: int = 0
    text: str = ""


def add(count: Count, number: int = 1) -> Count:
    return count._replace(number=count.number + number)


def change(value: SharedValue[Count], times: int) -> None:
    before = value.get().number
    for _ in range(times):
        value.change_parents(add)
    value.change(lambda count: add(count, 1000))
    # Its own value is that of its parent when it was started, and is nobody else's since.
    assert value.get().number == before + 1000


@pytest.mark.parametrize("start", ["fork", pytest.param("spawn", marks=pytest.mark.slow)])
def test_children_change_the_value_of_their_parent_all_at_once(start: str) -> None:
    context = multiprocessing.get_context(start)
    value = SharedValue(Count(10))
    children = [context.Process(target=change, args=(value, 50)) for _ in range(4)]
    for child in children:
        child.start()
    for child in children:
        child.join()
    assert [child.exitcode for child in children] == [0] * 4
    assert value.get().number == 210


def in_child(act: Any) -> int:
    child = os.fork()
    if child == 0:
        try:
            os._exit(int(act()))
        finally:
            os._exit(99)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def test_grandchildren_change_the_value_of_their_own_parent() -> None:
    value = SharedValue(Count())

    def child() -> int:
        in_child(lambda: value.change_parents(add) is None)
        return value.get().number

    assert in_child(child) == 1
    assert value.get() == Count()


def test_a_shorter_value_replaces_a_longer_one() -> None:
    value = SharedValue(Count(text="long" * 100))
    in_child(lambda: value.change_parents(lambda _: Count(1, "short")) is None)
    assert value.get() == Count(1, "short")
    value.change(lambda _: Count(2, "longer" * 2000))
    assert value.get() == Count(2, "longer" * 2000)


def test_without_a_parent_there_is_nothing_to_reach() -> None:
    assert SharedValue(Count()).change_parents(add) is None


def test_a_copy_is_a_value_of_its_own() -> None:
    value = SharedValue(Count(3))
    for copied in (copy.deepcopy(value), pickle.loads(pickle.dumps(value))):
        assert copied.change(add) == Count(4)
        assert copied.change_parents(add) is None
    assert value.get() == Count(3)


def test_files_are_closed_with_their_values() -> None:
    before = len(os.listdir("/proc/self/fd"))
    values = [SharedValue(Count()) for _ in range(5)]
    in_child(lambda: 0)
    assert len(os.listdir("/proc/self/fd")) == before + 5
    del values
    assert len(os.listdir("/proc/self/fd")) == before
