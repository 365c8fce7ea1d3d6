"""The arks of Kaldi: where a matrix lies, and its numbers, decoded by kaldiio.

Of kaldiio only the decoder of binary matrices is used. Its other ways run commands (`cat a.ark |`)
and unpickle. An entry claims a size: it is compared with the file before memory is taken.
"""

from __future__ import annotations

import contextlib
import io
import os
import re
import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from shardprep.source.contents import Matrix, Utterance
from shardprep.source.features import Expected, check_shape, finite
from shardprep.storage.local import open_regular, read_span
from shardprep.storage.trouble import machine_errors

_ENTRY = re.compile(r"(?P<file>.+?)(?::(?P<offset>\d{1,18}))?(?P<range>\[[\d:,]*\])?")
_HEAD_BYTES = 32
# Bytes of a number, of the columns' headers and of the head, by the kind of a binary matrix.
_KINDS = {b"FM": (4, 0), b"DM": (8, 0), b"CM": (1, 8), b"CM2": (2, 0), b"CM3": (1, 0)}
_MOST_BYTES, _MOST_TEXT_BYTES = 1 << 30, 64 << 20
_AHEAD = 32
_PIPE = (
    "is a command, and commands are not executed; write an ark first: "
    "copy-feats scp:feats.scp ark,scp:feats.ark,plain.scp"
)


class Entry(NamedTuple):
    """Where a matrix lies in an ark: file, first byte, and rows and columns of it."""

    file: str
    offset: int
    slices: tuple[slice, ...]


def parse_entry(text: str) -> Entry:
    """The second column of feats.scp, as kaldiio reads it: FILE:OFFSET[ROWS,COLUMNS].

    Raises:
        ValueError: It is a command, or has no meaning; in words for `Reject.reason`.
    """
    if text.startswith("|") or text.endswith("|"):
        raise ValueError(_PIPE)
    found = _ENTRY.fullmatch(text)
    if found is None or found["file"] == "-":
        raise ValueError(f"{text[:60]!a} is no place in a file")
    parts = found["range"][1:-1].split(",") if found["range"] else []
    return Entry(found["file"], int(found["offset"] or 0), tuple(map(_slice, parts)))


def _slice(text: str) -> slice:
    """Rows or columns of a matrix; Kaldi counts the last one in."""
    if text in ("", ":"):
        return slice(None)
    numbers = text.split(":")
    if len(numbers) > 2 or not all(n.isdigit() and len(n) < 10 for n in numbers):
        raise ValueError(f"{text[:60]!a} is no range of rows or columns")
    return slice(int(numbers[0]), int(numbers[-1]) + 1)


@dataclass(frozen=True)
class ArkReader:
    """Reads matrices of arks, binary (also compressed) and text; see `Reader`.

    Attributes:
        root: The folder of feats.scp.
    """

    root: Path

    def read(
        self, utterances: Sequence[Utterance], n_mels: int
    ) -> Iterator[tuple[Utterance, Matrix]]:
        """See `Reader.read`."""
        for number, utterance in enumerate(utterances):
            for later in utterances[number + _AHEAD :][:1] if number else utterances[:_AHEAD]:
                self._fetch(later)
            try:
                mel = self._load(utterance, n_mels)
            except ValueError as fault:
                yield utterance, fault
            else:
                yield utterance._replace(frames=len(mel)), mel

    def _load(self, utterance: Utterance, n_mels: int) -> NDArray[np.float32]:
        entry = parse_entry(utterance.path)
        path = self.root / entry.file
        try:
            with machine_errors(path), open_regular(path) as file:
                matrix = _read(file, entry.offset, utterance.nbytes)
        except OSError as error:
            raise ValueError(f"cannot be read: {error.strerror}") from None
        matrix = matrix[entry.slices]
        check_shape(matrix.shape, Expected(n_mels, utterance.frames, "frames"), "save matrix")
        if not matrix.size:
            raise ValueError(f"has shape {matrix.shape}, expected numbers")
        return finite(matrix)

    def _fetch(self, utterance: Utterance) -> None:
        entry = parse_entry(utterance.path)
        if hasattr(os, "posix_fadvise"):
            with contextlib.suppress(OSError), open_regular(self.root / entry.file) as file:
                os.posix_fadvise(
                    file.fileno(), entry.offset, utterance.nbytes, os.POSIX_FADV_WILLNEED
                )


def _read(file: io.BufferedReader, offset: int, most: int) -> NDArray[Any]:
    """The matrix at a place of an ark, of which at most so many bytes belong to it."""
    head = read_span(file, offset, min(_HEAD_BYTES, most))
    if head.lstrip()[:1] == b"[":
        if most > _MOST_TEXT_BYTES:
            raise ValueError(f"has {most} bytes of text; write it as a binary ark (copy-feats)")
        return _from_text(read_span(file, offset, most))
    nbytes = _size(head)
    if nbytes > most:
        raise ValueError(f"ends early: it has {most} bytes, and claims {nbytes}")
    if nbytes > _MOST_BYTES:
        raise ValueError(f"has {nbytes} bytes, more than the {_MOST_BYTES} that are read")
    from kaldiio.matio import read_matrix_or_vector

    matrix: NDArray[Any] = read_matrix_or_vector(io.BytesIO(read_span(file, offset, nbytes)))
    return matrix


def _size(head: bytes) -> int:
    """The bytes that a binary matrix takes, by its head. ValueError if it is none."""
    kind = head[2:].partition(b" ")[0]
    if head[:2] != b"\0B" or kind not in _KINDS:
        shown = f"a {kind.decode()}, " if head[:2] == b"\0B" and kind in (b"FV", b"DV") else ""
        raise ValueError(
            f"is {shown}no matrix of Kaldi: it begins with the bytes {head[:6].hex(' ')}"
        )
    begin = 2 + len(kind) + 1
    plain = kind in (b"FM", b"DM")
    layout = struct.Struct("<bibi" if plain else "<ffii")
    if len(head) < begin + layout.size:
        raise ValueError("ends early, within its head")
    numbers = layout.unpack_from(head, begin)
    rows, columns = (numbers[1], numbers[3]) if plain else numbers[2:]
    if rows < 1 or columns < 1 or (plain and (numbers[0], numbers[2]) != (4, 4)):
        raise ValueError(f"has a head that says {rows} x {columns}")
    itemsize, of_column = _KINDS[kind]
    return begin + layout.size + int(columns) * of_column + int(rows) * int(columns) * itemsize


def _from_text(data: bytes) -> NDArray[np.float32]:
    body, bracket, _ = data.partition(b"]")
    if not bracket:
        raise ValueError("ends early: its text has no ]")
    rows = [line.split() for line in body.partition(b"[")[2].split(b"\n")]
    try:
        return np.array([row for row in rows if row], np.float32)
    except ValueError as error:
        raise ValueError(f"is no matrix in text ({str(error)[:100]})") from None
