"""The servers of the remote tests: the store keeps objects, and each fault has its effect."""

from __future__ import annotations

import http.client
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import fsspec
import pytest
import s3fs
from botocore.exceptions import FlexibleChecksumError

from scripts.servers import object_store as servers
from tests.conftest import wait_until

ROOT = Path(__file__).resolve().parents[2]

pytestmark = pytest.mark.remote

BODY = random.Random(0).randbytes(300_000)


@pytest.fixture(scope="module")
def known(store: Any) -> str:
    """The path over plain HTTP of an object with the contents BODY."""
    fsspec.filesystem("s3").pipe(store.url("known/a b.tar"), BODY)
    return str(store.http_url("known/a%20b.tar")).partition(":")[2].split("/", 3)[3]


@contextmanager
def connected(proxy: Any) -> Iterator[http.client.HTTPConnection]:
    with closing(http.client.HTTPConnection(*proxy.endpoint)) as connection:
        yield connection


@pytest.fixture
def get(http_proxy: Any, known: str) -> Callable[..., bytes]:
    """`get(**headers)` reads the known object or a part of it, over a new connection."""

    def read(**headers: str) -> bytes:
        with connected(http_proxy) as connection:
            connection.request("GET", f"/{known}", headers=headers)
            answer = connection.getresponse()
            return answer.read() if answer.status < 300 else b"%d" % answer.status

    return read


@pytest.mark.parametrize("way", ["direct", "through the proxy"])
def test_s3_keeps_and_gives_objects(
    store: Any, way: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    proxy = request.getfixturevalue("proxy") if way != "direct" else None
    files = fsspec.filesystem("s3")
    folder = store.url(way.replace(" ", "-"))
    large = random.Random(1).randbytes(12 << 20)
    (tmp_path / "large").write_bytes(large)
    files.pipe(f"{folder}/small", b"twelve bytes")
    with files.open(f"{folder}/large", "wb", block_size=5 << 20) as parts:
        for begin in range(0, len(large), 1 << 20):
            parts.write(large[begin : begin + (1 << 20)])
    files.put_file(str(tmp_path / "large"), f"{folder}/put")
    files.invalidate_cache()
    sizes = {row["name"].rpartition("/")[2]: row["size"] for row in files.ls(folder, detail=True)}
    assert sizes == {"small": 12, "large": len(large), "put": len(large)}
    assert files.cat(f"{folder}/large") == large
    middle = files.cat_file(f"{folder}/put", start=7_000_000, end=7_100_000)
    assert middle == large[7_000_000:7_100_000]
    files.get_file(f"{folder}/put", str(tmp_path / "got"))
    assert (tmp_path / "got").read_bytes() == large
    files.rm(f"{folder}/small")
    assert not files.exists(f"{folder}/small")
    if proxy is not None:
        assert proxy.count("PUT", "large?partNumber=") == 3
        assert proxy.count("POST", "large?uploads") == 1
        parts = [line for line in proxy.log if line.range]
        assert [(p.range, p.status, p.bytes) for p in parts] == [
            ("bytes=7000000-7099999", 206, 100_000)
        ]


def test_plain_http_serves_the_same_objects_and_parts_of_them(store: Any, known: str) -> None:
    with fsspec.open(store.http_url("known/a b.tar"), "rb") as file:
        file.seek(1000)
        assert file.read(50) == BODY[1000:1050]
    # A file system over HTTP keeps its connections until it is collected.
    type(fsspec.filesystem("http")).clear_instance_cache()


def test_wrong_credentials_are_refused(store: Any, known: str) -> None:
    stranger = s3fs.S3FileSystem(key="access-of-tests", secret="wrong", skip_instance_cache=True)
    with pytest.raises(PermissionError):
        stranger.cat(store.url("known/a b.tar"))
    nobody = s3fs.S3FileSystem(anon=True, skip_instance_cache=True)
    with pytest.raises(PermissionError):
        nobody.cat(store.url("known/a b.tar"))


def test_objects_outlive_an_outage(tmp_path: Path) -> None:
    with servers.object_store(tmp_path) as store:
        options: Any = {
            "key": servers.ACCESS,
            "secret": servers.SECRET,
            "endpoint_url": store.environment["AWS_ENDPOINT_URL"],
            "skip_instance_cache": True,
            "config_kwargs": {"retries": {"max_attempts": 1}},
        }
        s3fs.S3FileSystem(**options).pipe(store.url("kept"), BODY)
        process = store.process
        store.stop()
        assert not Path(f"/proc/{process}").exists()
        with pytest.raises(ConnectionRefusedError), connected(store) as connection:
            connection.request("GET", "/")
        store.start()
        assert s3fs.S3FileSystem(**options).cat(store.url("kept")) == BODY


def test_the_store_ends_with_its_process(tmp_path: Path) -> None:
    program = f"""
import sys, time
sys.path.insert(0, {str(ROOT)!r})
from scripts.servers import object_store as servers
from tests.conftest import wait_until
with servers.object_store() as store:
    print(store.process, *store.sockets, flush=True)
    time.sleep(600)
"""
    command = [sys.executable, "-c", program]
    # A killed program leaves its temporary files: put them into this folder.
    environment = {**os.environ, "TMPDIR": str(tmp_path)}
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as run:
        assert run.stdout is not None
        number, *sockets = run.stdout.readline().split()
        assert "weed" in Path(f"/proc/{number}/stat").read_text()
        os.kill(run.pid, signal.SIGKILL)
    wait_until(lambda: not Path(f"/proc/{number}").exists())
    for path in sockets:
        Path(path).unlink(missing_ok=True)


def test_nothing_is_left_behind() -> None:
    with servers.object_store() as store:
        assert store.folder.exists()
        assert any(path.exists() for path in store.sockets)
        process = store.process
    assert not store.folder.exists()
    assert not any(path.exists() for path in store.sockets)
    assert not Path(f"/proc/{process}").exists()


def test_without_faults_nothing_is_changed(get: Callable[..., bytes], http_proxy: Any) -> None:
    assert get() == BODY
    assert get(Range="bytes=10-19") == BODY[10:20]
    full, part = http_proxy.log
    assert (full.method, full.range, full.status, full.bytes) == ("GET", None, 200, len(BODY))
    assert (part.range, part.status, part.bytes) == ("bytes=10-19", 206, 10)
    assert http_proxy.count() == http_proxy.count("GET", "known/a%20b.tar") == 2
    assert http_proxy.count("PUT") == http_proxy.count("GET", "other") == 0


def test_a_connection_is_used_again(http_proxy: Any, known: str) -> None:
    with connected(http_proxy) as connection:
        connection.connect()
        kept = connection.sock
        for method in ("GET", "HEAD", "GET"):
            connection.request(method, f"/{known}")
            answer = connection.getresponse()
            assert int(answer.headers["Content-Length"]) == len(BODY)
            assert answer.read() == (BODY if method == "GET" else b"")
            assert connection.sock is kept
    assert [line.method for line in http_proxy.log] == ["GET", "HEAD", "GET"]


def test_chunked_bodies_and_expectations_are_forwarded(http_proxy: Any, store: Any) -> None:
    path = "/buckets/test-bucket/chunked"
    with connected(http_proxy) as connection:
        pieces = iter([b"in ", b"three ", b"pieces"])
        connection.request("PUT", path, pieces, encode_chunked=True)
        assert connection.getresponse().read() is not None
        connection.request("GET", path)
        assert connection.getresponse().read() == b"in three pieces"
        connection.putrequest("PUT", path)
        connection.putheader("Content-Length", "4")
        connection.putheader("Expect", "100-continue")
        connection.endheaders()
        assert connection.sock.recv(100).startswith(b"HTTP/1.1 100 Continue")
        connection.send(b"late")
        assert connection.getresponse().read() is not None
        connection.request("GET", path)
        assert connection.getresponse().read() == b"late"


def test_the_proxy_connects_to_the_server_again(http_proxy: Any, known: str) -> None:
    # Close the proxy's connection to the server, but not the client's.
    with connected(http_proxy) as connection:
        for _ in range(2):
            connection.request("GET", f"/{known}", headers={"Range": "bytes=0-0"})
            assert connection.getresponse().read() == BODY[:1]
            for upstream in list(http_proxy._sockets):
                if upstream.getpeername() == http_proxy._target:
                    upstream.shutdown(2)
    assert http_proxy.count() == 2


def test_delay_comes_before_each_answer(get: Callable[..., bytes], http_proxy: Any) -> None:
    with http_proxy.faulty(delay=0.2):
        began = time.monotonic()
        assert get() == BODY
        assert time.monotonic() - began >= 0.2


@pytest.mark.parametrize("kind", ["bandwidth", "stream_bandwidth"])
def test_bandwidth_is_limited(get: Callable[..., bytes], http_proxy: Any, kind: str) -> None:
    with http_proxy.faulty(**{kind: 1_000_000}):
        began = time.monotonic()
        assert get() == BODY
        assert time.monotonic() - began >= 0.29


def test_busy_is_a_share_of_the_requests(get: Callable[..., bytes], http_proxy: Any) -> None:
    with http_proxy.faulty(busy=0.5):
        answers = [get(Range="bytes=0-9") for _ in range(60)]
    refused = answers.count(b"503")
    assert 15 <= refused <= 45
    assert answers.count(BODY[:10]) == 60 - refused
    assert sum(line.status == 503 for line in http_proxy.log) == refused


def test_one_in_n_bodies_is_cut(get: Callable[..., bytes], http_proxy: Any) -> None:
    with http_proxy.faulty(cut=3):
        for number in range(6):
            if number % 3:
                assert get() == BODY
            else:
                with pytest.raises((ConnectionResetError, http.client.IncompleteRead)):
                    get()
    assert [line.bytes < len(BODY) for line in http_proxy.log] == [True, False, False] * 2


def test_one_in_n_bodies_is_shorter(get: Callable[..., bytes], http_proxy: Any) -> None:
    with http_proxy.faulty(truncate=2):
        lengths = [len(body) for body in (get(), get(), get())]
    assert lengths[0] < len(BODY) == lengths[1] > lengths[2]


def test_one_in_n_bodies_has_a_changed_byte(get: Callable[..., bytes], http_proxy: Any) -> None:
    with http_proxy.faulty(corrupt=2):
        bodies = [get() for _ in range(4)]
    wrong = [sum(a != b for a, b in zip(body, BODY, strict=True)) for body in bodies]
    assert wrong == [1, 0, 1, 0]


def test_refused_connections_are_reset(get: Callable[..., bytes], http_proxy: Any) -> None:
    with http_proxy.faulty(refuse=True), pytest.raises(OSError, match="reset|closed"):
        get()
    assert get() == BODY


def test_a_black_hole_never_answers(get: Callable[..., bytes], http_proxy: Any, known: str) -> None:
    with http_proxy.faulty(blackhole=True), connected(http_proxy) as connection:
        connection.timeout = 0.5
        connection.request("GET", f"/{known}")
        with pytest.raises(TimeoutError):
            connection.getresponse()
    assert get() == BODY


def test_faults_are_for_the_requests_that_match(get: Callable[..., bytes], http_proxy: Any) -> None:
    with http_proxy.faulty(match=r"GET .*\.npy$", busy=1.0):
        assert get() == BODY
    with http_proxy.faulty(match=r"GET .*\.tar$", busy=1.0):
        assert get() == b"503"


def test_s3_survives_what_it_retries(store: Any, known: str, proxy: Any) -> None:
    files = fsspec.filesystem("s3")
    with proxy.faulty(busy=0.3, delay=0.01):
        assert files.cat(store.url("known/a b.tar")) == BODY
    # botocore compares the checksum of complete objects, but parts have none.
    with proxy.faulty(corrupt=1), pytest.raises(FlexibleChecksumError):
        files.cat(store.url("known/a b.tar"))
    with proxy.faulty(corrupt=1):
        assert files.cat_file(store.url("known/a b.tar"), start=1) != BODY[1:]
    assert files.cat(store.url("known/a b.tar")) == BODY


def test_a_proxy_ends_with_all_its_threads(store: Any, known: str) -> None:
    with servers.fault_proxy(*store.http_endpoint) as proxy, connected(proxy) as connection:
        connection.request("GET", f"/{known}")
        connection.getresponse().read()
        assert proxy._threads
    assert not proxy._threads
    assert not proxy._sockets
    with pytest.raises(ConnectionRefusedError), connected(proxy) as connection:
        connection.request("GET", "/")
