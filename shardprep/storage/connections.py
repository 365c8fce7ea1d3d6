"""The file systems of fsspec behind URLs: one for each process and store, for all threads."""

from __future__ import annotations

import contextlib
import functools
import os
import re
import threading
from collections.abc import Callable
from typing import Any

from shardprep.errors import StorageError
from shardprep.storage.failures import ABSENT, http_status
from shardprep.system import at_fork

_EXTRAS = {"s3": "s3", "s3a": "s3", "http": "http", "https": "http"}

# Time-outs below that of a call, and as many connections at once as are asked for.
_S3 = {"config_kwargs": {"connect_timeout": 10, "read_timeout": 50, "max_pool_connections": 64}}
_OPTIONS: dict[str, dict[str, Any]] = {"s3": _S3, "s3a": _S3}

_lock = threading.Lock()
_filesystems: dict[tuple[int, str], Any] = {}


def _after_fork() -> None:
    # A thread of the parent may have held the lock while it connected.
    global _lock
    _lock = threading.Lock()


at_fork(_after_fork)


def filesystem(url: str) -> Any:
    """The file system of fsspec for a URL.

    Raises:
        StorageError: fsspec does not know such URLs, or needs a package that is not installed.
    """
    key = os.getpid(), "/".join(url.split("/", 3)[:3])
    with _lock:
        if key not in _filesystems:
            _filesystems[key] = _connect(url)
        return _filesystems[key]


def forget_connections() -> None:
    """Connect to all stores again, by the environment as it is then."""
    with _lock:
        _filesystems.clear()


def timed(system: Any, method: str, seconds: float) -> Callable[..., Any]:
    """A method of a file system, with a time-out if the file system can have one."""
    from fsspec.asyn import AsyncFileSystem, sync

    if not isinstance(system, AsyncFileSystem):
        call: Callable[..., Any] = getattr(system, method)
        return call

    def call_in_time(*arguments: Any, **options: Any) -> Any:
        function = getattr(system, f"_{method}")
        try:
            return sync(system.loop, function, *arguments, timeout=seconds, **options)
        except FileNotFoundError as error:
            # For a web server, fsspec raises this error whatever has failed.
            cause = error.__cause__
            if "http" not in system.protocol or cause is None or http_status(cause) in ABSENT:
                raise
            raise cause from None

    return call_in_time


def _connect(url: str) -> Any:
    import fsspec

    protocol = url.split("://")[0]
    if protocol in ("http", "https") and re.search(r"[?#]", url):
        raise StorageError(
            "has a query or a fragment, behind which no file of a folder can be named",
            file=url,
            remedy="Give the address of the folder alone.",
        )
    options: dict[str, Any] = {"use_listings_cache": False, "skip_instance_cache": True}
    for name, value in _OPTIONS.get(protocol, {}).items():
        # The user's configuration of fsspec has precedence.
        options[name] = {**value, **fsspec.config.conf.get(protocol, {}).get(name, {})}
    try:
        system = fsspec.core.url_to_fs(url, **options)[0]
    except ImportError as error:
        extra = _EXTRAS.get(protocol)
        fix = f"pip install 'shardprep[{extra}]'" if extra else "Install it."
        raise StorageError(
            f"takes a package that is not installed ({error})", file=url, remedy=fix
        ) from None
    except ValueError as error:
        raise StorageError(f"is no URL that fsspec knows ({error})", file=url) from None
    if (close := getattr(system, "close_session", None)) is not None:
        system.close_session = functools.partial(_close_quietly, close)
    return system


def _close_quietly(close: Callable[..., object], *session: object) -> None:
    """Close the connections of a file system, as a process ends.

    A thread may be fetching still, and change what is being closed. Nobody needs to know of that:
    Python would print a traceback.
    """
    with contextlib.suppress(Exception):
        close(*session)
