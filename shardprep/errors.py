"""Every error that shardprep raises on bad input, with the exit code of the command line.

ShardprepError
├── SourceError        3  the data set to pack has a fault
├── FormatError        4  not a shard folder
│   └── VersionError   4  a shard folder of a version that this release cannot read
├── CorruptShardError  1  a shard, an index or the manifest was read and is damaged, or is missing
├── BuildError         5  the build cannot start or continue
├── StorageError       6  the machine or a store refused (permissions, limits, mount, disk, network)
├── MissingExtraError  2  a package is not installed; the message names the extra
└── PlatformError      2  this operating system lacks what shardprep needs

Exit code 0 is success and 2 a usage error; 130 and 143 stand for Ctrl-C and SIGTERM.
"""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Iterator

_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f]")

REPAIR = (
    "`shardprep verify DST --deep` names all damage, and `shardprep repair DST --source Dataset/` "
    "repairs it."
)
"""Remedy for a damaged set in a folder."""

RESTORE = (
    "Its tars belong to another program, and are not changed here: restore the tar that "
    "`shardprep verify DST --deep` names, or run `shardprep adopt TARS... DST --overwrite`."
)
"""Remedy for a damaged set of adopted tars."""

REBUILD = (
    "`shardprep verify URL --deep` names all damage in the store, and `shardprep build SRC URL "
    "--overwrite` builds the set again."
)
"""Remedy for a damaged set behind a URL."""

CRC_FAULT = "the stored bytes do not match their crc32"
"""What is wrong with an utterance whose stored bytes have changed."""


class ShardprepError(Exception):
    """Base of all errors of this package.

    Args:
        what: What is wrong, as a clause without a full stop.
        file: The file or folder that it concerns.
        key: The utterance or the field that it concerns.
        remedy: What the user can do about it, as a sentence.
    """

    exit_code = 1

    def __init__(
        self,
        what: str,
        *,
        file: str | os.PathLike[str] | None = None,
        key: str | None = None,
        remedy: str | None = None,
    ) -> None:
        super().__init__(what)
        self.what = what
        self.file = None if file is None else os.fspath(file)
        self.key = key
        self.remedy = remedy

    def __str__(self) -> str:
        where = ": ".join(part for part in (self.file, self.key) if part)
        text = f"{where}: {self.what}" if where else self.what
        # Names come from files. They must not move the cursor of a terminal.
        text = _CONTROL.sub(lambda found: ascii(found[0])[1:-1], text)
        return f"{text}. {self.remedy}" if self.remedy else text

    def __reduce__(self) -> tuple[object, ...]:
        # A worker process pickles its errors, and keyword arguments must survive that.
        return _rebuild, (type(self), self.what, self.file, self.key, self.remedy)


def _rebuild(
    kind: type[ShardprepError], what: str, file: str | None, key: str | None, remedy: str | None
) -> ShardprepError:
    return kind(what, file=file, key=key, remedy=remedy)


class SourceError(ShardprepError):
    """The data set to pack has a fault."""

    exit_code = 3


class FormatError(ShardprepError):
    """Not a shard folder, or one of a version that this release cannot read: a VersionError."""

    exit_code = 4


class VersionError(FormatError):
    """A set of a version that this release cannot read; nothing is wrong with the set."""


class CorruptShardError(ShardprepError):
    """A shard, an index or the manifest was read and is damaged, or is missing."""

    exit_code = 1


class BuildError(ShardprepError):
    """The build cannot start or continue."""

    exit_code = 5


class StorageError(ShardprepError):
    """The machine or a store refused, for the time being: nothing is known about the data.

    Permissions, limits of the process, memory, a mount, a disk that is full or fails; or a store
    that does not answer. `shardprep.storage.trouble` decides which errors these are.
    """

    exit_code = 6


class MissingExtraError(ShardprepError, ImportError):
    """A package is not installed; the message names the extra of shardprep that brings it."""

    exit_code = 2


class PlatformError(ShardprepError):
    """This operating system lacks what shardprep needs; nothing was made."""

    exit_code = 2


@contextlib.contextmanager
def needs(extra: str) -> Iterator[None]:
    """Import packages that only an extra brings.

        with needs("torch"):
            import torch

    Args:
        extra: Name of the extra, as in `pip install 'shardprep[torch]'`.

    Raises:
        MissingExtraError: One of the packages is not installed.
    """
    try:
        yield
    except ModuleNotFoundError as error:
        package = (error.name or "shardprep").partition(".")[0]
        if package.startswith("shardprep"):
            raise
        raise MissingExtraError(
            f"the package {package} is not installed",
            remedy=f"Run: pip install 'shardprep[{extra}]'",
        ) from error
