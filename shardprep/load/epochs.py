"""Which epoch an iteration reads, and from where: decided purely, from what happened before.

- An iteration begins a new epoch, whether the one before ran out or was broken off.
- `set_epoch` says which epoch the next iteration reads.
- A loaded state says that the next iteration reads the rest of an epoch.
- An iteration counts once its first batch is taken: frameworks begin some that they never read.
"""

from __future__ import annotations

from typing import NamedTuple


class Place(NamedTuple):
    """A place in the sequence of epochs."""

    epoch: int = 0
    position: int = 0
    """Utterances of all ranks before it, in this epoch."""

    def within(self, end: int) -> Place:
        """The same place; behind the last of an epoch's `end` utterances, the next epoch's begin.

        A state may come from a larger or a smaller batch of all ranks, which leaves out other
        utterances at the end of an epoch.
        """
        return self.next_epoch() if self.position and self.position >= end else self

    def next_epoch(self) -> Place:
        """The begin of the next epoch."""
        return Place(self.epoch + 1)


def after_first_batch(upcoming: Place, start: Place) -> Place:
    """Where the next iteration begins, after one that began at `start` gave its first batch.

    Args:
        upcoming: Where it would begin so far. If something else was asked for since the iteration
            began, that holds.
        start: Where this iteration began.
    """
    return start.next_epoch() if upcoming == start else upcoming


def after_set_epoch(upcoming: Place, epoch: int) -> Place:
    """Where the next iteration begins, after an epoch was asked for; a place within it stays."""
    return upcoming if upcoming.epoch == epoch else Place(epoch)
