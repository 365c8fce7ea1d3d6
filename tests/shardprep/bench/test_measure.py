"""Each measurement runs in a process of its own, in rounds, and counts what was delivered."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from shardprep import FormatError
from shardprep.bench import machine
from shardprep.bench import measure as measuring
from shardprep.bench.measure import (
    Candidate,
    Measurements,
    Rate,
    in_own_process,
    measure,
    measure_in_rounds,
    warm,
)
from tests.conftest import wait_until

Batches = Iterator[tuple[Any, Any]]


def batches(size: int, closed: list[bool] | None = None) -> Batches:
    try:
        while True:
            yield np.zeros((size, 4, 2)), np.zeros(size)
    finally:
        if closed is not None:
            closed.append(True)


def failing() -> Batches:
    raise FormatError("is broken", file="x.tar")
    yield


def test_a_task_gets_a_process_of_its_own_and_gives_its_result_back() -> None:
    assert in_own_process(os.getpid, 60) != os.getpid()
    assert in_own_process(lambda: {"a": [1.5]}, 60) == {"a": [1.5]}


def test_an_error_comes_back_with_its_own_type() -> None:
    with pytest.raises(FormatError, match=r"^x\.tar: is broken$"):
        in_own_process(lambda: next(failing()), 60)


def test_an_error_that_does_not_pickle_comes_back_as_text() -> None:
    def task() -> None:
        class Local(Exception):
            pass

        raise Local("too long")

    with pytest.raises(RuntimeError, match="Local: too long"):
        in_own_process(task, 60)


def test_a_process_that_dies_is_reported() -> None:
    with pytest.raises(RuntimeError, match="died with exit code -9"):
        in_own_process(lambda: os.kill(os.getpid(), signal.SIGKILL), 60)


@pytest.mark.parametrize("hangs", [False, True])
def test_no_process_is_left_behind(tmp_path: Path, hangs: bool) -> None:
    note = tmp_path / "pid"

    def task() -> None:
        child = subprocess.Popen(["sleep", "600"])
        note.write_text(str(child.pid))
        # Otherwise the interpreter complains that its child still runs.
        child.returncode = 0
        while hangs:
            time.sleep(1)

    if hangs:
        # A busy machine may not have got as far as the note when the time is over.
        for limit in (2, 20, 200):
            with pytest.raises(TimeoutError, match=f"no result within {limit} s"):
                in_own_process(task, limit)
            if note.exists() and note.read_text():
                break
    else:
        in_own_process(task, 60)
    wait_until(lambda: ended(int(note.read_text())))


def ended(pid: int) -> bool:
    """Whether a process has ended; it may be a zombie that nobody has waited for."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2].startswith("Z")
    except (FileNotFoundError, ProcessLookupError):
        return True


def test_a_measurement_counts_what_was_delivered_and_closes_the_loader(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    clock = iter(range(10_000))
    monkeypatch.setattr(measuring.time, "perf_counter", lambda: float(next(clock)))
    closed: list[bool] = []
    rate = measure(batches(6, closed), 20.0, workers=3)
    assert closed == [True]
    # The clock ticks when it is looked at, once a batch and twice more.
    assert rate.batches == 20
    assert rate.samples_per_s == 20 * 6 / 21


def test_every_round_measures_each_candidate_once() -> None:
    told: list[str] = []
    candidates = [Candidate(name, "x", lambda: batches(2)) for name in ("a", "b")]
    found = measure_in_rounds(
        candidates, rounds=3, seconds=0.001, on_measurement=lambda name, rate: told.append(name)
    )
    assert told == ["a", "b"] * 3
    assert {name: len(rates) for name, rates in found.rates.items()} == {"a": 3, "b": 3}
    assert not found.failures


def test_a_candidate_that_fails_ends_the_measurement_or_is_left_out() -> None:
    told: list[tuple[str, bool]] = []
    candidates = [
        Candidate("bad", "x", failing),
        Candidate("good", "x", lambda: batches(2)),
    ]

    def run(**options: Any) -> Measurements:
        return measure_in_rounds(
            candidates,
            rounds=2,
            seconds=0.001,
            on_measurement=lambda name, rate: told.append((name, rate is not None)),
            **options,
        )

    with pytest.raises(FormatError, match="is broken"):
        run()
    assert told == []
    found = run(keep_going=True)
    assert told == [("bad", False), ("good", True), ("good", True)]
    assert found.failures == {"bad": "FormatError: x.tar: is broken"}
    assert list(found.rates) == ["good"]


def test_the_median_of_the_rounds_counts() -> None:
    rates = [Rate(value, 1, 0) for value in (5.0, 900.0, 7.0)]
    assert Measurements({"a": rates}).median("a") == 7.0


def test_files_are_warmed_only_if_they_fit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "shard.tar"
    path.write_bytes(bytes(5000))
    assert warm([path, path])
    monkeypatch.setattr(measuring, "free_memory", lambda: 9999)
    assert not warm([path, path])
    assert warm([])


def test_free_memory_is_part_of_all_memory() -> None:
    assert 0 < machine.free_memory() < os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
