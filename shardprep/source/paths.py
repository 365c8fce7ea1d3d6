"""The path of an utterance's file: from what the metadata say to its place, and its key.

Metadata are written on other machines too: with backslashes, with absolute paths, in the other form
of Unicode. What means one file of the data set for certain is taken; the rest is refused with the
reason and a way that works.
"""

from __future__ import annotations

import os
import posixpath
import re
import unicodedata
from collections.abc import Iterator

from shardprep.format.index import key_fault
from shardprep.source.metadata import METADATA, MOST_SHOWN
from shardprep.storage.remote import Location, Remote

_CONTROL = re.compile(r"[\x00-\x1f\x7f]")
_DRIVE = re.compile(r"[A-Za-z]:/")
_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://")
_AUDIO = (".wav", ".flac", ".mp3", ".m4a", ".ogg", ".opus", ".aac", ".sph")


class OutsideError(ValueError):
    """A path leads out of the data set.

    Args:
        what: What is wrong with the path, as a clause.
        path: The path, with forward slashes.
        listing: The file that has the path.
    """

    def __init__(self, what: str, path: str, listing: str) -> None:
        super().__init__(f"{what}; write paths relative to the folder of {listing}")
        self.what = what
        self.path = path


class Roots:
    """The folder of a data set, by all names that an absolute path may begin with.

    Args:
        root: Folder or URL.
        listing: Name of the file that lists the paths, for messages.
    """

    def __init__(self, root: Location, listing: str = METADATA) -> None:
        self.listing = listing
        if isinstance(root, Remote):
            names = [root.url]
        else:
            names = [os.path.abspath(root), os.path.realpath(root)]
        self._names = tuple(name.rstrip("/") + "/" for name in dict.fromkeys(names))

    def inner(self, path: str) -> str | None:
        """The rest of an absolute path below the folder; None if it leads elsewhere."""
        name = next((name for name in self._names if path.startswith(name)), None)
        return None if name is None else path[len(name) :].lstrip("/")


def relative_path(path: str, roots: Roots) -> str:
    """The place of a file in its data set, with forward slashes and without detours.

    Args:
        path: As in the metadata.
        roots: The folder of the data set.

    Raises:
        OutsideError: The path leads outside; in words for `Reject.reason`, as the next one.
        ValueError: The path cannot be a path.
    """
    if len(path) > MOST_SHOWN:
        raise ValueError(f"the path has {len(path)} characters, expected at most {MOST_SHOWN}")
    if found := _CONTROL.search(path):
        raise ValueError(
            f"the path has the control character {found[0]!a}; remove it, or write / if a "
            "backslash was meant"
        )
    plain = path.replace("\\", "/")
    absolute = plain.startswith("/") or _DRIVE.match(plain) or _URL.match(plain)
    if absolute:
        inner = roots.inner(path if _URL.match(path) else plain)
        if inner is None:
            raise OutsideError(
                "the path is absolute and leads outside the data set", plain, roots.listing
            )
        plain = inner
    plain = posixpath.normpath(plain)
    if plain == ".." or plain.startswith("../"):
        raise OutsideError("the path leads outside the data set", plain, roots.listing)
    return plain


def key_of(relative: str, suffixes: tuple[str, ...] = (".pt",)) -> str:
    """The key of an utterance: the path of its file without `.pt`.

    Args:
        relative: The path, by `relative_path`.
        suffixes: What the name of a file may end in.

    Raises:
        ValueError: Readers of shards would not take the key; in words for `Reject.reason`.
    """
    key, suffix = split_suffix(relative, suffixes)
    if fault := key_fault(key, suffix):
        raise ValueError(fault)
    return key


def split_suffix(relative: str, suffixes: tuple[str, ...]) -> tuple[str, str]:
    """A path without its suffix, and the suffix. ValueError if the path has none of those."""
    for suffix in suffixes:
        if relative.endswith(suffix):
            return relative.removesuffix(suffix), suffix
    raise ValueError(_wrong_suffix(relative, " or ".join(suffixes)))


def check_key(key: object) -> str:
    """The key that a program or a list gives to an utterance.

    Raises:
        ValueError: Readers of shards would not take it; in words for `Reject.reason`.
    """
    if not isinstance(key, str):
        raise ValueError(f"the key is {key!r:.60}, expected a text")
    if fault := key_fault(key, None):
        raise ValueError(fault)
    if key.startswith("/") or posixpath.normpath(key) != key or key.split("/")[0] == "..":
        raise ValueError("the key is no plain path; write it as in folder/name")
    return key


def spellings(path: str, relative: str) -> Iterator[str]:
    """Other names under which a file may lie: each means the same file, if it is there.

    Args:
        path: As in the metadata.
        relative: The same, by `relative_path`.
    """
    literal = posixpath.normpath(path)
    if "\\" in path and not literal.startswith(("/", "../")):
        # A zip file made on Windows, unpacked elsewhere: the backslashes are part of the name.
        yield literal
    if not relative.isascii():
        # macOS takes names apart into letters and accents.
        for form in ("NFC", "NFD"):
            yield unicodedata.normalize(form, relative)


def _wrong_suffix(relative: str, expected: str) -> str:
    name = relative.rsplit("/", 1)[-1]
    suffix = os.path.splitext(name)[1].lower()
    what = f"the file name does not end in {expected}"
    if name != name.rstrip():
        return "the file name ends in a space; remove it in the metadata"
    if suffix == ".pt":
        return f"{what} but in {name[-3:]}; rename the file and its entry"
    if suffix in (".pth", ".pkl", ".bin", ".tensor"):
        return f"{what} but in {suffix}; rename the file and its entry"
    if suffix in (".npy", ".npz"):
        return f"{what} but in {suffix}; save it with torch.save(torch.from_numpy(array))"
    if suffix in _AUDIO:
        return f"{what} but in {suffix}, which is audio; save its log-mels (mel_len, n_mels)"
    return what
