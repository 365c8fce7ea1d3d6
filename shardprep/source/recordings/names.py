"""Names of recordings: which files are some, their keys, and pieces of them."""

from __future__ import annotations

import math
import posixpath
import re
from typing import NamedTuple

SUFFIXES = (
    ".wav",
    ".flac",
    ".mp3",
    ".m4a",
    ".ogg",
    ".opus",
    ".aac",
    ".aif",
    ".aiff",
    ".mp4",
    ".w64",
    ".au",
    ".caf",
    ".wma",
    ".webm",
    ".amr",
)
"""What the names of recordings end in, in lower case."""

# As in Media Fragments URI 1.0 (W3C, 2012): FILE#t=BEGIN,END, in seconds. The name of a recording
# ends in one of the suffixes, so no file has a name of this form.
_PIECE = "#t="
_TIMES = re.compile(rf"(.*){_PIECE}([\d.e+-]+),([\d.e+-]*)", re.DOTALL)


class Piece(NamedTuple):
    """A piece of a recording, or all of it.

    Attributes:
        file: The recording.
        start: Where it begins [s]; None for the beginning of the recording.
        end: Where it ends [s]; None for the end of the recording.
    """

    file: str
    start: float | None = None
    end: float | None = None

    @property
    def path(self) -> str:
        """The piece as a text, which `piece_of` reads back."""
        if self.start is None and self.end is None:
            return self.file
        return f"{self.file}{_PIECE}{shown(self.start or 0)},{shown(self.end)}"


def piece_of(path: str) -> Piece:
    """The piece that a text names, by `Piece.path`."""
    found = _TIMES.fullmatch(path)
    if found is None:
        return Piece(path)
    file, start, end = found.groups()
    return Piece(file, float(start), float(end) if end else None)


def seconds(text: str, name: str) -> float | None:
    """A time of a list; None where there is none.

    Raises:
        ValueError: It is no time; in words for `Reject.reason`.
    """
    if not text:
        return None
    try:
        found = float(text)
        # Python takes 1_5 for 15.
        if not 0 <= found < math.inf or "_" in text:
            raise ValueError
    except ValueError:
        raise ValueError(f"{name} is {text[:20]!a}, expected seconds from 0") from None
    return found


def shown(time: float | None) -> str:
    """A time as a text that reads back to the same number; "" for None."""
    return "" if time is None else repr(float(time)).removesuffix(".0")


def is_recording(name: str) -> bool:
    """Whether a file is a recording, by its name. Names that begin with a dot are none."""
    return name.lower().endswith(SUFFIXES) and not posixpath.basename(name).startswith(".")


def key_of_recording(file: str, start: float | None = None, end: float | None = None) -> str:
    """The key of a recording: its path without suffix; a dot in the name becomes a hyphen.

    Readers of tars cut names at their first dot.

    Args:
        file: Its path, with forward slashes.
        start: Of a piece, where it begins [s].
        end: Of a piece, where it ends [s]. Its key has both, with an underscore for the point:
            a-1_5-2.
    """
    folder, name = posixpath.split(posixpath.splitext(file)[0])
    name = name.replace(".", "-")
    if start is not None or end is not None:
        name += f"-{shown(start or 0)}-{shown(end)}".rstrip("-").replace(".", "_")
    return posixpath.join(folder, name)
