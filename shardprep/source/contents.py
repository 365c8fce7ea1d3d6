"""What a source holds: its utterances, and a reader that gives their matrices.

A source is whatever can be packed: a data set in the homework's layout, a list of files, features
of Kaldi, what a program has added to a `ShardWriter`.
"""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol, TypeAlias

import msgspec
import numpy as np
from numpy.typing import NDArray

from shardprep.format.manifest import Features, Reject
from shardprep.storage.remote import Location

Matrix: TypeAlias = NDArray[np.floating] | ValueError
"""The matrix (T, F) of an utterance, or what is wrong with it, in words for `Reject.reason`."""


class Utterance(NamedTuple):
    """One utterance: its key in the shards, and what the source says about it.

    Attributes:
        key: Names the utterance in the shards. In the homework's layout it is the path of the
            metadata relative to the data set, with forward slashes, without ".pt".
        path: Where the matrix lies, relative to the source. It is `key` and ".pt", unless the file
            has another spelling of this name, such as the other form of Unicode.
        speaker: Speaker name, or None where unknown.
        label: Speaker number, or -1.
        frames: Length in mel frames; 0 if only the matrix says.
        nbytes: Size of the file in bytes.
        version: A number that changes when the file does, 0 if unknown; a later build finds by it
            that the file has changed.
        entry: Position among the test entries (in testdata.json); None for other utterances.
    """

    key: str
    path: str
    speaker: str | None
    label: int
    frames: int
    nbytes: int
    version: int
    entry: int | None = None


class Reader(Protocol):
    """Gives the matrices of a source; it pickles, for worker processes."""

    @property
    def root(self) -> Location:
        """Where the files lie: a folder or a URL; paths of utterances are relative to it."""

    def read(
        self, utterances: Sequence[Utterance], n_mels: int
    ) -> Iterator[tuple[Utterance, Matrix]]:
        """Utterances with their matrices, in the same order; the next ones are read ahead.

        A matrix is finite, and has `n_mels` columns and as many rows as the utterance has frames.

        Args:
            utterances: Utterances of this source; those of unknown length get theirs.
            n_mels: Mel bins F.

        Raises:
            StorageError: The machine or the store fails.
        """


@dataclass(frozen=True)
class Source:
    """The contents of a source.

    Attributes:
        reader: Gives the matrices.
        n_mels: Mel bins F.
        speakers: Speaker names; the position is the label.
        labelled: Utterances that the build splits into train and val (metadata.json).
        test: Utterances of the split test, in its order (testdata.json).
        rejects: Utterances that cannot be packed.
        repeats: Entries of testdata.json that list the file of an earlier entry again. They are no
            fault: a test entry has no label that could be in doubt.
        listing: Name of the file that lists the utterances, for messages.
        features: The recipe of the features, where it is known; see `Manifest.features`.
        fixed: Further utterances whose split the source names, "train" or "val", by split.
        trained: Speakers whom a build may not hold out: those in train of a set to append to.
    """

    reader: Reader
    n_mels: int
    speakers: tuple[str, ...]
    labelled: tuple[Utterance, ...]
    test: tuple[Utterance, ...]
    rejects: tuple[Reject, ...]
    repeats: tuple[Reject, ...] = ()
    listing: str = "metadata.json"
    features: Features | None = None
    fixed: Mapping[str, tuple[Utterance, ...]] = field(default_factory=dict)
    trained: frozenset[str] = frozenset()

    @property
    def root(self) -> Location:
        """Folder or URL."""
        return self.reader.root

    @functools.cached_property
    def utterances(self) -> tuple[Utterance, ...]:
        """Every utterance that can be packed, in the order of the data set."""
        fixed = (utterance for own in self.fixed.values() for utterance in own)
        return (*self.labelled, *fixed, *self.test)

    @property
    def test_entries(self) -> int:
        """Number of entries of testdata.json."""
        rejected = sum(reject.split == "test" for reject in self.rejects)
        return len(self.test) + len(self.repeats) + rejected

    @functools.cached_property
    def by_key(self) -> dict[str, Utterance]:
        """Every utterance that can be packed, by its key."""
        return {utterance.key: utterance for utterance in self.utterances}

    @functools.cached_property
    def fingerprint(self) -> str:
        """SHA-256 over speakers, utterances, lengths, file sizes, and features where known."""
        rows = [[*u._replace(version=0)] for u in self.utterances]
        lines = [msgspec.to_builtins(line) for line in (*self.rejects, *self.repeats)]
        listed = [self.n_mels, self.speakers, rows, lines]
        if self.fixed:
            listed.append({name: len(own) for name, own in self.fixed.items()})
        if self.features is not None:
            listed.append(self.features)
        return hashlib.sha256(json.dumps(listed).encode()).hexdigest()
