"""Items made ahead come in order, errors in their place, and the thread ends."""

from __future__ import annotations

import contextlib
import gc
import itertools
import os
import subprocess
import sys
import textwrap
import threading
from collections.abc import Iterator

import pytest

from shardprep import ShardprepError
from shardprep.load.background import Background, Line, ahead
from tests.conftest import PATIENCE

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


def line_of(items: Iterator[int]) -> tuple[Background, Line[int]]:
    background = Background()
    return background, background.line(items)


def test_a_line_that_is_closed_makes_nothing_more() -> None:
    made = itertools.count()
    background, line = line_of(made)
    line.keep(3)
    assert [next(line), next(line)] == [0, 1]
    line.close()
    line.keep(5)
    background.close()
    assert next(made) <= 3
    assert list(line) == []


def test_who_waits_for_an_item_is_told_when_another_thread_closes_the_owner(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("shardprep.load.background._PATIENCE", 0.01)
    background, line = line_of(itertools.count())
    assert next(line) == 0
    background.close()
    assert list(line) == []


def test_lines_are_served_by_one_thread_in_the_order_of_asking() -> None:
    made: list[str] = []

    def items(name: str) -> Iterator[int]:
        for number in itertools.count():
            made.append(f"{name}{number}")
            yield number

    background = Background()
    one, other = background.line(items("a")), background.line(items("b"))
    one.keep(2)
    other.keep(2)
    one.keep(3)
    assert [next(one) for _ in range(3)] == [0, 1, 2]
    background.close()
    assert made == ["a0", "a1", "b0", "b1", "a2"]
    assert threads() == []


def test_the_thread_ends_when_its_owner_is_dropped_and_drops_what_was_asked_for() -> None:
    inside, goes_on = threading.Event(), threading.Event()

    def items() -> Iterator[int]:
        inside.set()
        assert goes_on.wait(PATIENCE)
        yield 1
        raise AssertionError("nobody reads the second")

    before = set(threading.enumerate())
    background, line = line_of(items())
    line.keep(2)
    (thread,) = set(threading.enumerate()) - before
    assert inside.wait(PATIENCE)
    del background
    gc.collect()
    goes_on.set()
    thread.join(PATIENCE)
    assert not thread.is_alive()
    assert list(line) == [1]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="the system has no fork")
@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_a_fork_comes_between_two_items_and_leaves_the_thread_behind(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    inside = threading.Event()
    busy = threading.Lock()

    def items() -> Iterator[int]:
        for number in itertools.count():
            with busy:
                inside.set()
            yield number

    background, line = line_of(items())
    line.keep(50)
    assert inside.wait(PATIENCE)
    monkeypatch.setattr("shardprep.load.background._PATIENCE", PATIENCE)
    child = os.fork()
    if not child:
        code = 1
        with contextlib.suppress(BaseException):
            assert not busy.locked()
            with pytest.raises(ShardprepError, match="forked since it began"):
                next(line)
            # Waits for nothing, and a new line has a thread of its own.
            background.close()
            new, own = line_of(iter([7]))
            assert list(own) == [7]
            new.close()
            code = 0
        os._exit(code)
    assert os.waitpid(child, 0)[1] == 0
    assert [next(line) for _ in range(3)] == [0, 1, 2]
    background.close()


@pytest.mark.parametrize("wait", ["pass", "threading.Event().wait()"])
def test_a_program_ends_silently_while_an_item_is_made(wait: str) -> None:
    program = f"""
        import itertools, threading
        from shardprep.load import background
        background._PATIENCE = 0.2
        inside = threading.Event()
        def items():
            for number in itertools.count():
                inside.set()
                {wait}
                yield number
        owner = background.Background()
        line = owner.line(items())
        line.keep(1000)
        inside.wait()
    """
    assert output_of(program) == ""


@pytest.mark.parametrize("count", [0, 2])
def test_items_that_are_open_at_the_end_of_a_program_are_closed_there(count: int) -> None:
    program = f"""
        import atexit, sys
        atexit.register(print, "end")
        from shardprep.load.background import ahead
        def items():
            try:
                while True:
                    yield 1
            finally:
                print("closed")
        # Modules are emptied before what they hold is dropped.
        sys.taken = ahead(items(), {count})
        next(sys.taken)
    """
    assert output_of(program) == "closed\nend\n"


def test_a_close_does_not_wait_for_a_store_that_does_not_answer(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    inside, answers = threading.Event(), threading.Event()

    def items() -> Iterator[int]:
        inside.set()
        assert answers.wait(PATIENCE)
        yield 1

    before = set(threading.enumerate())
    background, line = line_of(items())
    line.keep(1)
    (thread,) = set(threading.enumerate()) - before
    assert inside.wait(PATIENCE)
    monkeypatch.setattr("shardprep.load.background._PATIENCE", 0.01)
    background.close()
    assert thread.is_alive()
    answers.set()
    thread.join(PATIENCE)
    assert not thread.is_alive()


def test_an_interrupt_while_the_thread_starts_leaves_no_thread(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    started: list[threading.Thread] = []

    class Interrupted(threading.Thread):
        def start(self) -> None:
            super().start()
            started.append(self)
            raise KeyboardInterrupt

    background = Background()
    with monkeypatch.context() as patch:
        patch.setattr(threading, "Thread", Interrupted)
        with pytest.raises(KeyboardInterrupt):
            background.line(iter([1]))
    started[0].join(PATIENCE)
    assert not started[0].is_alive()
    background.close()
    assert list(background.line(iter([7]))) == [7]
    background.close()


def output_of(program: str) -> str:
    """What a program prints, which must end well and complain of nothing."""
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program)],
        capture_output=True,
        text=True,
        timeout=PATIENCE,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout
