"""Finds damaged utterances before they are used, and skips them where that is asked for."""

from __future__ import annotations

import logging
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from shardprep.errors import REPAIR, CorruptShardError
from shardprep.read.split import Split

_log = logging.getLogger("shardprep")

VerifyReads = Literal["never", "once", "always"]
OnCorrupt = Literal["raise", "skip"]


class ReadGuard:
    """Checks the crc32 of utterances before they are read, and raises or skips damaged ones.

    Args:
        split: What is read.
        verify: "never", "once" for each utterance in this process, or "always".
        on_corrupt: "raise" an error, or "skip" the utterance.
        max_corrupt: Most damaged utterances that "skip" skips; one more is an error.

    Attributes:
        damaged: Damaged utterances found so far: position to what is wrong.

    Raises:
        ValueError: An argument is out of range, or damage would be skipped but is never checked.
    """

    def __init__(
        self, split: Split, verify: VerifyReads, on_corrupt: OnCorrupt, max_corrupt: int
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
        self._intact = np.ones(len(split), bool)
        self.damaged: dict[int, CorruptShardError] = {}

    def undamaged(self, indices: NDArray[np.int64]) -> NDArray[np.int64]:
        """Check utterances; returns those positions (B,) of theirs that are not damaged.

        Raises:
            CorruptShardError: An utterance is damaged, and must not be skipped.
        """
        if self._verify == "always" or self._left:
            self._look(indices)
        return indices[self._intact[indices]] if self.damaged else indices

    def replacements(self, indices: NDArray[np.int64]) -> NDArray[np.int64] | None:
        """Check the utterances of a batch, and choose undamaged ones in place of damaged ones.

        Args:
            indices: Their positions in the split (B,).

        Returns:
            For each place of the batch, the place whose utterance is to be read there (B,): the
            same place, or the next one with an undamaged utterance. None if no utterance is
            damaged.

        Raises:
            CorruptShardError: An utterance is damaged and must not be skipped, or all are damaged.
        """
        kept = self.undamaged(indices)
        if len(kept) == len(indices):
            return None
        if not len(kept):
            raise self._too_many(int(indices[-1]), "every utterance of a batch is damaged")
        places = np.flatnonzero(self._intact[indices])
        following = np.searchsorted(places, np.arange(len(indices)))
        return places[following % len(places)]

    def report(self, index: int, error: CorruptShardError) -> None:
        """Note a damaged utterance, which is skipped from now on.

        Raises:
            CorruptShardError: It must not be skipped.
        """
        if not self._skips:
            raise error
        found = len(self.damaged) + 1
        if found > self._max:
            raise self._too_many(
                index, f"{found} utterances are damaged, and max_corrupt is {self._max}"
            )
        self.damaged[index] = error
        self._intact[index] = False
        _log.warning("skipped: %s", error)

    def stop_checking(self) -> None:
        """Check no more utterances: those not reported so far are taken as undamaged."""
        self._verify, self._left = "never", 0

    def _look(self, indices: NDArray[np.int64]) -> None:
        asked = np.unique(indices)
        if self._verify == "once":
            asked = asked[self._unverified[asked]]
        if len(asked):
            intact = self._split.intact(asked)
            for index in asked[~intact].tolist():
                if index not in self.damaged:
                    self.report(index, self._split.damaged(index))
            self._left -= int(self._unverified[asked].sum())
            self._unverified[asked] = False

    def _too_many(self, index: int, what: str) -> CorruptShardError:
        last = self._split.damaged(index)
        return CorruptShardError(what, file=last.file, key=last.key, remedy=REPAIR)
