"""The standard streams of a program: there even if its caller closed them, and any text fits."""

from __future__ import annotations

import io
import os
import sys

READER_LEFT = 141
"""Exit code where nobody reads our output any longer: that of a program that SIGPIPE ends."""


def open_closed_streams() -> None:
    """Give output that nobody wants a place to go, and write names that the encoding lacks.

    A stream that the caller closed (`>&-`) is None, and the next file that is opened would get its
    number, with everything that is printed there.
    """
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)
    if sys.stdout is None:
        sys.stdout = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115
    if sys.stderr is None:
        sys.stderr = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")


def discard_output() -> None:
    """Drop what could not be written, so that the interpreter does not try again at its end."""
    sys.stdout = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115
