"""Files behind URLs, through fsspec: each call has a time-out, and is retried if that may help.

No answer, a broken connection, or a server that is busy or down may pass: such a call is retried
after random, growing pauses, until it has failed for `patience` seconds. No such file, or no
permission, does not pass: that is an error at once. `shardprep.storage.failures` knows which is
which.
"""

from __future__ import annotations

import contextlib
import datetime
import email.utils
import logging
import os
import re
import tempfile
import time
import urllib.parse
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, TypeAlias

from shardprep.errors import StorageError
from shardprep.storage.connections import filesystem, timed
from shardprep.storage.failures import AFTER_THE_END, http_status, in_words, may_pass
from shardprep.storage.local import temporary_place
from shardprep.storage.trouble import NO_SPACE, OF_PROCESS, remedy_of, storage_errors
from shardprep.system import check_supported

# fsspec and tenacity take a while to import, and a set in a folder needs neither.
if TYPE_CHECKING:
    import tenacity

_log = logging.getLogger("shardprep")

PATIENCE = 300.0
"""Seconds for which a call is tried, unless told otherwise."""

CALL_SECONDS = 60.0
"""Seconds that one try of a call may take; an upload may take longer, by its size."""

_SLOWEST_UPLOAD = 250_000  # bytes a second
_LONGEST_PAUSE = 10.0

_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*:(?::[a-z0-9+.-]+:)*//")

# Seconds between two warnings of failing calls, and when the last one was logged.
_SILENCE = 30.0
_warned = -_SILENCE


@dataclass(frozen=True)
class Remote:
    """A file or a folder behind a URL; `folder / "name"` is a file in the folder.

    Every method may raise a StorageError: the store refused, or gave no answer for `patience`
    seconds.

    Attributes:
        url: The URL, without a slash at its end.
        patience: Seconds for which a call is tried.
    """

    url: str
    patience: float = PATIENCE

    def __truediv__(self, name: str) -> Remote:
        # A name may have characters that mean something else in a web address.
        own = urllib.parse.quote(name) if self.is_http else name
        return Remote(f"{self.url}/{own}", self.patience)

    def __str__(self) -> str:
        return self.url

    def __fspath__(self) -> str:
        # For messages: no function of the operating system opens a URL.
        return self.url

    @property
    def name(self) -> str:
        """The part after the last slash."""
        return self.url.rsplit("/", 1)[1]

    @property
    def is_http(self) -> bool:
        """Whether a web server has it, which can only be read from, and which has no listing."""
        return self.url.startswith(("http://", "https://"))

    def read(self, begin: int | None = None, end: int | None = None) -> bytes:
        """The bytes from `begin` to `end`, or all; the whole file if the server has no ranges.

        There are fewer, or none, if the file ends before `end`.

        Raises:
            FileNotFoundError: There is no such file.
        """
        try:
            data: bytes = self._call("cat_file", start=begin, end=end)
        except StorageError as error:
            if begin is None or http_status(error.__cause__) != AFTER_THE_END:
                raise
            return b""
        return data

    def info(self) -> dict[str, Any]:
        """What the store says of the file: its size in bytes, its ETag if it has one, and more.

        Raises:
            FileNotFoundError: There is no such file.
        """
        found: dict[str, Any] = self._call("info")
        return found

    def version(self) -> tuple[int, str]:
        """Size of a file in bytes, and the ETag of this version of it; "" if it has none.

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
        """All files below this folder: path within the folder to what `info` gives."""
        try:
            found = self._call("find", detail=True)
        except FileNotFoundError:
            return {}
        # Stores return full paths, which all begin with the path of this folder.
        here = filesystem(self.url)._strip_protocol(self.url).rstrip("/") + "/"
        # Some programs mark a folder by an empty object whose name ends in a slash.
        files = {path.removeprefix(here): info for path, info in found.items()}
        return {name: info for name, info in files.items() if name and not name.endswith("/")}

    def write(self, data: bytes) -> None:
        """Write a file that has these bytes."""
        with self.publish() as file:
            file.write(data)

    @contextlib.contextmanager
    def publish(self) -> Iterator[BinaryIO]:
        """Write a file on this machine first, and send it after a clean finish.

        The store then has the complete file, or none: a file that is sent in parts appears with
        its last part.
        """
        self.check_writable()
        with (
            storage_errors(temporary_place()),
            tempfile.NamedTemporaryFile(prefix="shardprep-") as file,
        ):
            yield file  # type: ignore[misc]
            file.flush()
            seconds = CALL_SECONDS + os.path.getsize(file.name) / _SLOWEST_UPLOAD
            try:
                # put_file takes the path of the file first.
                self._call("put_file", before=(file.name,), seconds=seconds)
            except FileNotFoundError as error:
                raise StorageError(
                    f"there is no such place to write to ({in_words(error)})",
                    file=self,
                    remedy="Make the bucket, or name another.",
                ) from None

    def move(self, to: Remote) -> None:
        """Move a file within its store, without sending it."""
        self._call("cp_file", to.url, seconds=10 * CALL_SECONDS)
        self.remove()

    def remove(self) -> None:
        """Remove a file, if there is one."""
        with contextlib.suppress(FileNotFoundError):
            self._call("rm_file")

    def check_writable(self) -> None:
        """StorageError if the store cannot be written to at all."""
        if self.is_http:
            raise StorageError(
                "a web server can be read only",
                file=self,
                remedy="Write to a folder, or to an object store such as s3://BUCKET/NAME.",
            )

    def _call(
        self, method: str, *after: Any, before: tuple[Any, ...] = (),
        seconds: float | None = None,
        **options: Any,
    ) -> Any:  # fmt: skip
        """Call a method of the file system on this URL; retry it while that may help."""
        import tenacity

        attempts = tenacity.Retrying(
            stop=tenacity.stop_after_delay(self.patience),
            wait=tenacity.wait_random_exponential(multiplier=0.1, max=_LONGEST_PAUSE),
            retry=tenacity.retry_if_exception(may_pass),
            before_sleep=self._warn,
            reraise=True,
        )
        system = filesystem(self.url)
        try:
            return attempts(
                timed(system, method, seconds or CALL_SECONDS),
                *before,
                self.url,
                *after,
                **options,
            )
        except (FileNotFoundError, StorageError):
            raise
        except Exception as error:
            waited = f" for {self.patience:.0f} s" if may_pass(error) else ""
            remedy = (
                "Check the address, the credentials and the network, then run the same command "
                "again."
            )
            if isinstance(error, OSError) and error.errno in OF_PROCESS | NO_SPACE:
                remedy = remedy_of(error)
            raise StorageError(
                f"the store refused or gave no answer{waited} ({in_words(error)})",
                file=self,
                remedy=remedy,
            ) from error

    def _warn(self, state: tenacity.RetryCallState) -> None:
        # A few failures are usual, and many calls may fail together.
        global _warned
        if state.attempt_number >= 5 and state.outcome is not None:
            if time.monotonic() < _warned + _SILENCE:
                return
            _warned = time.monotonic()
            error = in_words(state.outcome.exception())
            _log.warning("%s: %s; trying for %.0f s", self.url, error, self.patience)


def modified_ns(info: dict[str, Any]) -> int:
    """When a file was modified, by its store's `info` [ns since the epoch]; 0 if unknown."""
    for name in ("LastModified", "last_modified", "updated", "mtime", "created"):
        found = info.get(name)
        if isinstance(found, int | float):
            return int(found * 1e9)
        if isinstance(found, datetime.datetime):
            return int(found.timestamp() * 1e9)
    # A web server's header.
    with contextlib.suppress(ValueError):
        said = email.utils.parsedate_to_datetime(str(info.get("Last-Modified", "")))
        return int(said.timestamp() * 1e9)
    return 0


Location: TypeAlias = Path | Remote


def locate(place: str | os.PathLike[str]) -> Location:
    """A path on this machine, or the `Remote` of a URL such as s3://BUCKET/NAME.

    Raises:
        PlatformError: This system can read no shards.
    """
    check_supported()
    if isinstance(place, Remote):
        return place
    text = os.fspath(place)
    if text.startswith("file://"):
        return Path(text.removeprefix("file://"))
    return Remote(text.rstrip("/")) if _URL.match(text) else Path(text)
