"""An iteration over a loader, of which the next one is the end."""

from __future__ import annotations

import contextlib
import logging
import weakref
from collections.abc import Generator
from typing import Any

_log = logging.getLogger("shardprep")


class Iteration:
    """An iteration over a loader, until another one ends it."""

    def __init__(self) -> None:
        self._over = False
        self._ready: weakref.ref[Generator[Any]] | None = None

    def reads(self, ready: Generator[Any]) -> None:
        """Say what prepares the batches of this iteration."""
        self._ready = weakref.ref(ready)

    def end(self) -> None:
        """End it, with the thread that prepares its batches."""
        self._over = True
        if self._ready is not None and (ready := self._ready()) is not None:
            # In use by another thread, which notices the end by itself.
            with contextlib.suppress(ValueError):
                ready.close()

    def is_over(self) -> bool:
        """Whether another iteration began; says so in the log, since the caller asked for more."""
        if self._over:
            _log.warning(
                "an iteration over a loader gives no more batches: another one began, or a state "
                "was loaded; to read twice at a time, make two loaders"
            )
        return self._over
