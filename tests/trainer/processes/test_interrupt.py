"""A signal asks a run to stop after its step, and a second one ends it at once."""

from __future__ import annotations

import os
import signal
import time

import pytest

from shardprep_trainer.processes.interrupt import StopSignals


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_is_noted_and_the_old_handlers_come_back(number: signal.Signals) -> None:
    before = signal.getsignal(number)
    with StopSignals() as signals:
        assert signals.received == 0
        signal.raise_signal(number)
        # A launcher passes on what the terminal has sent already.
        signal.raise_signal(signal.SIGTERM)
        assert signals.received == number
    assert signal.getsignal(number) is before


def test_a_late_second_signal_ends_a_run_that_is_stuck(monkeypatch: pytest.MonkeyPatch) -> None:
    now = time.monotonic()
    with StopSignals():
        signal.raise_signal(signal.SIGINT)
        monkeypatch.setattr(time, "monotonic", lambda: now + 60)
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)


def test_the_death_of_the_launcher_counts_as_sigterm(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")
    with StopSignals() as launched:
        monkeypatch.setattr(os, "getppid", lambda: 1)
        assert launched.received == signal.SIGTERM


def test_a_program_started_from_a_shell_outlives_the_shell(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("ACCELERATE_MIXED_PRECISION", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    with StopSignals() as alone:
        monkeypatch.setattr(os, "getppid", lambda: 1)
        assert alone.received == 0
