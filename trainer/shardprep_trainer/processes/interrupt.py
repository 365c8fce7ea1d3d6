"""Ctrl-C and SIGTERM ask a run to stop after the current step, instead of ending it at once."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable
from types import FrameType
from typing import Any

from shardprep_trainer.processes.launch import launched_by_accelerate

# A launcher passes the terminal's Ctrl-C on to its workers at once; a person repeats it later.
_IMPATIENT_SECONDS = 5.0


class StopSignals:
    """While entered, `received` holds the first SIGINT or SIGTERM, and the program continues.

    Another signal, more than five seconds after the first, raises KeyboardInterrupt: a run that is
    stuck within a step can still be ended from the keyboard.

    Python gives signals to the main thread only. A program that trains in another thread decides
    about them itself.

    The death of the launcher counts as SIGTERM: `accelerate launch` with one process does not pass
    signals on, and its worker would continue to train unnoticed.

    Args:
        on_stop: Called at the first signal, between two statements of the program.
    """

    def __init__(self, on_stop: Callable[[], None] = lambda: None) -> None:
        self._on_stop = on_stop
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
        if threading.current_thread() is not threading.main_thread():
            return self
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
            self._on_stop()
        elif now - self._since > _IMPATIENT_SECONDS:
            raise KeyboardInterrupt
