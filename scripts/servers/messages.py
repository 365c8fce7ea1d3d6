"""HTTP messages in `fault_proxy`: heads, answers and their log, and a shared bandwidth."""

from __future__ import annotations

import io
import re
import socket
import threading
import time
from dataclasses import dataclass, field


@dataclass
class Exchange:
    """A request, and what the client got for it."""

    method: str
    path: str
    range: str | None
    """The header Range, such as "bytes=0-99"."""
    status: int = 0
    """Status of the answer; 0 before there is one."""
    bytes: int = 0
    """Bytes of the answer's body that were sent."""


@dataclass
class Head:
    """First line and headers of a message."""

    lines: list[bytes]
    fields: dict[str, str] = field(default_factory=dict)

    @classmethod
    def read(cls, reader: io.BufferedReader) -> Head | None:
        """The next head; None at the end of the connection."""
        lines = []
        while (line := reader.readline()).strip():
            lines.append(line)
        if not lines or not line:
            return None
        pairs = (line.decode("latin-1").partition(":") for line in lines[1:])
        return cls(lines, {name.strip().lower(): value.strip() for name, _, value in pairs})

    @property
    def words(self) -> list[str]:
        """The words of the first line."""
        return self.lines[0].decode("latin-1").split()

    @property
    def status(self) -> int:
        """The status of an answer."""
        return int(self.words[1])

    @property
    def chunked(self) -> bool:
        """Whether the body comes in chunks."""
        return "chunked" in self.fields.get("transfer-encoding", "").lower()

    def encoded(self, length: int | None = None) -> bytes:
        """The bytes of the head, with another Content-Length if `length` is given."""
        lines = self.lines
        if length is not None:
            given = re.compile(rb"content-length:", re.IGNORECASE)
            lines = [b"Content-Length: %d\r\n" % length if given.match(x) else x for x in lines]
        return b"".join([*lines, b"\r\n"])


class Limit:
    """A bandwidth that several threads share."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._free = 0.0

    def wait(self, size: int, bandwidth: float) -> float:
        """Seconds to wait until `size` more bytes have passed at `bandwidth`."""
        now = time.monotonic()
        with self._lock:
            self._free = max(now, self._free) + size / bandwidth
            return self._free - now


class Sent:
    """Sends an answer to the client, logs it first, and changes a byte if asked to.

    Attributes:
        log: Status and bytes so far.
        changed: Position in the body of the byte to change; None for none.
    """

    def __init__(self, client: socket.socket, log: Exchange) -> None:
        self.log = log
        self.changed: int | None = None
        self._client = client

    def head(self, status: int, head: bytes) -> None:
        """Send the head of the answer."""
        self.log.status = status
        self._client.sendall(head)

    def sendall(self, block: memoryview) -> None:
        """Send a block of the body."""
        if self.changed is not None and 0 <= self.changed - self.log.bytes < len(block):
            block[self.changed - self.log.bytes] ^= 0xFF
        self.log.bytes += len(block)
        self._client.sendall(block)
