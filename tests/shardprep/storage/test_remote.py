"""Files behind URLs: what they hold, what is retried, and what the message of a failure says."""

from __future__ import annotations

import contextlib
import datetime
import http.server
import itertools
import os
import pickle
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import fsspec
import pytest
from fsspec.implementations.http import HTTPFileSystem
from fsspec.implementations.memory import MemoryFileSystem

from shardprep import StorageError
from shardprep.storage import connections, remote
from shardprep.storage.remote import Remote, locate, modified_ns
from tests.conftest import PATIENCE

BODY = bytes(range(256)) * 4


@pytest.fixture
def memory() -> Iterator[Remote]:
    """A folder in the memory of this process, with `sub/file` in it."""
    files = fsspec.filesystem("memory")
    files.store.clear()
    files.pipe("/folder/sub/file", BODY)
    yield Remote("memory://folder", 5.0)
    files.store.clear()
    connections.forget_connections()


@pytest.mark.parametrize(
    ("place", "url"),
    [
        ("s3://bucket/a/b", "s3://bucket/a/b"),
        ("s3://bucket/a/b/", "s3://bucket/a/b"),
        ("http://host:80/a b", "http://host:80/a b"),
        ("memory://x", "memory://x"),
        ("simplecache::s3://bucket/x", "simplecache::s3://bucket/x"),
    ],
)
def test_a_place_with_a_protocol_is_behind_a_url(place: str, url: str) -> None:
    found = locate(place)
    assert isinstance(found, Remote)
    assert str(found) == os.fspath(found) == url
    assert locate(found) is found
    assert str(found / "manifest.json") == f"{url}/manifest.json"
    assert (found / "manifest.json").name == "manifest.json"


@pytest.mark.parametrize(
    ("place", "path"),
    [
        ("/data/shards", "/data/shards"),
        ("shards", "shards"),
        ("file:///data/shards", "/data/shards"),
        ("s3:/bucket", "s3:/bucket"),
        (Path("a/b"), "a/b"),
    ],
)
def test_a_place_without_a_protocol_is_a_path(place: str | Path, path: str) -> None:
    assert locate(place) == Path(path)


def test_files_are_read_in_whole_and_in_part(memory: Remote) -> None:
    file = memory / "sub" / "file"
    assert file.read() == BODY
    assert file.read(10, 20) == BODY[10:20]
    assert file.read(1000, 5000) == BODY[1000:]
    assert file.read(5000, 6000) == b""
    assert file.version()[0] == file.info()["size"] == len(BODY)
    assert file.exists()


def test_an_absent_file_is_not_an_empty_one(memory: Remote) -> None:
    absent = memory / "absent"
    assert not absent.exists()
    assert absent.listing() == {}
    absent.remove()
    for ask in (absent.read, absent.info, absent.version):
        with pytest.raises(FileNotFoundError):
            ask()


def test_files_are_written_moved_listed_and_removed(memory: Remote) -> None:
    (memory / "a").write(b"one")
    (memory / "a").write(b"other")
    (memory / "a").move(memory / "deep" / "b")
    listed = memory.listing()
    assert {name: info["size"] for name, info in listed.items()} == {
        "deep/b": 5,
        "sub/file": len(BODY),
    }
    assert (memory / "deep" / "b").read() == b"other"
    (memory / "deep" / "b").remove()
    assert set(memory.listing()) == {"sub/file"}


def test_a_file_is_sent_when_it_is_complete_and_not_at_all_after_an_error(
    memory: Remote, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    with (memory / "new").publish() as file:
        file.write(b"first half, ")
        assert not (memory / "new").exists()
        file.write(b"second half")
    assert (memory / "new").read() == b"first half, second half"
    with contextlib.suppress(KeyError), (memory / "never").publish() as file:
        file.write(b"half")
        raise KeyError
    assert not (memory / "never").exists()
    assert list(tmp_path.iterdir()) == []


def test_no_room_for_a_file_to_send_is_an_error_of_the_disk(
    memory: Remote, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "absent"))
    with pytest.raises(StorageError, match=f"{tmp_path}/absent"):
        (memory / "new").write(b"x")


def test_a_place_can_be_pickled(memory: Remote) -> None:
    (memory / "sub" / "file").read()
    assert pickle.loads(pickle.dumps(memory)) == memory


def failing(monkeypatch: pytest.MonkeyPatch, errors: Iterator[BaseException | None]) -> list[float]:
    """Have reads of memory:// fail with these errors in turn; gives the time of each try."""
    tried: list[float] = []
    read = MemoryFileSystem.cat_file

    def cat_file(self: Any, *arguments: Any, **options: Any) -> Any:
        tried.append(time.monotonic())
        if (error := next(errors, None)) is not None:
            raise error
        return read(self, *arguments, **options)

    monkeypatch.setattr(MemoryFileSystem, "cat_file", cat_file)
    return tried


PASSING = [
    OSError("a broken connection"),
    TimeoutError(),
    ConnectionResetError(),
    RuntimeError("some layer of a library"),
]


@pytest.mark.parametrize("error", PASSING, ids=lambda error: type(error).__name__)
def test_a_failure_that_may_pass_is_retried(
    memory: Remote, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    tried = failing(monkeypatch, iter([error, error]))
    assert (memory / "sub" / "file").read() == BODY
    assert len(tried) == 3


FINAL = [
    PermissionError("no"),
    IsADirectoryError("no"),
    ValueError("no"),
    TypeError("no"),
    NotImplementedError("no"),
    MemoryError("no"),
    type("NoCredentialsError", (Exception,), {})("no"),
]


@pytest.mark.parametrize("error", FINAL, ids=lambda error: type(error).__name__)
def test_a_failure_that_will_not_pass_is_an_error_at_once(
    memory: Remote, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    tried = failing(monkeypatch, itertools.repeat(error))
    with pytest.raises(StorageError, match=rf"sub/file: .*{type(error).__name__}: no") as caught:
        (memory / "sub" / "file").read()
    assert len(tried) == 1
    assert caught.value.remedy
    assert " for 5 s" not in str(caught.value)


def test_ctrl_c_is_not_retried(memory: Remote, monkeypatch: pytest.MonkeyPatch) -> None:
    tried = failing(monkeypatch, itertools.repeat(KeyboardInterrupt()))
    with pytest.raises(KeyboardInterrupt):
        memory.read()
    assert len(tried) == 1


def test_retries_end_when_patience_ends(
    memory: Remote, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    tried = failing(monkeypatch, itertools.repeat(ConnectionResetError("gone")))
    monkeypatch.setattr(remote, "_LONGEST_PAUSE", 0.01)
    monkeypatch.setattr(remote, "_warned", float("-inf"))
    began = time.monotonic()
    with pytest.raises(StorageError, match=r"no answer for 1 s \(ConnectionResetError: gone\)"):
        Remote("memory://folder/sub/file", 1.0).read()
    assert time.monotonic() - began >= 1
    assert len(tried) > 5
    # Once, after several failures.
    assert [record.message for record in caplog.records] == [
        "memory://folder/sub/file: ConnectionResetError: gone; trying for 1 s"
    ]


def test_stores_name_the_time_of_modification_differently() -> None:
    noon = datetime.datetime(2024, 5, 1, 12, tzinfo=datetime.UTC)
    for info in (
        {"LastModified": noon},
        {"mtime": noon.timestamp()},
        {"created": noon},
        {"Last-Modified": "Wed, 01 May 2024 12:00:00 GMT"},
    ):
        assert modified_ns(info) == int(noon.timestamp()) * 10**9
    assert modified_ns({"size": 3}) == modified_ns({"Last-Modified": "at noon"}) == 0


Answer = Callable[[http.server.BaseHTTPRequestHandler], None]


class Web:
    """A web server.

    Attributes:
        status: What it answers by path, in turn, before it answers normally.
        asked: Method, path and range of each request.
        holds: Set to let the answers go that the status 0 withholds.
    """

    def __init__(self) -> None:
        self.status: dict[str, Iterator[int]] = {}
        self.asked: list[tuple[str, str, str | None]] = []
        self.holds = threading.Event()
        web = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                web.asked.append((self.command, self.path, self.headers["Range"]))
                status = next(web.status.get(self.path, iter(())), 200)
                if status == 0:
                    web.holds.wait(PATIENCE)
                body = BODY if status == 200 else b"no"
                self.send_response(status or 500)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                if self.command == "GET":
                    self.wfile.write(body)

            do_HEAD = do_GET

            def log_message(self, *arguments: Any) -> None:
                pass

        self._server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.02,))
        self._thread.start()

    def file(self, path: str, patience: float = PATIENCE) -> Remote:
        return Remote(f"http://127.0.0.1:{self._server.server_port}{path}", patience)

    def close(self) -> None:
        self.holds.set()
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()


@pytest.fixture
def web(monkeypatch: pytest.MonkeyPatch) -> Iterator[Web]:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    web = Web()
    yield web
    connections.forget_connections()
    HTTPFileSystem.clear_instance_cache()
    web.close()


def test_a_web_server_is_asked_for_ranges_which_it_may_lack(web: Web) -> None:
    assert web.file("/a").read(5, 9) == BODY
    assert web.file("/a").read() == BODY
    assert web.file("/a").info()["size"] == len(BODY)
    assert [(method, part) for method, _, part in web.asked] == [
        ("GET", "bytes=5-8"),
        ("GET", None),
        ("HEAD", None),
    ]


@pytest.mark.parametrize("status", [404, 410])
def test_a_file_that_a_web_server_lacks_is_absent(web: Web, status: int) -> None:
    web.status = {"/a": itertools.repeat(status)}
    if status == 404:
        with pytest.raises(FileNotFoundError):
            web.file("/a").read()
    assert not web.file("/a").exists()


@pytest.mark.parametrize("status", [401, 403, 400])
def test_a_refusal_of_a_web_server_is_an_error_at_once_and_not_absence(
    web: Web, status: int
) -> None:
    web.status = {"/a": itertools.repeat(status)}
    for ask in (web.file("/a").read, web.file("/a").exists, web.file("/a").version):
        web.asked.clear()
        with pytest.raises(StorageError, match=f"/a: the store refused .*{status}"):
            ask()
        # By HEAD, then by GET, but only once.
        assert len(web.asked) <= 2


@pytest.mark.parametrize("status", [500, 503, 429, 408])
def test_a_busy_web_server_is_asked_again(web: Web, status: int) -> None:
    web.status = {"/a": iter([status] * 2), "/b": iter([status] * 4)}
    assert web.file("/a").read() == BODY
    assert web.file("/b").exists()
    web.status = {"/c": itertools.repeat(status)}
    for ask in (web.file("/c", 0.5).read, web.file("/c", 0.5).exists):
        with pytest.raises(StorageError, match=rf"no answer for 0 s .*{status}"):
            ask()


def test_a_range_after_the_end_is_empty(web: Web) -> None:
    web.status = {"/a": itertools.repeat(416)}
    assert web.file("/a").read(5000, 6000) == b""
    assert len(web.asked) == 1


def test_a_server_that_never_answers_is_an_error(web: Web, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote, "CALL_SECONDS", 0.3)
    web.status = {"/a": itertools.repeat(0), "/b": iter([0])}
    began = time.monotonic()
    with pytest.raises(StorageError, match="no answer for 1 s"):
        web.file("/a", 1.0).read()
    assert time.monotonic() - began >= 1
    # One missing answer costs one time-out.
    assert web.file("/b").read() == BODY


def test_a_server_that_does_not_exist_is_an_error(web: Web) -> None:
    web.close()
    with pytest.raises(StorageError, match=r"no answer for 0 s .*Cannot connect"):
        web.file("/a", 0.3).read()


def test_a_web_server_cannot_be_written_to(web: Web) -> None:
    with pytest.raises(StorageError, match=r"read only. Write to a folder, or to an object store"):
        web.file("/a").write(b"x")
    assert web.asked == []


def test_names_are_quoted_in_web_addresses_only() -> None:
    name = "a b/50%#1?.pt"
    assert (Remote("https://x.org/d") / name).url == "https://x.org/d/a%20b/50%25%231%3F.pt"
    assert (Remote("s3://x/d") / name).url == f"s3://x/d/{name}"


def test_marks_of_folders_are_not_files(monkeypatch: pytest.MonkeyPatch) -> None:
    names = ["/set/", "/set/within/", "/set/a.tar", "/set/within/b"]
    found = {name: {"size": 1, "type": "file"} for name in names}
    monkeypatch.setattr(MemoryFileSystem, "find", lambda *arguments, **options: found)
    assert set(Remote("memory://set").listing()) == {"a.tar", "within/b"}
