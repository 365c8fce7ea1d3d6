"""Files behind URLs, through fsspec: each call has a time-out, and is tried again if that may help.

What may help to wait for (no answer, a broken connection, a server that is busy or down) is asked
for again after random, growing pauses, until it has failed for `patience` seconds. What will not
change (no such file, no permission) is an error at once.
"""

from __future__ import annotations

import contextlib
import datetime
import email.utils
import logging
import os
import re
import tempfile
import threading
import time
import urllib.parse
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, TypeAlias

from shardprep.errors import StorageError
from shardprep.storage.local import storage_errors

# fsspec and tenacity take a while to import, and who has all files at home needs neither.
if TYPE_CHECKING:
    import tenacity

_log = logging.getLogger("shardprep")

PATIENCE = 300.0
"""Seconds for which a call is tried, unless told otherwise."""

CALL_SECONDS = 60.0
"""Seconds that one try of a call may take; more for what is sent, by its size."""

_SLOWEST_UPLOAD = 250_000  # bytes a second
_LONGEST_PAUSE = 10.0

_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*:(?::[a-z0-9+.-]+:)*//")
# Trouble that waiting does not mend, besides mistakes of a program.
_FINAL = (
    FileNotFoundError,
    FileExistsError,
    PermissionError,
    IsADirectoryError,
    NotADirectoryError,
    NotImplementedError,
    AttributeError,
    TypeError,
    ValueError,
    LookupError,
    ImportError,
    MemoryError,
)
_FINAL_NAMES = {
    "NoCredentialsError",
    "NoRegionError",
    "ParamValidationError",
    "PartialCredentialsError",
    "ProfileNotFound",
    "SSOTokenLoadError",
    "TokenRetrievalError",
    "UnauthorizedSSOTokenError",
}
# S3's codes of answers with status 400 that another try need not get.
_PASSING_CODES = {"RequestTimeout", "RequestTimeTooSkewed", "XAmzContentSHA256Mismatch"}
# Of the answers that refuse (4xx), those that a later try need not get.
_PASSING_STATUS = (408, 425, 429)
_BEHIND_THE_END, _ABSENT = 416, (404, 410)
_EXTRAS = {"s3": "s3", "s3a": "s3", "http": "http", "https": "http"}

# How connections are made: time-outs below that of a call, and as many at once as are asked for.
_S3 = {"config_kwargs": {"connect_timeout": 10, "read_timeout": 50, "max_pool_connections": 64}}
_OPTIONS: dict[str, dict[str, Any]] = {"s3": _S3, "s3a": _S3}

# Seconds between two words on troubles, and when the last was said.
_SILENCE = 30.0
_told = -_SILENCE

_lock = threading.Lock()
_filesystems: dict[tuple[int, str], Any] = {}


def _after_fork() -> None:
    # A thread that connects stayed behind, with the lock.
    global _lock
    _lock = threading.Lock()


os.register_at_fork(after_in_child=_after_fork)


@dataclass(frozen=True)
class Remote:
    """A file, or a folder of them, behind a URL; `folder / "name"` is a file in it.

    Every method may raise a StorageError: the store refused, or gave no answer for `patience`
    seconds.

    Attributes:
        url: Without a slash at its end.
        patience: Seconds for which a call is tried.
    """

    url: str
    patience: float = PATIENCE

    def __truediv__(self, name: str) -> Remote:
        # In a web address some characters mean something else, and a name may have them.
        own = urllib.parse.quote(name) if self.is_http else name
        return Remote(f"{self.url}/{own}", self.patience)

    def __str__(self) -> str:
        return self.url

    def __fspath__(self) -> str:
        # For messages; no function of the system opens a URL.
        return self.url

    @property
    def name(self) -> str:
        """What stands behind the last slash."""
        return self.url.rsplit("/", 1)[1]

    @property
    def is_http(self) -> bool:
        """Whether it is a web server's, which can be read only, and lists nothing."""
        return self.url.startswith(("http://", "https://"))

    def read(self, begin: int | None = None, end: int | None = None) -> bytes:
        """The bytes from `begin` to `end`, or all; the whole file where the server has no ranges.

        There are fewer, or none, where the file ends before.

        Raises:
            FileNotFoundError: There is no such file.
        """
        try:
            data: bytes = self._call("cat_file", start=begin, end=end)
        except StorageError as error:
            if begin is None or _status(error.__cause__) != _BEHIND_THE_END:
                raise
            return b""
        return data

    def info(self) -> dict[str, Any]:
        """What the store says of the file: size in bytes, and where it has one an ETag.

        Raises:
            FileNotFoundError: There is no such file.
        """
        found: dict[str, Any] = self._call("info")
        return found

    def version(self) -> tuple[int, str]:
        """Size in bytes of a file, and what its store calls this version of it (or nothing).

        Raises:
            FileNotFoundError: There is no such file.
        """
        found = self.info()
        return int(found["size"]), str(found.get("ETag") or found.get("etag") or "").strip('"')

    def exists(self) -> bool:
        """Whether there is such a file."""
        try:
            self.info()
        except FileNotFoundError:
            return False
        return True

    def listing(self) -> dict[str, dict[str, Any]]:
        """All files below this folder: path within it to what `info` gives; empty if none."""
        try:
            found = self._call("find", detail=True)
        except FileNotFoundError:
            return {}
        # Stores return full paths, of which those below this one are alike up to here.
        here = self._filesystem()._strip_protocol(self.url).rstrip("/") + "/"
        # Some programs mark folders by empty objects whose names end in a slash.
        files = {path.removeprefix(here): info for path, info in found.items()}
        return {name: info for name, info in files.items() if name and not name.endswith("/")}

    def write(self, data: bytes) -> None:
        """Make it a file of these bytes, in one piece."""
        with self.publish() as file:
            file.write(data)

    @contextlib.contextmanager
    def publish(self) -> Iterator[BinaryIO]:
        """Write a file on this machine, and send it when all is written without an error.

        It is there, whole, at the end, or not at all: what stores take in parts appears when the
        last has come.
        """
        self.check_writable()
        here = Path(tempfile.gettempdir())
        with storage_errors(here), tempfile.NamedTemporaryFile(prefix="shardprep-") as file:
            yield file  # type: ignore[misc]
            file.flush()
            seconds = CALL_SECONDS + os.path.getsize(file.name) / _SLOWEST_UPLOAD
            try:
                # An async store is given the method by name, and the path of the file first.
                self._call("put_file", before=(file.name,), seconds=seconds)
            except FileNotFoundError as error:
                raise StorageError(
                    f"there is no such place to write to ({_words(error)})",
                    file=self,
                    remedy="Make the bucket, or name another.",
                ) from None

    def move(self, to: Remote) -> None:
        """Give a file another place in the same store, without sending it."""
        self._call("cp_file", to.url, seconds=10 * CALL_SECONDS)
        self.remove()

    def remove(self) -> None:
        """Remove a file, if it is there."""
        with contextlib.suppress(FileNotFoundError):
            self._call("rm_file")

    def check_writable(self) -> None:
        """Make sure that the store can be written to at all. StorageError if it cannot."""
        if self.is_http:
            raise StorageError(
                "a web server can be read only",
                file=self,
                remedy="Write to a folder, or to an object store such as s3://BUCKET/NAME.",
            )

    def _filesystem(self) -> Any:
        """The file system of fsspec; one a process and store, for all threads."""
        protocol = self.url.split("://")[0]
        key = os.getpid(), "/".join(self.url.split("/", 3)[:3])
        with _lock:
            if key not in _filesystems:
                _filesystems[key] = self._connect(protocol)
            return _filesystems[key]

    def _connect(self, protocol: str) -> Any:
        import fsspec

        if self.is_http and re.search(r"[?#]", self.url):
            raise StorageError(
                "has a query or a fragment, behind which no file of a folder can be named",
                file=self,
                remedy="Give the address of the folder alone.",
            )
        options: dict[str, Any] = {"use_listings_cache": False, "skip_instance_cache": True}
        for name, value in _OPTIONS.get(protocol, {}).items():
            # What the user's configuration of fsspec says goes first.
            options[name] = {**value, **fsspec.config.conf.get(protocol, {}).get(name, {})}
        try:
            return fsspec.core.url_to_fs(self.url, **options)[0]
        except ImportError as error:
            extra = _EXTRAS.get(protocol)
            fix = f"pip install 'shardprep[{extra}]'" if extra else "Install it."
            raise StorageError(
                f"takes a package that is not installed ({error})", file=self, remedy=fix
            ) from None
        except ValueError as error:
            raise StorageError(f"is no URL that fsspec knows ({error})", file=self) from None

    def _call(
        self, method: str, *after: Any, before: tuple[Any, ...] = (),
        seconds: float | None = None,
        **options: Any,
    ) -> Any:  # fmt: skip
        """Call a method of the file system on this URL until it succeeds, or there is no hope."""
        import tenacity

        attempts = tenacity.Retrying(
            stop=tenacity.stop_after_delay(self.patience),
            wait=tenacity.wait_random_exponential(multiplier=0.1, max=_LONGEST_PAUSE),
            retry=tenacity.retry_if_exception(_may_pass),
            before_sleep=self._tell,
            reraise=True,
        )
        system = self._filesystem()
        try:
            return attempts(
                _timed(system, method, seconds or CALL_SECONDS),
                *before,
                self.url,
                *after,
                **options,
            )
        except (FileNotFoundError, StorageError):
            raise
        except Exception as error:
            waited = f" for {self.patience:.0f} s" if _may_pass(error) else ""
            raise StorageError(
                f"the store refused or gave no answer{waited} ({_words(error)})",
                file=self,
                remedy="Check the address, the credentials and the network, then run the same "
                "command again.",
            ) from error

    def _tell(self, state: tenacity.RetryCallState) -> None:
        # One failure in a while is nothing to speak of, and many calls may fail together.
        global _told
        if state.attempt_number >= 5 and state.outcome is not None:
            with _lock:
                if time.monotonic() < _told + _SILENCE:
                    return
                _told = time.monotonic()
            error = _words(state.outcome.exception())
            _log.warning("%s: %s; trying for %.0f s", self.url, error, self.patience)


def modified_ns(info: dict[str, Any]) -> int:
    """When a file was modified, by what its store says of it [ns since the epoch]; 0 if unknown."""
    for name in ("LastModified", "last_modified", "updated", "mtime", "created"):
        found = info.get(name)
        if isinstance(found, int | float):
            return int(found * 1e9)
        if isinstance(found, datetime.datetime):
            return int(found.timestamp() * 1e9)
    # What a web server says.
    with contextlib.suppress(ValueError):
        said = email.utils.parsedate_to_datetime(str(info.get("Last-Modified", "")))
        return int(said.timestamp() * 1e9)
    return 0


def forget_connections() -> None:
    """Have stores connected to anew, by what the environment says of them by then."""
    with _lock:
        _filesystems.clear()


Location: TypeAlias = Path | Remote


def locate(place: str | os.PathLike[str]) -> Location:
    """A path on this machine, or what lies behind a URL such as s3://BUCKET/NAME."""
    if isinstance(place, Remote):
        return place
    text = os.fspath(place)
    if text.startswith("file://"):
        return Path(text.removeprefix("file://"))
    return Remote(text.rstrip("/")) if _URL.match(text) else Path(text)


def _timed(system: Any, method: str, seconds: float) -> Callable[..., Any]:
    """A method of a file system, with a time-out where it has one."""
    from fsspec.asyn import AsyncFileSystem, sync

    if not isinstance(system, AsyncFileSystem):
        call: Callable[..., Any] = getattr(system, method)
        return call

    def timed(*arguments: Any, **options: Any) -> Any:
        function = getattr(system, f"_{method}")
        try:
            return sync(system.loop, function, *arguments, timeout=seconds, **options)
        except FileNotFoundError as error:
            # Of a web server, fsspec says so whatever has failed.
            cause = error.__cause__
            if "http" not in system.protocol or cause is None or _status(cause) in _ABSENT:
                raise
            raise cause from None

    return timed


def _may_pass(error: BaseException) -> bool:
    """Whether a call that failed so may succeed later."""
    if isinstance(error, (*_FINAL, StorageError)) or not isinstance(error, Exception):
        return False
    status = _status(error)
    if isinstance(status, int) and 300 <= status < 500:
        code = _answer(error).get("Error", {}).get("Code")
        return status in _PASSING_STATUS or code in _PASSING_CODES
    return type(error).__name__ not in _FINAL_NAMES


def _answer(error: BaseException | None) -> dict[str, Any]:
    """What S3 has answered, of which botocore made the cause of an error; else nothing."""
    answer = getattr(error and error.__cause__, "response", None)
    return answer if isinstance(answer, dict) else {}


def _status(error: BaseException | None) -> int | None:
    """HTTP status of the answer that was an error to aiohttp, or to botocore; None if unknown."""
    said = getattr(error, "status", None)
    status: int | None = _answer(error).get("ResponseMetadata", {}).get("HTTPStatusCode", said)
    return status


def _words(error: BaseException | None) -> str:
    return f"{type(error).__name__}: {error}"[:300].rstrip(": ")
