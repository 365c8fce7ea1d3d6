"""Connections to stores: one for each process, by the configuration of the user."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import fsspec
import pytest

from shardprep import StorageError
from shardprep.storage import connections
from shardprep.storage.remote import Remote


def test_a_package_that_is_missing_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    connections.forget_connections()
    monkeypatch.setitem(sys.modules, "s3fs", None)
    monkeypatch.delitem(sys.modules["fsspec.registry"]._registry, "s3", raising=False)
    with pytest.raises(StorageError, match=r"not installed .*pip install 'shardprep\[s3\]'"):
        Remote("s3://bucket/x").read()


def test_an_unknown_protocol_is_named() -> None:
    with pytest.raises(StorageError, match=r"nonsense://x/y: is no URL that fsspec knows"):
        Remote("nonsense://x/y").read()


# Exits in a process that was forked while a thread of its parent had the lock.
FORKS = """
import os, faulthandler, fsspec
from shardprep.storage import connections
from shardprep.storage.remote import Remote

fsspec.filesystem("memory").pipe("/folder/file", b"x")
file = Remote("memory://folder/file")
file.read()
with connections._lock:
    child = os.fork()
    if not child:
        faulthandler.dump_traceback_later(10, exit=True)
        os._exit(0 if file.read() == b"x" else 1)
os._exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""


def test_a_forked_process_makes_its_own_connections() -> None:
    subprocess.run([sys.executable, "-c", FORKS], check=True, timeout=60)


@pytest.mark.parametrize("url", ["http://127.0.0.1:1/d?key=1", "http://127.0.0.1:1/d#part"])
def test_an_address_that_no_name_can_follow_is_refused(url: str) -> None:
    with pytest.raises(StorageError, match=r"has a query or a fragment.*folder alone"):
        (Remote(url) / "manifest.json").read()


def test_the_users_configuration_of_fsspec_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[dict[str, Any]] = []

    def connect(url: str, **options: Any) -> tuple[Any, str]:
        given.append(options["config_kwargs"])
        raise ValueError("seen")

    monkeypatch.setattr(fsspec.core, "url_to_fs", connect)
    own = {"s3": {"addressing_style": "path"}, "read_timeout": 7}
    monkeypatch.setitem(fsspec.config.conf, "s3", {"config_kwargs": own})
    connections.forget_connections()
    with pytest.raises(StorageError, match="seen"):
        Remote("s3://bucket/x").read()
    assert given == [{**connections._S3["config_kwargs"], **own}]


def test_closing_connections_at_the_end_says_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    from fsspec.implementations.http import HTTPFileSystem

    closed: list[tuple[object, ...]] = []

    def close(*session: object) -> None:
        closed.append(session)
        raise RuntimeError("dictionary changed size during iteration")

    monkeypatch.setattr(HTTPFileSystem, "close_session", staticmethod(close))
    connections.forget_connections()
    system = connections.filesystem("http://127.0.0.1/a")
    # What fsspec registers for the end of the process.
    system.close_session("loop", "session")
    assert closed == [("loop", "session")]
    connections.forget_connections()
