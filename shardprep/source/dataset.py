"""What a data set in the homework's layout holds, checked before anything is written.

    Dataset/
      metadata.json   {"n_mels": 40, "speakers": {"id00464": [{"feature_path", "mel_len"}]}}
      mapping.json    {"speaker2id": {"id00464": 0}, "id2speaker": {"0": "id00464"}}; optional
      testdata.json   {"n_mels": 40, "utterances": [{"feature_path", "mel_len"}]}; optional
      uttr-*.pt       float32 tensors (mel_len, n_mels)

A fault of a whole file (no metadata.json, broken JSON) always raises. A fault of one utterance
becomes a `Reject`, and the caller decides whether it stops the build.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from shardprep.errors import SourceError
from shardprep.format.index import NO_LABEL
from shardprep.format.manifest import Reject
from shardprep.source.contents import Source, Utterance
from shardprep.source.json_text import name_of, whole_number
from shardprep.source.listing import AbsentError, FileState, Listing, listing_of
from shardprep.source.metadata import (
    MAPPING,
    MOST_SHOWN,
    TESTDATA,
    Metadata,
    read_metadata,
)
from shardprep.source.paths import OutsideError, Roots, key_of, relative_path, spellings
from shardprep.source.reader import FileReader
from shardprep.storage.remote import Location, locate

# How many uses of a repeated file a reason lists; how many rejects a data set may have, far more
# than one that is worth packing.
_MOST_LISTED = 10
MOST_REJECTS = 100_000
MOST_FRAMES = 2**32

_CORRECT = (
    "Correct the data set, or leave such utterances out with --on-error skip; --dry-run lists all."
)
# Kinds of faults that an error tells apart, and what differs between reasons of one kind.
_SHOWN = 5
_DETAILS = re.compile(r"\d+(?:\.\d+)?|'[^']*'|, but .* (?:does|exists).*|[;:(].*")


@dataclass(frozen=True)
class Finder:
    """Finds the files that a source lists.

    Attributes:
        files: The files of the place.
        roots: The place, by all its names.
    """

    files: Listing
    roots: Roots

    def place_of(self, path: str) -> str:
        """See `relative_path`; a path of another machine is refused with what to remove from it."""
        try:
            return relative_path(path, self.roots)
        except OutsideError as error:
            if hint := self.files.hint_of(error.path):
                raise ValueError(f"{error.what}, but {hint}") from None
            raise

    def find(self, path: str, listed: str) -> tuple[str, FileState]:
        """Where the file of a path lies, and its state. ValueError if it cannot be used.

        Args:
            path: As in the list.
            listed: The same, by `place_of`.
        """
        with contextlib.suppress(AbsentError):
            return listed, self.files.look(listed)
        for other in spellings(path, listed):
            with contextlib.suppress(AbsentError):
                return other, self.files.look(other)
        raise ValueError(self.files.why_absent(listed))


@dataclass
class _Scan:
    """Collects utterances and rejects."""

    root: Location
    finder: Finder
    uses: Counter[str] = field(default_factory=Counter)
    found: dict[str, list[Utterance]] = field(default_factory=lambda: {"labelled": [], "test": []})
    rejects: list[Reject] = field(default_factory=list)
    repeats: list[Reject] = field(default_factory=list)

    def add(
        self, raw: Any, split: str, speaker: str | None, label: int, number: int | None = None
    ) -> None:
        path = raw.get("feature_path") if isinstance(raw, dict) else None
        shown = path[:MOST_SHOWN] if isinstance(path, str) else _shown(raw)
        key = ""
        try:
            listed = self.finder.place_of(_path_of(raw))
            key = key_of(listed)
            if speaker is not None and label == NO_LABEL:
                raise ValueError(f"speaker {speaker} is not in {MAPPING}")
            frames = _frames_of(raw)
            relative, state = self.finder.find(raw["feature_path"], listed)
        except ValueError as error:
            if isinstance(error, UnicodeEncodeError) and error.encoding != "utf-8":
                # The file may be healthy: this process cannot even ask for it.
                raise
            # rejects.jsonl cannot hold a lone surrogate, which JSON can spell.
            shown = shown.encode(errors="backslashreplace").decode()
            self._reject(Reject(shown, key, speaker, split, str(error), number))
            return
        self.uses[key] += 1
        if self.uses[key] > MOST_REJECTS:
            raise SourceError(
                f"is listed more than {MOST_REJECTS} times", file=self.root / relative
            )
        self.found[split].append(Utterance(key, relative, speaker, label, frames, *state, number))

    def _reject(self, reject: Reject) -> None:
        self.rejects.append(reject)
        if len(self.rejects) > MOST_REJECTS:
            raise rejects_error(self.rejects, self.root)

    def settle_repeated(self) -> None:
        """Keep one use of a file that is listed again, or none if its label is in doubt."""
        groups: dict[str, list[Utterance]] = {}
        for utterance in (*self.found["test"], *self.found["labelled"]):
            if self.uses[utterance.key] > 1:
                groups.setdefault(utterance.key, []).append(utterance)
        kept = {key: self._settle(uses) for key, uses in groups.items()}
        for split, utterances in self.found.items():
            self.found[split] = [u for u in utterances if u.key not in kept or kept[u.key] is u]

    def _settle(self, uses: list[Utterance]) -> Utterance | None:
        """The use of a file that is kept; the others become rejects or repeats."""
        # A test entry, if there is one: its row in a submission is wanted, and it has no label.
        first, *others = uses
        if first.entry is None and len({use.speaker for use in uses}) > 1:
            listed = ", ".join(str(use.speaker) for use in uses[:_MOST_LISTED])
            reason = f"the same file is listed {len(uses)} times: {listed}"
            for use in uses:
                self._reject(_line(use, reason))
            return None
        for other in others:
            if first.entry is None:
                self._reject(_line(other, "the same speaker lists it again"))
            elif other.entry is None:
                reason = f"is entry {first.entry} of {TESTDATA} too, and stays in the test split"
                self._reject(_line(other, reason))
            elif other.frames != first.frames:
                reason = f"mel_len is {other.frames}, but {first.frames} in entry {first.entry}"
                self._reject(_line(other, reason))
            else:
                self.repeats.append(_line(other, repeated(first.entry), first.entry))
        return first


def _line(utterance: Utterance, reason: str, repeats: int | None = None) -> Reject:
    split = "labelled" if utterance.entry is None else "test"
    return Reject(
        utterance.path, utterance.key, utterance.speaker, split, reason, utterance.entry, repeats
    )


def repeated(entry: int) -> str:
    """The reason of an entry of testdata.json that lists the file of an earlier entry again."""
    return f"listed again: the same file as entry {entry}"


def source_error(reject: Reject, root: Location, remedy: str = _CORRECT) -> SourceError:
    """The error for an utterance that must not be left out, as with --on-error fail."""
    # In an ark, and where a list gives keys, the path does not say which utterance it is.
    named = [reject.key] if reject.key and reject.key not in reject.file else []
    named += [f"speaker {reject.speaker}"] if reject.speaker else []
    return SourceError(
        reject.reason,
        file=root / reject.file,
        key=": ".join(named) or None,
        remedy=remedy,
    )


def rejects_error(rejects: Sequence[Reject], root: Location) -> SourceError:
    """The error for several utterances: the first of them, and how many others there are."""
    error = source_error(rejects[0], root)
    if others := rejects[1:]:
        kinds = dict(kinds_of(others))
        alike = kinds.pop(_kind_of(rejects[0]), 0)
        more = f"{len(others)} more utterance{'s' * (len(others) > 1)}"
        if not kinds:
            error.what += f" (and {more} like it)"
            return error
        counts = [f"{alike} like it"] * (alike > 0)
        counts += [f'{count} of the kind "{kind}"' for kind, count in list(kinds.items())[:_SHOWN]]
        counts += ["others"] * (len(kinds) > _SHOWN)
        error.what += f" (and {more} are faulty: {', '.join(counts)})"
    return error


def kinds_of(rejects: Iterable[Reject]) -> list[tuple[str, int]]:
    """The kinds of faults and how often each occurs, the most frequent first."""
    return Counter(map(_kind_of, rejects)).most_common()


def _kind_of(reject: Reject) -> str:
    """The reason of a reject without what differs from file to file."""
    shown = {"'": "'...'", **dict.fromkeys("0123456789", "N")}
    return _DETAILS.sub(lambda found: shown.get(found[0][0], ""), reject.reason).strip()


def scan_dataset(root: str | os.PathLike[str], *, follow_links: bool = False) -> Source:
    """Read the three JSON files of a data set, and look at every file that they name.

    Args:
        root: Folder or URL of the data set.
        follow_links: Whether files may be links out of the folder, as download caches make them.

    Returns:
        What was found. The `.pt` files are not opened; see `shardprep.source.features`.

    Raises:
        SourceError: There is no data set, or one of the JSON files is faulty.
        StorageError: The store behind the URL gives no answer.
    """
    folder = locate(root)
    files, roots = listing_of(folder, follow_links), Roots(folder)
    metadata = read_metadata(folder, files)
    files.expect(_paths(metadata, roots))
    scan = _Scan(folder, Finder(files, roots))
    for speaker, entries in metadata.speakers.items():
        for entry in entries:
            scan.add(entry, "labelled", speaker, metadata.labels.get(speaker, NO_LABEL))
    for number, entry in enumerate(metadata.test):
        scan.add(entry, "test", None, NO_LABEL, number)
    scan.settle_repeated()
    return Source(
        FileReader(folder),
        metadata.n_mels,
        tuple(sorted(metadata.labels, key=lambda name: metadata.labels[name])),
        tuple(scan.found["labelled"]),
        tuple(scan.found["test"]),
        tuple(scan.rejects),
        tuple(sorted(scan.repeats, key=lambda line: line.entry or 0)),
        features=metadata.features,
    )


def _shown(raw: Any) -> str:
    """What an entry has instead of a path, cut short."""
    try:
        return json.dumps(raw)[:200]
    except RecursionError:
        return type(raw).__name__


def _path_of(entry: Any) -> str:
    """The path of an entry. ValueError if there is none."""
    if not isinstance(entry, dict):
        raise ValueError(f"the entry is {name_of(entry)}, expected feature_path and mel_len")
    if "feature_path" not in entry:
        raise ValueError("the entry has no feature_path")
    if not isinstance(path := entry["feature_path"], str):
        raise ValueError(f"feature_path is {name_of(path)}, expected a path as text")
    if not path.strip():
        raise ValueError("feature_path is empty")
    return path


def _frames_of(entry: dict[str, Any]) -> int:
    """The length of an entry. ValueError if it is none."""
    if "mel_len" not in entry:
        raise ValueError("the entry has no mel_len")
    frames = whole_number(entry["mel_len"])
    if frames is None:
        raise ValueError(f"mel_len is {name_of(entry['mel_len'])}, expected a whole number")
    if frames < 1:
        raise ValueError(f"mel_len is {frames}, expected at least 1")
    if frames >= MOST_FRAMES:
        raise ValueError(f"mel_len is {_shown(frames)[:20]}, expected less than {MOST_FRAMES}")
    return frames


def _paths(metadata: Metadata, roots: Roots) -> Iterator[str]:
    """The paths of all files that are listed, except faulty ones."""
    for entries in (*metadata.speakers.values(), metadata.test):
        for entry in entries:
            with contextlib.suppress(ValueError):
                yield relative_path(_path_of(entry), roots)
