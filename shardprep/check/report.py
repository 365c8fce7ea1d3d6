"""The reports of `verify_shards` and `repair_shards`."""

from __future__ import annotations

from dataclasses import dataclass, field

from shardprep.format.manifest import Reject

BY_HAND = "remove it, or move it elsewhere"
"""What the words of a fault end in that no repair undoes."""


@dataclass(frozen=True)
class Fault:
    """One fault: the file, the utterance's key ("" for a whole file), and what is wrong."""

    file: str
    key: str
    what: str

    def __str__(self) -> str:
        return ": ".join(part for part in (self.file, self.key, self.what) if part)

    @property
    def by_hand(self) -> bool:
        """Whether it is a file of someone else, which a repair leaves alone."""
        return self.what.endswith(BY_HAND)


@dataclass
class VerifyReport:
    """What `verify_shards` checked and found.

    Attributes:
        faults: All faults that were found; empty for an intact set.
        unread: Files that the machine could not read now, and why. Nothing is known about them.
        notes: What a user should know besides, such as files that are no part of the set.
        files: Number of files checked.
        bytes: Their size, by the manifest.
        samples: Number of utterances that were read (with deep or against), else 0.
        adopted: Whether the set is one of adopted tars, which no repair changes.
        seconds: Time taken.
    """

    faults: list[Fault] = field(default_factory=list)
    unread: list[Fault] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    files: int = 0
    bytes: int = 0
    samples: int = 0
    adopted: bool = False
    seconds: float = 0.0

    @property
    def intact(self) -> bool:
        """Whether everything was read, and there is no fault."""
        return not self.faults and not self.unread


@dataclass
class RepairReport:
    """What `repair_shards` did.

    Attributes:
        path: The shard folder.
        repaired: Files that have their original bytes again.
        removed: Files of earlier builds that did not belong to the set.
        dropped: Utterances that were left out; an entry without a key stands for several.
        lost: Number of utterances that were left out.
        notes: What a user should know about the repair.
        faults: What is still wrong.
        fingerprint: Fingerprint of the set now; it differs from before if anything was dropped.
        seconds: Time taken.
    """

    path: str
    repaired: list[str] = field(default_factory=list)
    removed: list[str] = field(default_factory=list)
    dropped: list[Reject] = field(default_factory=list)
    lost: int = 0
    notes: list[str] = field(default_factory=list)
    faults: list[Fault] = field(default_factory=list)
    fingerprint: str = ""
    seconds: float = 0.0

    @property
    def intact(self) -> bool:
        """Whether there is no fault left."""
        return not self.faults
