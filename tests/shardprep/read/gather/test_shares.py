"""Every share is worked on once, by several threads at a time, and none is left running."""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from types import SimpleNamespace

import pytest

from shardprep.read.gather import shares
from shardprep.read.gather.shares import threads, work_on

PATIENCE = 60.0


@pytest.mark.parametrize("count", [1, 2, 8])
@pytest.mark.parametrize("number", [0, 1, 2, 50])
def test_every_share_is_worked_on_once(number: int, count: int) -> None:
    done: list[int] = []
    work_on([lambda own=own: done.append(own) for own in range(number)], count)  # type: ignore[misc]
    assert sorted(done) == list(range(number))


def test_shares_are_worked_on_at_the_same_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shares, "usable_cores", lambda: 3)
    monkeypatch.setattr(shares, "_helpers", None)
    together = threading.Barrier(3)
    reached: list[int] = []
    work_on([lambda: reached.append(together.wait(PATIENCE))] * 3, 3)
    assert sorted(reached) == [0, 1, 2]


def test_one_thread_is_the_caller() -> None:
    seen = []
    work_on([lambda: seen.append(threading.current_thread())] * 5, 1)
    assert set(seen) == {threading.current_thread()}


@pytest.mark.parametrize("count", [1, 2])
def test_the_first_error_is_raised_when_every_share_is_done(count: int) -> None:
    done: list[int] = []

    def share(number: int) -> None:
        done.append(number)
        if number in (2, 4):
            raise ValueError(f"share {number}")

    with pytest.raises(ValueError, match="share 2"):
        work_on([lambda own=own: share(own) for own in range(6)], count)  # type: ignore[misc]
    assert sorted(done) == list(range(6))


def test_an_interrupted_caller_waits_for_the_helpers() -> None:
    begun, ended = threading.Event(), []

    def share() -> None:
        if threading.current_thread() is threading.main_thread():
            assert begun.wait(PATIENCE)
            raise KeyboardInterrupt
        begun.set()
        time.sleep(0.05)
        ended.append(True)

    with pytest.raises(KeyboardInterrupt):
        work_on([share] * 2, 2)
    assert ended == [True]


def test_without_a_thread_the_caller_works_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse() -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(shares, "_pool", refuse)
    seen = []
    work_on([lambda: seen.append(threading.current_thread())] * 4, 2)
    assert seen == [threading.current_thread()] * 4


@pytest.mark.parametrize(("workers", "expected"), [(None, 6), (1, 6), (2, 3), (4, 1), (9, 1)])
def test_workers_of_a_data_loader_divide_the_cores(
    monkeypatch: pytest.MonkeyPatch, workers: int | None, expected: int
) -> None:
    info = None if workers is None else SimpleNamespace(num_workers=workers)
    data = SimpleNamespace(get_worker_info=lambda: info)
    monkeypatch.setitem(sys.modules, "torch.utils.data", data)
    monkeypatch.setattr(shares, "usable_cores", lambda: 6)
    assert threads() == expected


# Prints the threads of the parent, of a child that was forked from it, and at the end.
PROGRAM = """
import concurrent.futures.thread as pools, os, sys, threading, time
from shardprep.read.gather import shares
shares.usable_cores = lambda: 2

def together():
    seen, both = [], threading.Barrier(2)
    def share():
        both.wait(60)
        seen.append(threading.current_thread().name)
    shares.work_on([share] * 2, 2)
    return sorted(name.split("_")[0] for name in seen)

print(together(), flush=True)
child = os.fork()
if not child:
    print(together(), flush=True)
    sys.exit()
assert os.waitpid(child, 0)[1] == 0

def at_the_end():
    while not pools._shutdown:
        time.sleep(0.01)
    seen = []
    shares.work_on([lambda: seen.append(threading.current_thread().name)] * 3, 2)
    print(seen, flush=True)

threading.Thread(target=at_the_end, name="last").start()
"""


def test_helpers_are_there_after_a_fork_and_not_needed_at_the_end() -> None:
    ended = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", PROGRAM], capture_output=True, text=True, timeout=120
    )
    both = "['MainThread', 'shardprep-share']"
    assert ended.stdout.splitlines() == [both, both, "['last', 'last', 'last']"]
    assert (ended.returncode, ended.stderr) == (0, "")
