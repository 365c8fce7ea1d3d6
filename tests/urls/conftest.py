"""A real object store, and a proxy with faults in front of it, for tests of shards behind URLs."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import s3fs

from scripts.servers import object_store as servers
from shardprep.storage import connections


def forget() -> None:
    """Drop all file systems of fsspec, because each keeps the endpoint that it was made with."""
    connections.forget_connections()
    s3fs.S3FileSystem.clear_instance_cache()


@pytest.fixture(scope="session")
def store(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """The object store of this session; S3 clients find it through the environment."""
    with (
        servers.object_store(tmp_path_factory.mktemp("store")) as store,
        pytest.MonkeyPatch.context() as patch,
    ):
        for name, value in store.environment.items():
            patch.setenv(name, value)
        forget()
        yield store
        forget()


@pytest.fixture(scope="session")
def session_proxy(store: Any) -> Iterator[Any]:
    with servers.fault_proxy(*store.endpoint) as proxy:
        yield proxy


@pytest.fixture
def proxy(session_proxy: Any, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """The proxy in front of S3 for this test, without faults and with an empty log."""
    session_proxy.clear()
    monkeypatch.setenv("AWS_ENDPOINT_URL", session_proxy.url)
    forget()
    yield session_proxy
    session_proxy.clear()
    forget()


@pytest.fixture
def http_proxy(store: Any) -> Iterator[Any]:
    """A proxy in front of plain HTTP: `store.http_url(path, http_proxy.endpoint)`."""
    with servers.fault_proxy(*store.http_endpoint) as proxy:
        yield proxy
