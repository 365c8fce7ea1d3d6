"""What lies beside the files of a set: shards and indexes that it does not have, and other files.

Programs that take `*.tar`, or all files of a folder, would read a stray shard with the others. No
reader takes README.md, .DS_Store or a folder of notes for a part of the set.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from pathlib import Path

from shardprep.build.work import is_ours_and_complete
from shardprep.check.report import BY_HAND, Fault
from shardprep.format.card import CARD_NAME
from shardprep.format.manifest import (
    MANIFEST_NAME,
    REJECTS_NAME,
    REPAIR_FOLDER,
    SET_ASIDE_FOLDER,
    SOURCE_TIMES_NAME,
    WORK_FOLDER,
    Manifest,
)
from shardprep.format.source_times import is_damaged, times_size
from shardprep.storage.local import read_at_most
from shardprep.storage.remote import Location, Remote
from shardprep.storage.sniff import refuse_stand_in
from shardprep.storage.trouble import machine_errors, storage_errors

_OWN = (MANIFEST_NAME, CARD_NAME, SOURCE_TIMES_NAME, WORK_FOLDER, REPAIR_FOLDER, SET_ASIDE_FOLDER)
_MOST_NAMED = 5
# No line of rejects.jsonl is shorter.
_SHORTEST_LINE = 40


def names_in(folder: Path) -> list[str]:
    """The names in a folder, and the paths of all files in the folders in it that are not hidden.

    Raises:
        StorageError: The machine cannot read the folder.
    """
    with storage_errors(folder):
        found = sorted(os.listdir(folder))
    # A link may lead anywhere, and is not followed.
    for top in [folder / name for name in found if not _is_hidden(name)]:
        for place, folders, files in () if top.is_symlink() else os.walk(top):
            folders[:] = [name for name in folders if not _is_hidden(name)]
            found.extend(os.path.relpath(os.path.join(place, name), folder) for name in files)
    return found


def stray_faults(names: Iterable[str], manifest: Manifest, repairable: bool) -> Iterator[Fault]:
    """Files that readers may take for a part of a set, but that it does not have.

    Args:
        names: What is in the place, as `names_in` gives it.
        manifest: Manifest of the set.
        repairable: Whether `shardprep repair` works there.
    """
    infos = manifest.files()
    for name in names:
        if name not in infos and _is_stray(name):
            remedy = BY_HAND
            if repairable and is_ours_and_complete(name):
                remedy = "`shardprep repair` removes it"
            yield Fault(
                name, "", f"does not belong to the set, and some readers would read it; {remedy}"
            )


def notes_on_others(names: Iterable[str], manifest: Manifest) -> Iterator[str]:
    """Notes on the files beside a set that no reader takes for a part of it."""
    infos = manifest.files()
    tops = {name.split("/")[0]: None for name in names if name not in infos and not _is_stray(name)}
    others = [top for top in tops if top not in _OWN and top not in infos and not _is_stray(top)]
    if others:
        more = f" and {len(others) - _MOST_NAMED} more" if len(others) > _MOST_NAMED else ""
        yield f"no part of the set, left alone: {', '.join(others[:_MOST_NAMED])}{more}"


def times_fault(place: Location, manifest: Manifest) -> Fault | None:
    """What is wrong with source-times.npy, which may be missing.

    Raises:
        StorageError: The machine cannot read it now.
    """
    path = place / SOURCE_TIMES_NAME
    utterances = sum(split.samples for split in manifest.splits.values())
    lines = 0 if manifest.rejects is None else manifest.rejects.bytes // _SHORTEST_LINE
    most = times_size(utterances + lines)
    try:
        if isinstance(path, Remote):
            data = path.read(0, most + 1)
        else:
            with machine_errors(path):
                data = read_at_most(path, most)
    except FileNotFoundError:
        return None
    except OSError:
        # It is a folder or a pipe, or far too large.
        data = b""
    refuse_stand_in(data, path)
    if len(data) > most or is_damaged(data):
        what = "is damaged; remove it: the next build then compares the data set with the shards"
        return Fault(SOURCE_TIMES_NAME, "", what)
    return None


def _is_stray(name: str) -> bool:
    *folders, base = name.split("/")
    # What webdataset globs and Hugging Face `datasets` leave out.
    if any(map(_is_hidden, (*folders, base))) or any(part.startswith("__") for part in folders):
        return False
    if base.lower().endswith(".tar"):
        return True
    return not folders and (base.endswith(".index.npy") or base == REJECTS_NAME)


def _is_hidden(name: str) -> bool:
    return name.startswith(".")
