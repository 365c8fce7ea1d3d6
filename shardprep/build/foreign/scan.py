"""Reads one tar of another program, once: its sha256, and where each matrix lies.

What cannot be mapped gets its reason, in words for people.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass

import msgspec

from shardprep.build.foreign.members import (
    Dtype,
    Matrix,
    class_number,
    other_form,
    read_matrix,
    read_text,
    speaker_field,
)
from shardprep.build.shard import Advance
from shardprep.errors import SourceError
from shardprep.format.foreign_tar import (
    ForeignMember,
    ReadAt,
    key_and_extension,
    walk_foreign,
)
from shardprep.format.index import key_fault
from shardprep.storage.local import open_regular
from shardprep.storage.sniff import refuse_stand_in, sniff
from shardprep.storage.trouble import machine_errors

_PIECE = 1 << 20
_HEAD = 4096
_MOST_EXTENSION, _MOST_SHOWN = 100, 200
_TARS = "Name plain tars whose members are `.npy` files."


class Found(msgspec.Struct, frozen=True, array_like=True):
    """An utterance whose matrix can be mapped.

    Attributes:
        key: Its key.
        offset: Where the `.npy` file begins, in bytes of the tar.
        nbytes: Its size in bytes.
        frames: Rows of the matrix.
        n_mels: Its columns.
        dtype: "float16" or "float32".
        crc32: CRC-32 of the `.npy` file.
        name: The speaker by the field of its `.json` member; None if unknown.
        number: The text of its `.cls` member; None if unknown, as -1 is.
    """

    key: str
    offset: int
    nbytes: int
    frames: int
    n_mels: int
    dtype: Dtype
    crc32: int
    name: str | None
    number: str | None


class TarRecord(msgspec.Struct, frozen=True):
    """What reading a tar has found. An unfinished adoption keeps it.

    Attributes:
        inputs: SHA-256 over what decided it; see `TarTask.inputs`.
        bytes: Size of the tar.
        sha256: Its SHA-256.
        found: The utterances, in the order of the tar.
        faults: Key, "" for the tar as a whole, and what is wrong: in the order of the tar.
    """

    inputs: str
    bytes: int
    sha256: str
    found: tuple[Found, ...]
    faults: tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class TarTask:
    """What a worker must know to read a tar.

    Attributes:
        path: Where it is; no link.
        shown: Its path as the user gave it, for messages.
        member: Extension of the matrix.
        speaker: Field of the `.json` member that names the speaker.
        state: Numbers that change when the file does.
    """

    path: str
    shown: str
    member: str
    speaker: str
    state: tuple[int, ...]

    @property
    def size(self) -> int:
        """Size of the tar in bytes."""
        return self.state[2]

    @property
    def inputs(self) -> str:
        """SHA-256 over everything that decides the record, the file's times among it."""
        listed = [self.path, self.member, self.speaker, self.state]
        return hashlib.sha256(json.dumps(listed).encode()).hexdigest()


def file_state(found: os.stat_result) -> tuple[int, ...]:
    """Numbers that change when a file does."""
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns


def scan_tar(task: TarTask, advance: Advance = lambda nbytes: None) -> TarRecord:
    """Read a tar.

    Args:
        task: What to read.
        advance: Called now and then, with the bytes read since the last call.

    Raises:
        SourceError: The file is missing, is no tar, or changes while it is read.
        StorageError: The machine cannot read it now.
    """
    with open_tar(task.path, task.shown) as file:
        before = os.fstat(file.fileno())
        hashed = _HashedFile(file)
        scan = _Scan(task, hashed.read_at)
        told = 0
        try:
            for member in walk_foreign(hashed.read_at, before.st_size):
                scan.take(member)
                if hashed.end != told:
                    advance(hashed.end - told)
                    told = hashed.end
            scan.finish()
            if not hashed.rest_is_empty():
                raise tarfile.ReadError("it has data after its end, such as a second tar")
        except tarfile.ReadError as error:
            scan = _Scan(task, hashed.read_at)
            scan.faults.append(("", f"is not one complete tar: {error}"))
            hashed.rest_is_empty()
        advance(hashed.end - told)
        after = file_state(os.fstat(file.fileno()))
        if hashed.end != before.st_size or file_state(before) != after:
            raise SourceError(
                "changed while it was read",
                file=task.shown,
                remedy="Wait for the program that writes it, then run the same command again.",
            )
    sha256 = hashed.sha256.hexdigest()
    return TarRecord(task.inputs, before.st_size, sha256, scan.found, tuple(scan.faults))


@contextlib.contextmanager
def open_tar(path: str, shown: str) -> Iterator[io.BufferedReader]:
    """Open a tar for reading, never for writing.

    Raises:
        SourceError: The file is missing or is no tar; the error says what it is.
        StorageError: It was not fetched, or the machine cannot read it now.
    """
    try:
        with machine_errors(shown), open_regular(path) as file:
            _refuse_others(file.read(_HEAD), shown)
            file.seek(0)
            yield file
    except OSError as error:
        raise SourceError(f"cannot be read: {error.strerror}", file=shown, remedy=_TARS) from None


def _refuse_others(head: bytes, shown: str) -> None:
    """SourceError if a file that begins so is no tar; some names of members look like marks."""
    try:
        if not head.strip(b"\0") and head:
            return
        tarfile.TarInfo.frombuf(head[: tarfile.BLOCKSIZE], "utf-8", "surrogateescape")
    except (tarfile.HeaderError, ValueError):
        refuse_stand_in(head, shown)
        found = sniff(head)
        what = "is not a tar" if found is None else f"{found.what}: not a tar"
        raise SourceError(what, file=shown, remedy=_TARS) from None


class _HashedFile:
    """Reads a file from its beginning to its end, in pieces, and hashes every byte once.

    Args:
        file: The file, at its beginning.

    Attributes:
        end: Bytes read so far.
        sha256: Hash of them.
    """

    def __init__(self, file: io.BufferedReader) -> None:
        self._file = file
        self._held, self._begin, self._asked = b"", 0, 0
        self.end = 0
        self.sha256 = hashlib.sha256()

    def read_at(self, offset: int, size: int) -> bytes:
        """Bytes of the file; `offset` must not lie before an earlier one."""
        assert offset >= self._begin
        self._asked = offset + size
        while self.end < self._asked and self._more(keep_from=offset):
            pass
        return self._held[offset - self._begin : self._asked - self._begin]

    def rest_is_empty(self) -> bool:
        """Read all bytes after the last ones that were asked for: are they zeros?"""
        empty = not self._held[self._asked - self._begin :].strip(b"\0")
        while self._more(keep_from=self.end):
            empty = empty and not self._held.strip(b"\0")
        return empty

    def _more(self, keep_from: int) -> bool:
        piece = self._file.read(_PIECE)
        self.sha256.update(piece)
        begin = min(keep_from, self.end)
        self._held = self._held[begin - self._begin :] + piece
        self._begin = begin
        self.end += len(piece)
        return bool(piece)


class _Scan:
    """Collects the utterances of a tar, member by member.

    Args:
        task: What to look for.
        read_at: Reads the tar, in ascending order.

    Attributes:
        faults: What is wrong with utterances; see `TarRecord`.
    """

    def __init__(self, task: TarTask, read_at: ReadAt) -> None:
        self._task = task
        self._read_at = read_at
        self._seen: set[str] = set()
        self._repeated: set[str] = set()
        self._begin("")
        self._found: list[Found] = []
        self.faults: list[tuple[str, str]] = []

    def _begin(self, key: str) -> None:
        self._key = key
        self._extensions: set[str] = set()
        self._fault: str | None = None
        self._matrix: Matrix | None = None
        self._name: str | None = None
        self._number: str | None = None

    def take(self, member: ForeignMember) -> None:
        """The next member of the tar."""
        named = key_and_extension(member.name)
        if named is None:
            return
        key, extension = named
        # Readers pass over links and devices; here they are the reason why a matrix is missing.
        if not member.is_plain and extension != self._task.member:
            return
        if key != self._key:
            self.finish()
            self._begin(key)
        if len(extension) > _MOST_EXTENSION:
            return
        try:
            if extension in self._extensions:
                raise ValueError(f"has two members .{extension}")
            self._extensions.add(extension)
            if extension == self._task.member:
                self._matrix = read_matrix(self._read_at, member)
            elif extension == "json":
                text = read_text(self._read_at, member, extension)
                self._name = speaker_field(text, self._task.speaker)
            elif extension == "cls":
                self._number = class_number(read_text(self._read_at, member, extension))
        except ValueError as fault:
            self._fault = self._fault or str(fault)

    def finish(self) -> None:
        """End the utterance whose members came last."""
        if not self._key:
            return
        fault, matrix = key_fault(self._key, None), self._matrix
        if fault is not None:
            fault = f"its key cannot be used: {fault}"
        elif self._key in self._seen:
            fault = "comes twice: its members are not side by side, or the tar has the key again"
            self._repeated.add(self._key)
        else:
            self._seen.add(self._key)
            fault = self._fault or (None if matrix else self._missing())
        if fault is not None:
            # Names that are not UTF-8 have surrogates, which no record can hold.
            key, fault = (
                text.encode(errors="backslashreplace").decode() for text in (self._key, fault)
            )
            self.faults.append((key[:_MOST_SHOWN], fault))
        elif matrix is not None:
            self._found.append(Found(self._key, *matrix, self._name, self._number))

    @property
    def found(self) -> tuple[Found, ...]:
        """The utterances. Of a key that comes twice, none is: nobody knows which is meant."""
        return tuple(found for found in self._found if found.key not in self._repeated)

    def _missing(self) -> str:
        """Why an utterance has no matrix."""
        wanted = f"has no member .{self._task.member}"
        for extension in sorted(self._extensions):
            if (form := other_form(extension)) is not None:
                return f"{wanted}, but .{extension}, {form}: nothing can map that"
        others = sorted(e for e in self._extensions if f".{e}".endswith(".npy"))
        return f"{wanted}, but .{others[0]}" if others else wanted
