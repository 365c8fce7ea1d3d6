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
import functools
import hashlib
import json
import os
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import PurePosixPath
from typing import Any, NamedTuple

import msgspec

from shardprep.errors import SourceError
from shardprep.format.index import MAX_KEY_BYTES, NO_LABEL
from shardprep.format.manifest import Reject
from shardprep.source.listing import Listing, listing_of
from shardprep.source.metadata import (
    MAPPING,
    MOST_SHOWN,
    TESTDATA,
    Metadata,
    is_unicode,
    read_metadata,
)
from shardprep.storage.remote import Location, locate

# How many uses of a repeated file a reason lists; how many rejects a data set may have, far more
# than one that is worth packing.
_MOST_LISTED = 10
_MOST_REJECTS = 100_000

_BAD_CHARACTERS = re.compile(r"[\x00-\x1f\x7f]")
_CORRECT = "Correct the data set, or leave such utterances out with --on-error skip."


class Utterance(NamedTuple):
    """One `.pt` file: its key in the shards, and what the metadata say about it.

    Attributes:
        key: File path without ".pt"; names the utterance in the shards.
        path: File path relative to the data set, with forward slashes.
        speaker: Speaker name, or None where unknown.
        label: Speaker number, or -1.
        frames: Length in mel frames.
        nbytes: Size of the file in bytes.
        version: A number that changes when the file does, 0 if unknown; a later build finds by it
            that the file has changed.
        entry: Position in testdata.json; None for the utterances of metadata.json.
    """

    key: str
    path: str
    speaker: str | None
    label: int
    frames: int
    nbytes: int
    version: int
    entry: int | None = None


@dataclass(frozen=True)
class Source:
    """The contents of a data set.

    Attributes:
        root: Folder or URL.
        n_mels: Mel bins F.
        speakers: Speaker names; the position is the label.
        labelled: Utterances of metadata.json.
        test: Utterances of testdata.json, in its order.
        rejects: Utterances that cannot be packed.
        repeats: Entries of testdata.json that list the file of an earlier entry again. They are no
            fault: a test entry has no label that could be in doubt.
    """

    root: Location
    n_mels: int
    speakers: tuple[str, ...]
    labelled: tuple[Utterance, ...]
    test: tuple[Utterance, ...]
    rejects: tuple[Reject, ...]
    repeats: tuple[Reject, ...] = ()

    @functools.cached_property
    def utterances(self) -> tuple[Utterance, ...]:
        """Every utterance that can be packed, in the order of the data set."""
        return (*self.labelled, *self.test)

    @functools.cached_property
    def by_key(self) -> dict[str, Utterance]:
        """Every utterance that can be packed, by its key."""
        return {utterance.key: utterance for utterance in self.utterances}

    @functools.cached_property
    def fingerprint(self) -> str:
        """SHA-256 over speakers, utterances, lengths and file sizes."""
        rows = [[*u._replace(version=0)] for u in self.utterances]
        lines = [msgspec.to_builtins(line) for line in (*self.rejects, *self.repeats)]
        listed = [self.n_mels, self.speakers, rows, lines]
        return hashlib.sha256(json.dumps(listed).encode()).hexdigest()


class _Entry(msgspec.Struct):
    feature_path: str
    mel_len: int


@dataclass
class _Scan:
    """Collects utterances and rejects."""

    root: Location
    files: Listing
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
            entry = msgspec.convert(raw, _Entry)
            relative = _inside(entry.feature_path)
            key = _key_of(relative)
            if speaker is not None and label == NO_LABEL:
                raise ValueError(f"speaker {speaker} is not in {MAPPING}")
            if entry.mel_len < 1:
                raise ValueError(f"mel_len is {entry.mel_len}, expected at least 1")
            state = self.files.look(relative)
        except (msgspec.ValidationError, ValueError) as error:
            if isinstance(error, UnicodeEncodeError) and error.encoding != "utf-8":
                # The file may be healthy: this process cannot even ask for it.
                raise
            # rejects.jsonl cannot hold a lone surrogate, which JSON can spell.
            shown = shown.encode(errors="backslashreplace").decode()
            self._reject(Reject(shown, key, speaker, split, str(error), number))
            return
        self.uses[key] += 1
        if self.uses[key] > _MOST_REJECTS:
            raise SourceError(
                f"is listed more than {_MOST_REJECTS} times", file=self.root / relative
            )
        self.found[split].append(
            Utterance(key, relative, speaker, label, entry.mel_len, *state, number)
        )

    def _reject(self, reject: Reject) -> None:
        self.rejects.append(reject)
        if len(self.rejects) > _MOST_REJECTS:
            error = source_error(self.rejects[0], self.root)
            error.what += f" (and {_MOST_REJECTS} more utterances are faulty)"
            raise error

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
                reason = f"listed again: the same file as entry {first.entry}"
                self.repeats.append(_line(other, reason, first.entry))
        return first


def _line(utterance: Utterance, reason: str, repeats: int | None = None) -> Reject:
    split = "labelled" if utterance.entry is None else "test"
    return Reject(
        utterance.path, utterance.key, utterance.speaker, split, reason, utterance.entry, repeats
    )


def source_error(reject: Reject, root: Location, remedy: str = _CORRECT) -> SourceError:
    """The error for an utterance that must not be left out, as with --on-error fail."""
    return SourceError(
        reject.reason,
        file=root / reject.file,
        key=f"speaker {reject.speaker}" if reject.speaker else None,
        remedy=remedy,
    )


def scan_dataset(root: str | os.PathLike[str]) -> Source:
    """Read the three JSON files of a data set, and look at every file that they name.

    Args:
        root: Folder or URL of the data set.

    Returns:
        What was found. The `.pt` files are not opened; see `shardprep.source.features`.

    Raises:
        SourceError: There is no data set, or one of the JSON files is faulty.
        StorageError: The store behind the URL gives no answer.
    """
    folder = locate(root)
    files = listing_of(folder)
    metadata = read_metadata(folder, files)
    files.expect(_paths(metadata))
    scan = _Scan(folder, files)
    for speaker, entries in metadata.speakers.items():
        for entry in entries:
            scan.add(entry, "labelled", speaker, metadata.labels.get(speaker, NO_LABEL))
    for number, entry in enumerate(metadata.test):
        scan.add(entry, "test", None, NO_LABEL, number)
    scan.settle_repeated()
    return Source(
        folder,
        metadata.n_mels,
        tuple(sorted(metadata.labels, key=lambda name: metadata.labels[name])),
        tuple(scan.found["labelled"]),
        tuple(scan.found["test"]),
        tuple(scan.rejects),
        tuple(sorted(scan.repeats, key=lambda line: line.entry or 0)),
    )


def _shown(raw: Any) -> str:
    """What an entry has instead of a path, cut short."""
    try:
        return json.dumps(raw)[:200]
    except RecursionError:
        return type(raw).__name__


def _inside(path: str) -> str:
    if len(path) > MOST_SHOWN:
        raise ValueError(f"the path has {len(path)} characters, expected at most {MOST_SHOWN}")
    pure = PurePosixPath(path)
    if pure.is_absolute() or ".." in pure.parts or "\\" in path:
        raise ValueError("the path leads outside the data set")
    return str(pure)


def _key_of(relative: str) -> str:
    if not relative.endswith(".pt"):
        raise ValueError("the file name does not end in .pt")
    key = relative.removesuffix(".pt")
    if "." in key:
        raise ValueError(f"the key {key!r} contains a dot, where tar readers cut names")
    if _BAD_CHARACTERS.search(key) or any(part.startswith("__") for part in key.split("/")):
        raise ValueError(f"the key {key!r} has characters that tar readers do not take")
    if not is_unicode(key):
        raise ValueError("the file name is not valid Unicode")
    size = len(key.encode())
    if not key.split("/")[-1] or size > MAX_KEY_BYTES:
        raise ValueError(f"the key {key!r} has {size} bytes, expected 1 to {MAX_KEY_BYTES}")
    return key


def _paths(metadata: Metadata) -> Iterator[str]:
    """The paths of all files that are listed, except faulty ones."""
    for entries in (*metadata.speakers.values(), metadata.test):
        for entry in entries:
            path = entry.get("feature_path") if isinstance(entry, dict) else None
            with contextlib.suppress(ValueError):
                if isinstance(path, str):
                    yield _inside(path)
