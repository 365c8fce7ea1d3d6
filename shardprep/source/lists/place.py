"""The file that lists a source, and the folder in which it lies."""

from __future__ import annotations

import os
from pathlib import Path

from shardprep.errors import SourceError
from shardprep.storage.local import read_at_most
from shardprep.storage.remote import Location, Remote
from shardprep.storage.trouble import machine_errors

MOST_LIST_BYTES = 512 << 20
_MOST_ROWS = 4_000_000


def folder_of(place: Location) -> Location:
    """The folder of a file."""
    if isinstance(place, Remote):
        return Remote(place.url.rstrip("/").rpartition("/")[0])
    return place.parent


def check_rows(count: int, place: Location) -> None:
    """SourceError if a list has far too many rows: short ones take a hundred times their bytes."""
    if count > _MOST_ROWS:
        raise SourceError(
            f"has more than {_MOST_ROWS} rows", file=place, remedy="Split it into several."
        )


def read_listing(place: Location) -> bytes:
    """The bytes of a list, of at most `MOST_LIST_BYTES`.

    Raises:
        SourceError: There is no such file, or it is too large.
        StorageError: The machine cannot read it now, or the store gives no answer.
    """
    try:
        if isinstance(place, Remote):
            data = place.read(0, MOST_LIST_BYTES + 1)
            if len(data) > MOST_LIST_BYTES:
                raise SourceError(f"has more than {MOST_LIST_BYTES} bytes", file=place)
            return data
        with machine_errors(place):
            return read_at_most(Path(os.path.abspath(place)), MOST_LIST_BYTES)
    except FileNotFoundError:
        raise SourceError("does not exist", file=place) from None
    except OSError as error:
        raise SourceError(f"cannot be read: {error.strerror}", file=place) from None
