"""The work folder in a shard folder, with the lock that lets only one build or repair write."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

from shardprep.errors import BuildError
from shardprep.format.manifest import REPAIR_FOLDER, WORK_FOLDER
from shardprep.storage.local import remove_folder
from shardprep.storage.lock import LockHeldError, hold_lock

_LOCK_NAME = "lock"


@contextlib.contextmanager
def locked(target: Path) -> Iterator[Path]:
    """Make the work folder of `target`, if necessary, and hold its lock.

    Yields:
        The work folder.

    Raises:
        BuildError: Another build or repair holds the lock, or the work folder is a link.
    """
    folder = target / WORK_FOLDER
    for path in (folder, folder / _LOCK_NAME, target / REPAIR_FOLDER):
        if path.is_symlink():
            raise BuildError(
                "is a link, and nothing is written or removed where it leads",
                file=path,
                remedy="Remove it.",
            )
    with contextlib.ExitStack() as held:
        try:
            held.enter_context(hold_lock(folder / _LOCK_NAME))
        except LockHeldError as error:
            raise BuildError(
                f"another build or repair is running in this folder: it {error.what}",
                file=target,
                remedy=error.remedy,
            ) from None
        yield folder
    # A file that was open kept the folder; see `remove_folder`.
    with contextlib.suppress(OSError):
        folder.rmdir()


def remove_if_unused(folder: Path) -> None:
    """Remove a work folder that contains nothing but the lock; the caller holds the lock."""
    if all(path.name.startswith(_LOCK_NAME) for path in folder.iterdir()):
        remove_folder(folder)
