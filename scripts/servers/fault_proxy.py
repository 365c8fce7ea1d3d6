"""A proxy between an HTTP client and its server that delays, throttles and damages answers.

The proxy does not change the headers of requests, so that signatures stay valid: a client signs
with the proxy's host and port. Each connection of a client has its own thread and its own
connection to the server.
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
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from scripts.servers.messages import Exchange, Head, Limit, Sent

HOST = "127.0.0.1"
BLOCK = 1 << 20
BUSY = b"<Error><Code>SlowDown</Code><Message>Please reduce your request rate.</Message></Error>"
BUSY_HEAD = (
    b"HTTP/1.1 503 Slow Down\r\nContent-Type: application/xml\r\nConnection: close\r\n"
    b"Content-Length: %d\r\n\r\n"
) % len(BUSY)
# SO_LINGER of 0 seconds: closing the socket resets the connection.
RESET = struct.pack("ii", 1, 0)


@dataclass(frozen=True)
class Faults:
    """What the proxy does to requests and answers; by default nothing."""

    match: str = ""
    """Requests to do it to: a regular expression, searched in "METHOD path"."""
    delay: float = 0.0
    """Seconds before each answer."""
    bandwidth: float = 0.0
    """Bytes a second of all answers' bodies together, whatever `match` says; 0 for no limit."""
    stream_bandwidth: float = 0.0
    """Bytes a second of each answer's body; 0 for no limit."""
    busy: float = 0.0
    """Share of requests that get the answer 503 SlowDown."""
    cut: int = 0
    """N: reset the connection within one in N bodies, starting with the first; 0 for none."""
    truncate: int = 0
    """N: shorten one in N bodies, and its Content-Length accordingly; 0 for none."""
    corrupt: int = 0
    """N: change a byte of one in N bodies; 0 for none."""
    refuse: bool = False
    """Whether connections are reset when they are made or used."""
    blackhole: bool = False
    """Whether requests are read but never answered."""


class FaultProxy:
    """A proxy in threads of this process; see `fault_proxy`.

    Attributes:
        faults: The current faults; may be set at any time.
        log: All requests in the order in which they came.
        unreached: How often connecting to the server failed.
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
        """Have these faults, and no others, inside the `with` block."""
        before, self.faults = self.faults, Faults(**faults)
        try:
            yield
        finally:
            self.faults = before

    def clear(self) -> None:
        """Remove all faults, empty the log, and count bodies from the first again."""
        with self._lock:
            self.faults, self.log, self._bodies, self.unreached = Faults(), [], 0, 0

    def count(self, method: str = "", path: str = "") -> int:
        """Requests in the log with this method, whose path contains `path`."""
        log = list(self.log)
        return sum(method in ("", line.method) and path in line.path for line in log)

    def close(self) -> None:
        """Reset all connections, and end all threads."""
        self._closing.set()
        # This wakes the thread that accepts connections.
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
    def _registered(self, connection: socket.socket) -> Iterator[socket.socket]:
        """Close a connection at the end of the block; `close` can shut it down earlier."""
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
        """Forward the requests of a connection, one after the other."""
        with self._registered(client):
            try:
                if self.faults.refuse:
                    raise ConnectionResetError
                reader = client.makefile("rb", BLOCK)
                with reader, contextlib.ExitStack() as stack:
                    server: socket.socket | None = None
                    while (head := Head.read(reader)) is not None:
                        # If the server sends something unasked, it has closed the connection.
                        if server is None or select.select([server], [], [], 0)[0]:
                            stack.close()
                            server = stack.enter_context(self._registered(self._connect()))
                            answers = stack.enter_context(server.makefile("rb", BLOCK))
                        if not self._exchange(client, reader, head, server, answers):
                            return
            except (OSError, EOFError, ValueError):
                # One side has closed its connection: reset the other.
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
        """Forward a request and its answer; returns whether the connection can be used again."""
        method, path = head.words[:2]
        faults = self.faults
        if not re.search(faults.match, f"{method} {path}"):
            faults = Faults(bandwidth=faults.bandwidth)
        sent = Sent(client, Exchange(method, path, head.fields.get("range")))
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
        self, faults: Faults, answer: Head, answers: io.BufferedReader, sent: Sent, bare: bool
    ) -> None:
        """Forward an answer, with the faults that are due for this body."""
        size = int(answer.fields.get("content-length", 0))
        if bare or answer.status >= 300 or not size:
            sent.head(answer.status, answer.encoded())
            if not bare:
                self._body(answers, answer, sent, faults)
            return
        with self._lock:
            number, place = self._bodies, self._random.randrange(size)
            self._bodies += 1

        def due(every: int) -> bool:
            return every > 0 and number % every == 0

        end = place if due(faults.cut) or due(faults.truncate) else size
        sent.changed = place if due(faults.corrupt) else None
        sent.head(answer.status, answer.encoded(end if due(faults.truncate) else None))
        self._pass(answers, end, sent, faults)
        if due(faults.cut):
            raise ConnectionResetError
        self._pass(answers, size - end, None)

    def _body(self, reader: Any, head: Head, sink: Any, faults: Faults | None = None) -> None:
        """Forward the body that a head announces; an answer's may end with the connection."""
        if head.chunked:
            size = -1
            while size:
                line = reader.readline()
                size = int(line.split(b";")[0], 16)
                # The chunk and its line end; after the last chunk come trailers, mostly none.
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
        """Forward `size` bytes; `faults` is given for answers, and limits their bandwidth."""
        stream = Limit()
        buffer = memoryview(bytearray(min(BLOCK, size)))
        while size:
            total = self.faults.bandwidth if faults else 0.0
            each = faults.stream_bandwidth if faults else 0.0
            slowest = min([rate for rate in (total, each) if rate] or [float("inf")])
            # Blocks of a fiftieth of a second, so that all connections get their share.
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


@contextlib.contextmanager
def fault_proxy(
    target_host: str, target_port: int, plan: Faults | None = None, seed: int = 0
) -> Iterator[FaultProxy]:
    """A proxy on 127.0.0.1.

    Args:
        target_host: Where the server is.
        target_port: The server's port.
        plan: The first faults.
        seed: Decides which requests get 503 and where bodies are damaged.
    """
    proxy = FaultProxy(target_host, target_port, plan or Faults(), seed)
    try:
        yield proxy
    finally:
        proxy.close()
