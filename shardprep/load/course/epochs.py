"""Which epoch an iteration reads, and from where: decided purely, from what happened before.

- An iteration begins a new epoch, whether the one before ran out or was broken off.
- `set_epoch` says which epoch the next iteration reads.
- A loaded state says that the next iteration reads the rest of an epoch.
- An iteration counts once its first batch is taken: frameworks begin some that they never read.
- The workers of a DataLoader begin by themselves, and those of one iteration read one epoch.
"""

from __future__ import annotations

from typing import NamedTuple

# Iterations of DataLoaders that a slow worker may still join.
_MOST_TEAMS = 8


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


class WorkerPlace(NamedTuple):
    """Where one of a DataLoader's workers stands."""

    worker: int
    workers: int
    """How many there are."""
    epoch: int
    position: int
    """Utterances of all ranks before its next batch, in this epoch."""


class Team(NamedTuple):
    """The workers of one iteration of a DataLoader."""

    name: tuple[int, int]
    """Known to each of them, and different from that of other iterations."""
    start: Place
    """Where they begin together."""
    members: tuple[int, ...] = ()
    """Those that have begun."""


class Course(NamedTuple):
    """What the next iteration begins with."""

    upcoming: Place = Place()
    """Where it begins."""
    teams: tuple[Team, ...] = ()
    """Iterations of DataLoaders, the newest last."""
    by_workers: bool = False
    """Whether workers began the newest iteration."""

    def at(self, place: Place) -> Course:
        """The next iteration begins at a place."""
        return self._replace(upcoming=place, by_workers=False)

    def asked(self, epoch: int) -> Course:
        """An epoch is asked for; a place within it stays."""
        return self.at(self.upcoming if self.upcoming.epoch == epoch else Place(epoch))

    def first_batch(self, start: Place) -> Course:
        """The iteration that began at `start` gave its first batch.

        If something else was asked for since it began, that holds.
        """
        return self.at(start.next_epoch()) if self.upcoming == start else self

    def team(self, name: tuple[int, int]) -> Team | None:
        """The team of this name."""
        return next((team for team in self.teams if team.name == name), None)

    def joined(
        self, name: tuple[int, int], worker: int, end: int, continued: int | None = None
    ) -> Course:
        """A worker begins an iteration; the first of its team decides on the epoch.

        Args:
            name: Of its team.
            worker: Its number.
            end: Utterances of an epoch.
            continued: The epoch of the state that it continues from, if it does.
        """
        team, upcoming = self.team(name), self.upcoming
        # A worker begins an iteration once. If it begins again, that is another team: a script
        # that sets the seed of PyTorch before every epoch gives all teams one name.
        if team is None or worker in team.members:
            start = upcoming.within(end) if continued is None else Place(continued)
            team, upcoming = Team(name, start), start.next_epoch()
        team = team._replace(members=(*team.members, worker))
        others = [other for other in self.teams if other.name != name]
        return Course(upcoming, (*others[1 - _MOST_TEAMS :], team), by_workers=True)
