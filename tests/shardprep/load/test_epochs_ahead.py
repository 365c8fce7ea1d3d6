"""The first batches of the next epoch are made before this one ends, and dropped if not wanted."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from shardprep import CorruptShardError, SegmentLoader, open_shards
from shardprep.load.course import position
from shardprep.load.course.epochs import Place
from shardprep.load.course.position import Position, Stretch
from shardprep.load.course.world import Worker
from shardprep.load.epochs_ahead import EpochsAhead
from tests.conftest import PATIENCE

Item = tuple[int, int]


class Plan:
    """Epochs of some batches, each known by its epoch and its number."""

    def __init__(self, batches: int = 5) -> None:
        self.batches = batches

    def count(self, start: Place, every: int) -> int:
        return len(range(start.position, self.batches, every))


class Maker:
    """Makes the batches of a plan, and tells which."""

    def __init__(self, broken: Item | None = None) -> None:
        self.made: list[Item] = []
        self.broken = broken
        self._more = threading.Condition()

    def __call__(self, plan: Any, stretch: Stretch) -> Iterator[Item]:
        for number in range(stretch.start.position, plan.batches, stretch.every):
            item = (stretch.start.epoch, number)
            with self._more:
                self.made.append(item)
                self._more.notify_all()
            if item == self.broken:
                raise OSError("damaged")
            yield item

    def wait_for(self, *items: Item) -> None:
        with self._more:
            assert self._more.wait_for(lambda: set(items) <= set(self.made), PATIENCE)


def following(epoch: int) -> Callable[[], Stretch]:
    return lambda: Stretch(Place(epoch + 1))


def read(ahead: EpochsAhead[Item], plan: Any, epoch: int) -> Iterator[Item]:
    return ahead.read(plan, Stretch(Place(epoch)), following(epoch))


@pytest.mark.parametrize("batches", [1, 2, 5])
@pytest.mark.parametrize("count", [1, 2, 4])
def test_the_next_epochs_first_batches_are_made_before_the_last_is_asked_for(
    count: int, batches: int
) -> None:
    maker, plan = Maker(), Plan(batches)
    ahead = EpochsAhead(maker, count)
    for epoch in range(3):
        batch = read(ahead, plan, epoch)
        taken = list(itertools.islice(batch, batches - 1))
        first = [(epoch + 1, number) for number in range(min(count, batches))]
        if taken:
            maker.wait_for(*first)
        assert taken + list(batch) == [(epoch, number) for number in range(batches)]
        maker.wait_for(*first)
    ahead.close()
    # Each was made once, and of the epoch that never came no more than that.
    assert maker.made == sorted(set(maker.made))
    assert [item for item in maker.made if item[0] == 3] == first


def test_nothing_is_made_ahead_without_a_thread() -> None:
    maker = Maker()
    ahead = EpochsAhead(maker, 0)
    assert list(read(ahead, Plan(2), 0)) == [(0, 0), (0, 1)] == maker.made


def test_batches_of_an_epoch_that_does_not_come_are_dropped() -> None:
    maker, plan = Maker(), Plan()
    ahead = EpochsAhead(maker, 2)
    list(read(ahead, plan, 0))
    maker.wait_for((1, 1))
    assert list(read(ahead, plan, 7)) == [(7, number) for number in range(5)]
    ahead.expect(lambda stretch: stretch.start.epoch == 8)
    assert next(read(ahead, plan, 8)) == (8, 0)
    assert maker.made.count((8, 0)) == 1
    list(read(ahead, plan, 9))
    # Dropped, and made again when its epoch comes after all.
    ahead.expect(lambda _: False)
    assert next(read(ahead, plan, 10)) == (10, 0)
    ahead.close()
    assert maker.made.count((10, 0)) <= 2
    # Nor are those of another plan, as of another world.
    list(read(ahead, plan, 20))
    assert list(read(ahead, Plan(2), 21)) == [(21, 0), (21, 1)]
    ahead.close()


def test_an_error_of_the_next_epoch_appears_when_that_epoch_does() -> None:
    maker, plan = Maker(broken=(1, 1)), Plan()
    ahead = EpochsAhead(maker, 3)
    assert len(list(read(ahead, plan, 0))) == 5
    maker.wait_for((1, 1))
    assert len(list(read(ahead, plan, 5))) == 5
    batches = read(ahead, plan, 1)
    assert next(batches) == (1, 0)
    with pytest.raises(OSError, match="damaged"):
        next(batches)
    ahead.close()


def test_a_loader_tells_of_damage_when_the_epoch_that_meets_it_comes(
    edge_set: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    split = open_shards(edge_set)["train"]
    own = SegmentLoader(split, batch_size=4, segment_frames=8, prefetch=2)
    whole = [batch["mel"].clone() for batch in own]
    own.close()
    own.set_epoch(0)
    # Of the next epoch, everything is damaged.
    plan, found = type(own._plan_now()), threading.Event()
    blocks = plan.blocks

    def damaged(self: Any, start: Place, every: int = 1, *, say_ahead: bool) -> Iterator[Any]:
        if start.epoch:
            found.set()
            raise CorruptShardError("is damaged", remedy="none")
        yield from blocks(self, start, every, say_ahead=say_ahead)

    monkeypatch.setattr(plan, "blocks", damaged)
    assert all(map(torch.equal, [batch["mel"] for batch in own], whole))
    assert found.wait(PATIENCE)
    own.set_epoch(0)
    assert len(list(own)) == len(whole)
    with pytest.raises(CorruptShardError, match="is damaged"):
        next(iter(own))
    own.close()


def test_a_worker_knows_what_it_reads_next_once_it_has_outlived_an_epoch(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    own, parent = Position(), Position()
    monkeypatch.setattr(own._course, "change_parents", parent._course.change)
    monkeypatch.setattr(position, "this_worker", lambda: Worker(1, 3, seed=5))
    stretch = own.begin(end=100, step=4)
    assert own.following(stretch, 100, 4) is None
    for _ in range(3):
        stretch = own.begin(end=100, step=4)
        expected = own.following(stretch, 100, 4)
        assert own.begin(end=100, step=4) == expected
    assert expected == Stretch(Place(6, 4), 3)
