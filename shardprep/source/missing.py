"""Why a file of a data set is not where the metadata say, in words for `Reject.reason`."""

from __future__ import annotations

import contextlib
import itertools
import os
import unicodedata
import urllib.parse

ABSENT = "the file does not exist"

# What programs append to the name of a file that is not complete, or that stands for another.
_BESIDE = {
    **dict.fromkeys(
        (".part", ".partial", ".crdownload", ".download", ".filepart", ".aria2", ".tmp"),
        "a download that is not complete",
    ),
    ".dvc": "run `dvc pull`",
    **dict.fromkeys((".gz", ".bz2", ".xz", ".zst", ".zip"), "decompress it"),
}
_ANNEX = "/annex/objects/"
# Of the Hugging Face Hub and of DVC.
_CACHES = ("/blobs/", "/.dvc/", "/files/md5/")
# Entries of a folder that are compared with a name.
_MOST_ENTRIES = 200_000


class Absences:
    """Finds out why files of a folder are not there.

    Args:
        root: The folder of the data set.
    """

    def __init__(self, root: str | os.PathLike[str]) -> None:
        self._root = os.fspath(root)
        # The folder that was read last, and its names.
        self._read: tuple[str, dict[str, str]] = "", {}

    def why(self, relative: str) -> str:
        """Why there is no file of this path, with a way that works where one is known."""
        folder, name = os.path.split(os.path.join(self._root, relative))
        if not os.path.isdir(folder):
            return self._further_in(relative) or f"{ABSENT}, nor does its folder"
        for suffix, words in _BESIDE.items():
            if os.path.lexists(os.path.join(folder, name + suffix)):
                return f"{ABSENT}, but {name}{suffix} does: {words}"
        if os.path.lexists(os.path.join(folder, f".{name}.icloud")):
            return f"{ABSENT} on this machine: iCloud has it; download it in the Finder"
        plain = urllib.parse.unquote(name).strip()
        if plain != name and os.path.lexists(os.path.join(folder, plain)):
            return f"{ABSENT}, but {plain!a} does; correct the name where it is listed"
        if other := self._folded_names(folder).get(_folded(name)):
            return f"{ABSENT}, but {other!a} does: the case differs; rename one of the two"
        return self._further_in(relative) or ABSENT

    def further_in(self, path: str) -> str | None:
        """A hint where a path begins too far up, as with the name of the data set's folder."""
        parts = path.split("/")
        for at in range(1, len(parts)):
            rest = "/".join(parts[at:])
            within = rest and ".." not in parts[at:] and not rest.startswith("/")
            if within and os.path.isfile(os.path.join(self._root, rest)):
                return remove_hint(rest, "/".join(parts[:at]) + "/")
        return None

    def _further_in(self, relative: str) -> str | None:
        hint = self.further_in(relative)
        return hint and f"{ABSENT}, but {hint}"

    def _folded_names(self, folder: str) -> dict[str, str]:
        """The names in a folder, by what names of another case have in common with them."""
        if self._read[0] != folder:
            names: list[str] = []
            # Who cannot list a folder may still open its files.
            with contextlib.suppress(OSError), os.scandir(folder) as entries:
                names = [entry.name for entry in itertools.islice(entries, _MOST_ENTRIES)]
            self._read = folder, {_folded(name): name for name in names}
        return self._read[1]


def remove_hint(inner: str, above: str) -> str:
    """What to do with a path whose end is the path of a file."""
    return f"{inner} exists; remove {above} from the paths that are listed"


def why_dangling(path: str) -> str:
    """Why a link has no target, with a way that works."""
    target = os.readlink(path).replace(os.sep, "/")
    if _ANNEX in target:
        return "the file is not here: run `git annex get` (DataLad: `datalad get`)"
    shown = ascii(target[:100])
    if any(part in target for part in _CACHES):
        return f"the file is a link to {shown}, which the cache does not have; download it again"
    return f"the file is a link to {shown}, which does not exist"


def _folded(name: str) -> str:
    return unicodedata.normalize("NFC", name).casefold()
