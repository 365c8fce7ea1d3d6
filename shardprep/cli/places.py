"""Arguments that name a folder of this machine, or the URL of one."""

from __future__ import annotations

import contextlib
import os

import click

from shardprep.source.scan import LISTS
from shardprep.storage.remote import Location, Remote, locate
from shardprep.storage.trouble import machine_errors


# Generic for type checkers, but for Python only since click 8.4.
class Place(click.ParamType):  # type: ignore[type-arg]
    """A folder or a URL, as `shardprep.storage.remote.locate` gives it.

    Args:
        exists: Whether a folder must exist. A URL is not checked before it is read.
        lists: Whether a file that lists a source may be named in place of a folder.
    """

    name = "folder"

    def __init__(self, *, exists: bool = True, lists: bool = False) -> None:
        # A folder that may not be read is trouble of the machine, not wrong usage.
        self._lists = lists
        self._path = click.Path(exists=exists, file_okay=False, readable=False)

    def convert(
        self, value: object, param: click.Parameter | None, ctx: click.Context | None
    ) -> Location:
        """Check a folder; leave a URL unchecked. StorageError if nobody can tell now."""
        place = locate(str(value))
        if not isinstance(place, Remote):
            # click takes every error for a folder that does not exist.
            with contextlib.suppress(OSError), machine_errors(place):
                os.stat(place)
            if self._lists and place.name.endswith(LISTS) and os.path.isfile(place):
                return place
            if os.path.isfile(place):
                lists = f", or a list ({', '.join(LISTS)})" if self._lists else ""
                self.fail(f"{place} is a file; name its folder, {place.parent}{lists}", param, ctx)
            self._path.convert(str(place), param, ctx)
        return place
