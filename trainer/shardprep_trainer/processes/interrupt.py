"""Ctrl-C and SIGTERM ask a run to stop after the current step, instead of ending it at once."""

from __future__ import annotations

import os
import signal
import time
from types import FrameType
from typing import Any

from shardprep_trainer.processes.launch import launched_by_accelerate

# A launcher passes the terminal's Ctrl-C on to its workers at once; a person repeats it later.
_IMPATIENT_SECONDS = 5.0


class StopSignals:
    """While entered, `received` holds the first SIGINT or SIGTERM, and the program continues.

    Another signal, more than five seconds after the first, raises KeyboardInterrupt: a run that is
    stuck within a step can still be ended from the keyboard.

    The death of the launcher counts as SIGTERM: `accelerate launch` with one process does not pass
    signals on, and its worker would continue to train unnoticed.
    """

    def __init__(self) -> None:
        self._signal = 0
        self._since = 0.0
        self._previous: dict[int, Any] = {}
        launched = launched_by_accelerate(os.environ) or "LOCAL_RANK" in os.environ
        self._launcher = os.getppid() if launched else None

    @property
    def received(self) -> int:
        """Number of the first signal, or 0."""
        if not self._signal and self._launcher is not None and os.getppid() != self._launcher:
            self._signal = int(signal.SIGTERM)
        return self._signal

    def __enter__(self) -> StopSignals:
        for number in (signal.SIGINT, signal.SIGTERM):
            self._previous[number] = signal.signal(number, self._receive)
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if not self._signal:
            self._signal, self._since = number, now
        elif now - self._since > _IMPATIENT_SECONDS:
            raise KeyboardInterrupt
