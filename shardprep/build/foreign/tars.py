"""Which tars a user means, and to which split each belongs."""

from __future__ import annotations

import glob
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from braceexpand import braceexpand

from shardprep.errors import BuildError, SourceError
from shardprep.storage.local import exists
from shardprep.storage.remote import Remote, locate
from shardprep.storage.trouble import storage_errors

# Words in the name of a tar, or of its folder, that say its split.
_WORDS = {
    "train": "train",
    "training": "train",
    "val": "val",
    "valid": "val",
    "validation": "val",
    "dev": "val",
    "test": "test",
    "testing": "test",
}
SPLITS = ("train", "val", "test")
_COMPRESSED = re.compile(r"\.(?:tar\.(?:gz|zst|bz2|xz|lz4|Z)|tgz|tbz2?|txz|tzst)$", re.IGNORECASE)
_TAR = re.compile(r"\.tar$", re.IGNORECASE)


@dataclass(frozen=True)
class ForeignTar:
    """A tar to adopt.

    Attributes:
        path: Where it is; no link.
        shown: Its path as the user knows it, absolute.
        split: "train", "val" or "test".
    """

    path: str
    shown: str
    split: str


def find_tars(
    named: Sequence[str | os.PathLike[str]],
    destination: Path,
    *,
    split: str | None = None,
    val: Sequence[str | os.PathLike[str]] = (),
    test: Sequence[str | os.PathLike[str]] = (),
) -> list[ForeignTar]:
    """The tars that a user names, each once, in the order of the names.

    Args:
        named: Files, folders, brace patterns such as "{000000..000009}.tar", or globs.
        destination: The place of the set; tars in it do not count.
        split: The split of all `named`; None to go by the names of the files and folders.
        val: Tars of the split val, named likewise.
        test: Tars of the split test.

    Raises:
        SourceError: There is no such tar, or one is compressed.
        BuildError: A tar lies behind a URL or in the destination, or names no one split.
    """
    inside = str(destination.resolve()) + os.sep
    wanted = [(path, "val") for path in _paths(val, destination)]
    wanted += [(path, "test") for path in _paths(test, destination)]
    wanted += [(path, split or "") for path in _paths(named, destination)]
    found: dict[str, ForeignTar] = {}
    for shown, chosen in wanted:
        if _COMPRESSED.search(shown):
            raise SourceError(
                "is compressed, and a compressed file cannot be mapped",
                file=shown,
                remedy="Decompress it (gunzip, unzstd, bunzip2, unxz), and name the plain tar.",
            )
        with storage_errors(shown):
            path = os.path.realpath(shown)
        if path.startswith(inside):
            raise BuildError(
                "lies in the folder that is to hold the set",
                file=shown,
                remedy="Name another folder for the set: it gets links to the tars.",
            )
        if path not in found:
            found[path] = ForeignTar(path, shown, chosen or split_of_name(shown))
    if not found:
        raise SourceError(
            "there is no tar",
            file=str(named[0]) if named else None,
            remedy="Name tars, folders with tars, or a pattern such as '{000000..000009}.tar'.",
        )
    return list(found.values())


def split_of_name(path: str) -> str:
    """The split that the name of a tar says, or else that of its folder; "train" if neither does.

    Raises:
        BuildError: A name says two splits.
    """
    name = Path(path)
    for part in (_TAR.sub("", name.name), name.parent.name):
        said = {_WORDS[word] for word in re.findall("[a-z]+", part.lower()) if word in _WORDS}
        if len(said) > 1:
            raise BuildError(
                f"its name says two splits, {' and '.join(sorted(said))}",
                file=path,
                remedy="Say which with --split, --val or --test.",
            )
        if said:
            return said.pop()
    return "train"


def _paths(named: Sequence[str | os.PathLike[str]], destination: Path) -> Iterator[str]:
    """Absolute paths of the tars that are named."""
    for one in named:
        if isinstance(locate(one), Remote):
            raise BuildError(
                "lies behind a URL, and only files of this machine can be adopted",
                file=os.fspath(one),
                remedy="Copy the tars here first, or mount the store.",
            )
        yield from _expanded(os.path.abspath(one), destination)


def _expanded(path: str, destination: Path) -> Iterator[str]:
    """The tars of a file, a folder, a brace pattern or a glob."""
    with storage_errors(path):
        if exists(Path(path)):
            yield from _in_folder(path, destination) if os.path.isdir(path) else [path]
            return
    try:
        others = list(braceexpand(path)) if "{" in path else sorted(glob.glob(path, recursive=True))
    except ValueError as error:
        raise SourceError(f"is no brace pattern: {error}", file=path) from None
    if not others or others == [path]:
        raise SourceError("does not exist", file=path, remedy="Check the name, or mount its disk.")
    for other in others:
        yield from _expanded(other, destination)


def _in_folder(folder: str, destination: Path) -> Iterator[str]:
    """The tars in a folder and below it; hidden files and folders do not count."""
    for place, folders, files in os.walk(folder, onerror=_raise):
        folders[:] = sorted(
            name
            for name in folders
            if not name.startswith(".") and Path(place, name).resolve() != destination.resolve()
        )
        for name in sorted(files):
            if not name.startswith(".") and (_TAR.search(name) or _COMPRESSED.search(name)):
                yield os.path.join(place, name)


def _raise(error: OSError) -> None:
    raise error
