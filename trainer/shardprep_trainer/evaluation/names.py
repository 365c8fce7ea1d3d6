"""The utterances that a list means: by their keys, with or without suffix and folders before them.

Lists name recordings as their authors had them: `id10270/x6uYqmx31kE/00001.wav`, or an absolute
path. The key of that utterance may be the same without suffix, or begin with other folders. A name
means the one utterance whose key it is, or else whose key is the end of the name, folder by folder,
or else whose key ends in the name. It never means an utterance when the rest of the two differs.
"""

from __future__ import annotations

import bisect
import difflib
import posixpath
from collections.abc import Iterable, Iterator, Sequence

from shardprep import is_recording

SEVERAL = -1
"""Stands for a position where a name means several utterances."""

# Beside those of recordings.
_SUFFIXES = (".sph", ".pt", ".npy")
# Of those that begin or end like a name, how many are compared with it letter by letter.
_NEAR = 40
# How much of two names must agree.
_ALIKE = 0.6


class Names:
    """The N utterances of a split, to be found by the names that lists give them.

    Args:
        keys: Their keys, in the order of their positions.
    """

    def __init__(self, keys: Iterable[str]) -> None:
        self._keys: Sequence[str] = [str(key) for key in keys]
        # Names in files of scores have suffixes themselves.
        self._stems = [_forms(key)[1] for key in self._keys]
        self._position = {
            **_by_text(enumerate(self._stems)),
            **_by_text(enumerate(self._keys)),
        }

    def find(self, names: Iterable[str]) -> dict[str, int]:
        """The positions of names; those that name no utterance are left out.

        SEVERAL stands for a name that could mean several utterances, and for different names that
        would mean the same one.
        """
        found, rest = {}, []
        for name in dict.fromkeys(names):
            forms = [form for form in _forms(name) if form in self._position]
            if forms:
                found[name] = self._position[forms[0]]
            else:
                rest.append(name)
        if rest:
            found.update(self._find_ends(rest))
        return found

    def _find_ends(self, names: list[str]) -> dict[str, int]:
        """As `find`, for names that are no keys themselves."""
        wanted = {form for name in names for form in _forms(name)}
        common = _common_folders(self._stems)
        inner = ((position, stem[len(common) :]) for position, stem in enumerate(self._stems))
        below = _by_text(inner) if common else {}
        ends = _by_text(
            (position, end)
            for position, stem in enumerate(self._stems)
            for end in _ends(stem)
            if end in wanted
        )
        found: dict[str, int] = {}
        for name in names:
            own = [end for form in _forms(name) for end in _ends(form)]
            for place in (self._position, below):
                match = next((place[end] for end in own if end in place), None)
                if match is not None:
                    break
            else:
                match = next((ends[form] for form in _forms(name) if form in ends), None)
            if match is not None:
                found[name] = match
        return _without_shared(found)

    def nearest(self, name: str) -> str | None:
        """The key that is most like a name that means none, or None where none is like it."""
        forwards, backwards = sorted(self._keys), sorted(key[::-1] for key in self._keys)
        best, likeness = None, _ALIKE
        for text in (_forms(name)[-1], *_ends(_forms(name)[-1])):
            near = {*_around(forwards, text)}
            near.update(key[::-1] for key in _around(backwards, text[::-1]))
            for key in difflib.get_close_matches(text, sorted(near), 1, likeness):
                best, likeness = key, difflib.SequenceMatcher(None, key, text).ratio()
        return best


def forms_of(name: str) -> list[str]:
    """What the key of a name may be: the forms of the name, and their ends, the longest first."""
    return [text for form in _forms(name) for text in (form, *_ends(form))]


def _by_text(pairs: Iterable[tuple[int, str]]) -> dict[str, int]:
    found: dict[str, int] = {}
    for position, text in pairs:
        found[text] = SEVERAL if text in found else position
    return found


def _forms(name: str) -> list[str]:
    """A name as it is, without suffix, and with hyphens for dots, as keys of recordings have."""
    plain = name.replace("\\", "/").removeprefix("./")
    stem, suffix = posixpath.splitext(plain)
    stem = stem if suffix.lower() in _SUFFIXES or is_recording(plain) else plain
    folder, base = posixpath.split(stem)
    return [name, stem, posixpath.join(folder, base.replace(".", "-"))]


def _ends(text: str) -> Iterator[str]:
    """What is left of a path without its first folders, the longest first."""
    while "/" in text:
        text = text.partition("/")[2]
        yield text


def _common_folders(keys: Sequence[str]) -> str:
    """The folders that all keys begin with, up to and with a slash."""
    if not keys:
        return ""
    # What the first and the last have in common, all between them have.
    folder, slash, _ = posixpath.commonprefix((min(keys), max(keys))).rpartition("/")
    return folder + slash


def _without_shared(found: dict[str, int]) -> dict[str, int]:
    """SEVERAL for names that differ in their folders, and would mean the same utterance."""
    first: dict[int, str] = {}
    shared = set()
    for name, position in found.items():
        mine, other = (_forms(each)[-1] for each in (name, first.setdefault(position, name)))
        if not (f"/{mine}".endswith(f"/{other}") or f"/{other}".endswith(f"/{mine}")):
            shared.add(position)
    return {name: SEVERAL if at in shared else at for name, at in found.items()}


def _around(ordered: list[str], text: str) -> list[str]:
    at = bisect.bisect(ordered, text)
    return ordered[max(0, at - _NEAR) : at + _NEAR]
