"""What a file system may refuse without harm to the data; a note says where a promise weakens."""

from __future__ import annotations

import contextlib
import errno
import logging
import threading
from collections.abc import Iterator

_log = logging.getLogger("shardprep")

NOT_HERE = frozenset(
    getattr(errno, name)
    for name in ("EACCES", "EINVAL", "ENOSYS", "ENOTSUP", "ENOTTY", "EOPNOTSUPP", "EPERM")
    if hasattr(errno, name)
)
"""Errors of a file system that does not have a call, or does not permit it to anybody."""

_noted: set[str] = set()
_silent = threading.local()


def note_once(promise: str, text: str) -> None:
    """Log that a promise is weaker here than elsewhere, once in this process.

    Args:
        promise: Which promise; a second note of the same one is left out.
        text: What the file system lacks, and what follows.
    """
    if promise not in _noted and not getattr(_silent, "on", False):
        _noted.add(promise)
        _log.warning("note: %s", text)


@contextlib.contextmanager
def without_notes() -> Iterator[None]:
    """Log no notes in this thread while the context lasts; for work that many processes share."""
    before = getattr(_silent, "on", False)
    _silent.on = True
    try:
        yield
    finally:
        _silent.on = before
