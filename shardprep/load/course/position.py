"""Where a loader stands: in its own process, or in a worker of a DataLoader, which has a copy.

DataLoader copies its dataset anew for every epoch, or tells the copies to begin again, and the
original hears of neither. So a loader shares its course with the copies in its workers.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from shardprep.errors import ShardprepError, StorageError
from shardprep.load.course.epochs import Course, Place, WorkerPlace
from shardprep.load.course.world import Worker, this_worker
from shardprep.storage.shared_value import SharedValue

# What a state has only where the loader was told so.
_OPTIONAL = ("shares", "balance")
_REMEDIES = dict.fromkeys(
    (*_OPTIONAL, "drop_last"), "Give the loader the arguments that the run began with."
) | {"global_batch": "Choose batch_size so that batch_size * world_size is what it was."}


class Stretch(NamedTuple):
    """The batches of one iteration, in this process."""

    start: Place
    """Where the first of them begins."""
    every: int = 1
    """How many batches of the rank there are to each of them: as many as workers."""


class Position:
    """Where a loader stands, and where its next iteration begins."""

    def __init__(self) -> None:
        # Where the newest iteration of this process stands, or where the next one begins.
        self._place: Place | WorkerPlace = Place()
        self._reading = 0
        self._course = SharedValue(Course())
        # In a worker: iterations that it has begun, and where it is to continue.
        self._begun = 0
        self._continued: Place | WorkerPlace | None = None

    @property
    def epoch(self) -> int:
        """The epoch that is read, or after its end the next one."""
        course = self._course.get()
        return course.upcoming.epoch - 1 if course.by_workers else self._reading

    @property
    def inside_an_epoch(self) -> bool:
        """Whether the next iteration begins behind the begin of an epoch."""
        return (self._continued or self._course.get().upcoming).position > 0

    def ask(self, epoch: int) -> None:
        """Let the next iteration read an epoch."""
        if this_worker() is not None:
            self._change_for_workers(lambda course: course.asked(epoch))
            return
        self._place = self._course.change(lambda course: course.asked(epoch)).upcoming
        self._reading = epoch

    def begin(self, end: int, step: int) -> Stretch:
        """Begin an iteration.

        Args:
            end: Utterances of an epoch.
            step: Utterances of a batch, both of all ranks.

        Raises:
            StorageError: In a worker: the system gave no means to share the epoch.
        """
        worker = this_worker()
        if worker is not None:
            return self._begin_in_worker(worker, end, step)
        course = self._course.change(lambda course: course.at(course.upcoming.within(end)))
        self._place = start = course.upcoming
        self._reading = start.epoch
        return Stretch(start)

    def _begin_in_worker(self, worker: Worker, end: int, step: int) -> Stretch:
        name = (worker.seed, self._begun)
        self._begun += 1
        own, self._continued = self._continued, None
        epoch = None if own is None else own.epoch
        course = self._change_for_workers(lambda c: c.joined(name, worker.number, end, epoch))
        if not isinstance(own, WorkerPlace):
            team = course.team(name)
            assert team is not None
            start = team.start if own is None else own
            position = start.position + worker.number * step
            own = WorkerPlace(worker.number, worker.count, start.epoch, position)
        self._place = own
        return Stretch(Place(own.epoch, own.position), worker.count)

    def following(self, stretch: Stretch, end: int, step: int) -> Stretch | None:
        """What the next iteration will read, if nothing else is asked for; None if unknown.

        Args:
            stretch: What this iteration reads.
            end: Utterances of an epoch.
            step: Utterances of a batch, both of all ranks.
        """
        worker = this_worker()
        if worker is None:
            # Before the first batch, too: to begin an epoch that is never read changes nothing.
            return Stretch(self._course.get().first_batch(stretch.start).upcoming.within(end))
        # A worker that began only once may be one of those that end with their epoch.
        if self._begun < 2:
            return None
        return Stretch(Place(stretch.start.epoch + 1, worker.number * step), worker.count)

    def will_begin_at(self, stretch: Stretch) -> bool:
        """Whether the next iteration of this process reads a stretch."""
        return this_worker() is not None or self._course.get().upcoming == stretch.start

    def give_first_batch(self, stretch: Stretch) -> None:
        """An iteration gives its first batch."""
        if not isinstance(self._place, WorkerPlace):
            self._course.change(lambda course: course.first_batch(stretch.start))

    def move(self, stretch: Stretch, position: int, end: int) -> None:
        """An iteration gave a batch; `position` is where its next one begins."""
        if isinstance(self._place, WorkerPlace):
            self._place = self._place._replace(position=position)
        else:
            self._place = Place(stretch.start.epoch, position).within(end)

    def finish(self) -> None:
        """An iteration has given all its batches."""
        self._reading = self._course.get().upcoming.epoch

    def state(self) -> dict[str, int]:
        """What `load` takes.

        Raises:
            ShardprepError: The workers of a DataLoader read, and their batches are on their way.
        """
        if this_worker() is None and self._course.get().by_workers:
            raise ShardprepError(
                "the workers of a DataLoader read, and which of their batches came is not known",
                key="state_dict",
                remedy="Take the state of a torchdata StatefulDataLoader over the loader, or read "
                "without workers (num_workers=0): the loader prepares its batches by a thread.",
            )
        return self._place._asdict()

    def load(self, state: dict[str, Any]) -> None:
        """Let the next iteration continue at a place.

        Raises:
            ShardprepError: The state belongs to another worker, or to a number of workers that is
                not here.
        """
        worker = this_worker()
        place: Place | WorkerPlace = Place(int(state["epoch"]), int(state["position"]))
        if "workers" in state:
            place = WorkerPlace(*(state[field] for field in WorkerPlace._fields))
            own = None if worker is None else (worker.number, worker.count)
            if own != (place.worker, place.workers):
                here = "not in a worker" if own is None else f"in worker {own[0]} of {own[1]}"
                raise ShardprepError(
                    f"the state was saved in worker {place.worker} of {place.workers} of a "
                    f"DataLoader, and is loaded {here}",
                    key="workers",
                    remedy="Load the state of the whole StatefulDataLoader into one with as many "
                    "workers.",
                )
        self._place = place
        if worker is not None:
            self._continued = place
            return
        assert isinstance(place, Place)
        self._course.change(lambda course: course.at(place))
        self._reading = place.epoch

    def _change_for_workers(self, change: Callable[[Course], Course]) -> Course:
        course = self._course.change_parents(change)
        if course is None:
            raise StorageError(
                "the system gave no file by which the workers of a DataLoader know the epoch",
                remedy="Raise the limit on open files (ulimit -n), or read without workers "
                "(num_workers=0): the loader prepares its batches by a thread.",
            )
        return course


def check_same(state: Mapping[str, Any], own: Mapping[str, Any]) -> None:
    """Make sure that a saved position means the same batches to the loader that loads it.

    Args:
        state: What was saved.
        own: What the loader has; a value that is nowhere saved stands for None.

    Raises:
        ShardprepError: They differ.
    """
    # What another argument brings along, such as drop_last with shares, comes after it.
    for name in dict.fromkeys([*_OPTIONAL, *own]):
        found, expected = state.get(name), own.get(name)
        if found != expected:
            raise ShardprepError(
                f"the saved position has {name} {found!r}, this loader {expected!r}",
                key=name,
                remedy=_REMEDIES.get(
                    name,
                    "Resume with the data set, the seed and the order that the run began with.",
                ),
            )
