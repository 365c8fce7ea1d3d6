"""Finds damaged utterances before they are trained on, and can put others in their place."""

from __future__ import annotations

import logging
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from shardprep.errors import REPAIR, CorruptShardError
from shardprep.read.split import Split

_log = logging.getLogger("shardprep")

Verification = Literal["never", "once", "always"]
OnCorrupt = Literal["raise", "skip"]


class ReadGuard:
    """Checks the crc32 of utterances as they are read, and decides what damage leads to.

    Args:
        split: What is read.
        verify: "never", "once" for each utterance in this process, or "always".
        on_corrupt: "raise" an error, or "skip" the utterance.
        max_corrupt: Damaged utterances that "skip" bears; one more is an error.

    Attributes:
        damaged: Positions of the damaged utterances found so far, and what is wrong with each.

    Raises:
        ValueError: An argument is out of range, or damage is to be skipped that nobody looks for.
    """

    def __init__(
        self, split: Split, verify: Verification, on_corrupt: OnCorrupt, max_corrupt: int
    ) -> None:
        if verify not in ("never", "once", "always") or on_corrupt not in ("raise", "skip"):
            raise ValueError(f"verify_reads {verify!r}, on_corrupt {on_corrupt!r}")
        if max_corrupt < 0:
            raise ValueError(f"max_corrupt {max_corrupt}: must not be negative")
        if on_corrupt == "skip" and verify == "never":
            raise ValueError("on_corrupt 'skip' needs verify_reads 'once' or 'always'")
        self._split = split
        self._verify = verify
        self._skips = on_corrupt == "skip"
        self._max = max_corrupt
        self._unverified = np.ones(len(split) if verify != "never" else 0, bool)
        self._left = len(self._unverified)
        self._whole = np.ones(len(split), bool)
        self.damaged: dict[int, CorruptShardError] = {}

    def keep(self, indices: NDArray[np.int64]) -> NDArray[np.int64]:
        """Check utterances; returns those positions (B,) of theirs that are not damaged.

        Raises:
            CorruptShardError: One is damaged, and that is not to be borne.
        """
        if self._verify == "always" or self._left:
            self._look(indices)
        return indices[self._whole[indices]] if self.damaged else indices

    def stand_ins(self, indices: NDArray[np.int64]) -> NDArray[np.int64] | None:
        """Check the utterances of a batch, and let whole ones stand in for damaged ones.

        Args:
            indices: Their positions in the split (B,).

        Returns:
            For each place of the batch the place whose utterance is to be read there (B,): itself,
            or the next one whose utterance is whole. None where all are whole.

        Raises:
            CorruptShardError: An utterance is damaged, and that is not to be borne.
        """
        kept = self.keep(indices)
        if len(kept) == len(indices):
            return None
        if not len(kept):
            raise self._too_many(int(indices[-1]), "every utterance of a batch is damaged")
        places = np.flatnonzero(self._whole[indices])
        following = np.searchsorted(places, np.arange(len(indices)))
        return places[following % len(places)]

    def report(self, index: int, error: CorruptShardError) -> None:
        """Take note of a damaged utterance.

        Raises:
            CorruptShardError: It is not to be borne.
        """
        if not self._skips:
            raise error
        found = len(self.damaged) + 1
        if found > self._max:
            raise self._too_many(
                index, f"{found} utterances are damaged, and max_corrupt is {self._max}"
            )
        self.damaged[index] = error
        self._whole[index] = False
        _log.warning("skipped: %s", error)

    def vouch_for_all(self) -> None:
        """Let the utterances count as checked that are not known to be damaged."""
        self._verify, self._left = "never", 0

    def _look(self, indices: NDArray[np.int64]) -> None:
        asked = np.unique(indices)
        if self._verify == "once":
            asked = asked[self._unverified[asked]]
        if len(asked):
            whole = self._split.intact(asked)
            for index in asked[~whole].tolist():
                if index not in self.damaged:
                    self.report(index, self._split.damaged(index))
            self._left -= int(self._unverified[asked].sum())
            self._unverified[asked] = False

    def _too_many(self, index: int, what: str) -> CorruptShardError:
        last = self._split.damaged(index)
        return CorruptShardError(what, file=last.file, key=last.key, remedy=REPAIR)
