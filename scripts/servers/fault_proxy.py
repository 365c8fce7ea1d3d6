"""A proxy between an HTTP client and its server that delays, throttles and damages answers.

It changes no header of a request, so that signatures hold: a client signs with the proxy's host and
port. A client's connection has a thread and a connection to the server of its own.
"""

from __future__ import annotations

import contextlib
import io
import random
import re
import select
import socket
import struct
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

HOST = "127.0.0.1"
BLOCK = 1 << 20
BUSY = b"<Error><Code>SlowDown</Code><Message>Please reduce your request rate.</Message></Error>"
BUSY_HEAD = (
    b"HTTP/1.1 503 Slow Down\r\nContent-Type: application/xml\r\nConnection: close\r\n"
    b"Content-Length: %d\r\n\r\n"
) % len(BUSY)
# Sending on it, or closing it, resets the connection.
RESET = struct.pack("ii", 1, 0)


@dataclass(frozen=True)
class Faults:
    """What is done to requests and answers; by default nothing."""

    match: str = ""
    """Requests that are meant: a regular expression, looked for in "METHOD path"."""
    delay: float = 0.0
    """Seconds before each answer."""
    bandwidth: float = 0.0
    """Bytes a second of all answers' bodies together; 0 for no limit. Holds for every request."""
    stream_bandwidth: float = 0.0
    """Bytes a second of each answer's body; 0 for no limit."""
    busy: float = 0.0
    """Share of requests that are answered with 503 SlowDown."""
    cut: int = 0
    """In one of so many bodies, from the first one on, the connection is reset; 0 for none."""
    truncate: int = 0
    """One of so many bodies is shorter, and its Content-Length agrees; 0 for none."""
    corrupt: int = 0
    """In one of so many bodies a byte is changed; 0 for none."""
    refuse: bool = False
    """Whether connections are reset as they are made or used."""
    blackhole: bool = False
    """Whether requests are read and never answered."""


@dataclass
class Exchange:
    """A request, and what the client has been sent for it."""

    method: str
    path: str
    range: str | None
    """The header Range, such as "bytes=0-99"."""
    status: int = 0
    """0 as long as there is no answer."""
    bytes: int = 0
    """Of the answer's body."""


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
        """Status of an answer."""
        return int(self.words[1])

    @property
    def chunked(self) -> bool:
        """Whether the body comes in chunks."""
        return "chunked" in self.fields.get("transfer-encoding", "").lower()

    def encoded(self, length: int | None = None) -> bytes:
        """The head as it is sent, with another Content-Length if one is given."""
        lines = self.lines
        if length is not None:
            said = re.compile(rb"content-length:", re.IGNORECASE)
            lines = [b"Content-Length: %d\r\n" % length if said.match(x) else x for x in lines]
        return b"".join([*lines, b"\r\n"])


class Limit:
    """A bandwidth, shared by those who ask."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._free = 0.0

    def wait(self, size: int, bandwidth: float) -> float:
        """Seconds to wait before `size` bytes have passed at `bandwidth`."""
        now = time.monotonic()
        with self._lock:
            self._free = max(now, self._free) + size / bandwidth
            return self._free - now


class FaultProxy:
    """A proxy in threads of this process; see `fault_proxy`.

    Attributes:
        faults: What is done at the moment; may be set at any time.
        log: Every request, in the order in which they came.
        unreached: How often the server could not be connected to.
    """

    def __init__(self, host: str, port: int, faults: Faults, seed: int) -> None:
        self.faults = faults
        self.log: list[Exchange] = []
        self.unreached = 0
        self._target = (host, port)
        self._random = random.Random(seed)
        self._bodies = 0
        self._limit = Limit()
        self._lock = threading.Lock()
        self._closing = threading.Event()
        self._sockets: set[socket.socket] = set()
        self._threads: set[threading.Thread] = set()
        self._listener = socket.create_server((HOST, 0), backlog=256)
        #: Host and port that clients connect to.
        self.endpoint: tuple[str, int] = self._listener.getsockname()
        self.url = "http://{}:{}".format(*self.endpoint)
        self._start(self._accept)

    @contextlib.contextmanager
    def faulty(self, **faults: Any) -> Iterator[None]:
        """Have these faults, and no others, for a while."""
        before, self.faults = self.faults, Faults(**faults)
        try:
            yield
        finally:
            self.faults = before

    def clear(self) -> None:
        """Have no faults, an empty log, and the next body as the first."""
        with self._lock:
            self.faults, self.log, self._bodies, self.unreached = Faults(), [], 0, 0

    def count(self, method: str = "", path: str = "") -> int:
        """Requests in the log with this method, whose path contains `path`."""
        log = list(self.log)
        return sum(method in ("", line.method) and path in line.path for line in log)

    def close(self) -> None:
        """Reset all connections, and end all threads."""
        self._closing.set()
        # Wakes the thread that accepts.
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        while self._threads:
            with self._lock:
                sockets, threads = list(self._sockets), list(self._threads)
            for connection in sockets:
                with contextlib.suppress(OSError):
                    connection.shutdown(socket.SHUT_RDWR)
            for thread in threads:
                thread.join(0.1)
        self._listener.close()

    def _start(self, work: Any, *arguments: Any) -> None:
        def run() -> None:
            try:
                work(*arguments)
            finally:
                with self._lock:
                    self._threads.discard(thread)

        thread = threading.Thread(target=run, daemon=True)
        with self._lock:
            self._threads.add(thread)
        thread.start()

    @contextlib.contextmanager
    def _kept(self, connection: socket.socket) -> Iterator[socket.socket]:
        """A connection that `close` knows of."""
        with connection:
            with self._lock:
                self._sockets.add(connection)
            try:
                connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                yield connection
            finally:
                with self._lock:
                    self._sockets.discard(connection)

    def _accept(self) -> None:
        while not self._closing.is_set():
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            self._start(self._serve, client)

    def _serve(self, client: socket.socket) -> None:
        """Pass on the requests of a connection, one after the other."""
        with self._kept(client):
            try:
                if self.faults.refuse:
                    raise ConnectionResetError
                reader = client.makefile("rb", BLOCK)
                with reader, contextlib.ExitStack() as stack:
                    server: socket.socket | None = None
                    while (head := Head.read(reader)) is not None:
                        # What the server has to say unasked is that it is gone.
                        if server is None or select.select([server], [], [], 0)[0]:
                            stack.close()
                            server = stack.enter_context(self._kept(self._connect()))
                            answers = stack.enter_context(server.makefile("rb", BLOCK))
                        if not self._exchange(client, reader, head, server, answers):
                            return
            except (OSError, EOFError, ValueError):
                # One side has gone, or is to be told that the other has.
                client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)

    def _connect(self) -> socket.socket:
        try:
            return socket.create_connection(self._target)
        except OSError:
            with self._lock:
                self.unreached += 1
            raise

    def _exchange(
        self,
        client: socket.socket,
        reader: io.BufferedReader,
        head: Head,
        server: socket.socket,
        answers: io.BufferedReader,
    ) -> bool:
        """Pass on a request and its answer; whether the connection goes on."""
        method, path = head.words[:2]
        faults = self.faults
        if not re.search(faults.match, f"{method} {path}"):
            faults = Faults(bandwidth=faults.bandwidth)
        sent = _Sent(client, Exchange(method, path, head.fields.get("range")))
        with self._lock:
            self.log.append(sent.log)
            busy = self._random.random() < faults.busy
        if faults.blackhole:
            self._closing.wait()
        if faults.refuse or faults.blackhole:
            raise ConnectionResetError
        expects = "expect" in head.fields
        if not busy:
            server.sendall(head.encoded())
        if not expects:
            # A server may answer before it has read the whole body.
            with contextlib.suppress(BrokenPipeError, ConnectionResetError):
                self._body(reader, head, None if busy else server)
        if busy:
            self._closing.wait(faults.delay)
            sent.head(503, BUSY_HEAD)
            if method != "HEAD":
                sent.sendall(memoryview(BUSY))
            return False
        answer = Head.read(answers)
        while answer is not None and answer.status < 200:
            client.sendall(answer.encoded())
            self._body(reader, head, server)
            answer = Head.read(answers)
        if answer is None:
            raise ConnectionResetError
        self._closing.wait(faults.delay)
        bare = method == "HEAD" or answer.status in (204, 304)
        self._answer(faults, answer, answers, sent, bare)
        ends = "close" in (x.fields.get("connection", "").lower() for x in (head, answer))
        return not ends and (bare or answer.chunked or "content-length" in answer.fields)

    def _answer(
        self, faults: Faults, answer: Head, answers: io.BufferedReader, sent: _Sent, bare: bool
    ) -> None:
        """Pass on an answer, with the damage that its turn brings."""
        size = int(answer.fields.get("content-length", 0))
        if bare or answer.status >= 300 or not size:
            sent.head(answer.status, answer.encoded())
            if not bare:
                self._body(answers, answer, sent, faults)
            return
        with self._lock:
            turn, place = self._bodies, self._random.randrange(size)
            self._bodies += 1

        def due(one_of: int) -> bool:
            return one_of > 0 and turn % one_of == 0

        end = place if due(faults.cut) or due(faults.truncate) else size
        sent.changed = place if due(faults.corrupt) else None
        sent.head(answer.status, answer.encoded(end if due(faults.truncate) else None))
        self._pass(answers, end, sent, faults)
        if due(faults.cut):
            raise ConnectionResetError
        self._pass(answers, size - end, None)

    def _body(self, reader: Any, head: Head, sink: Any, faults: Faults | None = None) -> None:
        """Pass on the body that a head announces; an answer's may end with the connection."""
        if head.chunked:
            size = -1
            while size:
                line = reader.readline()
                size = int(line.split(b";")[0], 16)
                # The chunk and the end of its line; behind the last one, of empty trailers.
                self._put(sink, line, faults)
                if size:
                    self._pass(reader, size + 2, sink, faults)
            while (line := reader.readline()).strip():
                self._put(sink, line, faults)
            self._put(sink, line, faults)
        elif "content-length" in head.fields:
            self._pass(reader, int(head.fields["content-length"]), sink, faults)
        elif faults is not None:
            with contextlib.suppress(EOFError):
                self._pass(reader, 1 << 62, sink, faults)

    def _put(self, sink: Any, data: bytes, faults: Faults | None) -> None:
        self._pass(io.BytesIO(data), len(data), sink, faults)

    def _pass(self, reader: Any, size: int, sink: Any, faults: Faults | None = None) -> None:
        """Pass on `size` bytes, at the bandwidth that there is for answers."""
        stream = Limit()
        buffer = memoryview(bytearray(min(BLOCK, size)))
        while size:
            total = self.faults.bandwidth if faults else 0.0
            each = faults.stream_bandwidth if faults else 0.0
            slowest = min([rate for rate in (total, each) if rate] or [float("inf")])
            # Blocks of a fiftieth of a second, so that all get their share.
            block = int(min(len(buffer), size, max(1024, slowest / 50)))
            got = reader.readinto1(buffer[:block])
            if not got:
                raise EOFError
            waits = [self._limit.wait(got, total)] if total else []
            waits += [stream.wait(got, each)] if each else []
            if waits:
                self._closing.wait(max(waits))
            if sink is not None:
                sink.sendall(buffer[:got])
            size -= got


class _Sent:
    """What the client of an answer is sent, noted before it goes, and the byte to change."""

    def __init__(self, client: socket.socket, log: Exchange) -> None:
        self.log = log
        self.changed: int | None = None
        self._client = client

    def head(self, status: int, head: bytes) -> None:
        self.log.status = status
        self._client.sendall(head)

    def sendall(self, block: memoryview) -> None:
        if self.changed is not None and 0 <= self.changed - self.log.bytes < len(block):
            block[self.changed - self.log.bytes] ^= 0xFF
        self.log.bytes += len(block)
        self._client.sendall(block)


@contextlib.contextmanager
def fault_proxy(
    target_host: str, target_port: int, plan: Faults | None = None, seed: int = 0
) -> Iterator[FaultProxy]:
    """A proxy on 127.0.0.1.

    Args:
        target_host: Where the server is.
        target_port: The server's port.
        plan: Faults to begin with.
        seed: Decides which requests find the server busy, and where bodies are damaged.
    """
    proxy = FaultProxy(target_host, target_port, plan or Faults(), seed)
    try:
        yield proxy
    finally:
        proxy.close()
