"""Iterations, `set_epoch` and states in any order, beside a naive model of whole epochs."""

from __future__ import annotations

import itertools
import logging
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from shardprep import SegmentLoader, ShardprepError, Split, open_shards
from shardprep.load.course.epochs import Course, Place

Batch = dict[str, torch.Tensor]
KINDS: dict[str, dict[str, Any]] = {
    "global": {},
    "smaller last batch": {"drop_last": False, "batch_size": 5},
    "windowed": {"order": "windowed", "lanes": 4, "window_shards": 1},
    "nothing ahead": {"prefetch": 0},
    "in order": {"shuffle": False},
}


@pytest.fixture
def split(edge_set: Path) -> Split:
    """28 utterances of 1 to 700 frames."""
    return open_shards(edge_set)["train"]


def loader(split: Split, **options: Any) -> SegmentLoader:
    return SegmentLoader(split, **{"batch_size": 4, "segment_frames": 32, **options})


def bits(batches: list[Batch]) -> list[bytes]:
    return [batch["mel"].numpy().tobytes() for batch in batches]


class Epochs:
    """Every epoch of a loader as a list, each read by a fresh loader from begin to end."""

    def __init__(self, make: Callable[[], SegmentLoader]) -> None:
        self._make = make
        self._read: dict[int, list[bytes]] = {}

    def __getitem__(self, epoch: int) -> list[bytes]:
        if epoch not in self._read:
            fresh = self._make()
            fresh.set_epoch(epoch)
            self._read[epoch] = bits(list(fresh))
        return self._read[epoch]


class Model:
    """What a loader is to give: the epoch that comes next, and how much of it came before."""

    def __init__(self, epochs: Epochs) -> None:
        self.epochs = epochs
        self.next = self.stands = (0, 0)

    def take(self, count: int) -> list[bytes]:
        epoch, skipped = self.stands = self.next
        whole = self.epochs[epoch]
        taken = whole[skipped : skipped + count]
        if taken:
            self.next = (epoch + 1, 0)
            came = skipped + len(taken)
            self.stands = (epoch, came) if came < len(whole) else self.next
        return taken

    def set_epoch(self, epoch: int) -> None:
        self.stands = self.next = self.next if self.next[0] == epoch else (epoch, 0)


# How many batches an iteration takes; 7 are an epoch, and None reads until it ends by itself.
takes = st.tuples(st.just("take"), st.one_of(st.integers(0, 7), st.just(7), st.none()))
others = st.one_of(
    st.tuples(st.just("set_epoch"), st.integers(0, 3)),
    st.tuples(st.just("save"), st.none()),
    st.tuples(st.just("load"), st.integers(0, 5)),
    st.tuples(st.just("load fresh"), st.integers(0, 5)),
    st.tuples(st.just("close"), st.none()),
)


@pytest.mark.parametrize("kind", KINDS)
@given(steps=st.lists(st.one_of(takes, others), max_size=12))
@settings(max_examples=30)
def test_every_order_of_calls_gives_what_the_model_gives(
    edge_set: Path, kind: str, steps: list[tuple[str, Any]]
) -> None:
    split = open_shards(edge_set)["train"]
    make = lambda: loader(split, **KINDS[kind])  # noqa: E731
    own, model = make(), Model(Epochs(make))
    whole = len(own)
    saved = [(own.state_dict(), model.stands)]
    kept = []  # An iterator that is still held is no less over.
    for step, argument in steps:
        if step == "take":
            kept.append(iterator := iter(own))
            count = whole + 1 if argument is None else argument
            assert bits(list(itertools.islice(iterator, count))) == model.take(count)
        elif step == "set_epoch":
            own.set_epoch(argument)
            model.set_epoch(argument)
        elif step == "close":
            own.close()
        elif step == "save":
            saved.append((own.state_dict(), model.stands))
        else:
            state, place = saved[argument % len(saved)]
            own = make() if step == "load fresh" else own
            own.load_state_dict(state)
            model.stands = model.next = place
        assert len(own) == whole
        fresh = make()
        fresh.load_state_dict(own.state_dict())
        epoch, skipped = model.stands
        assert bits(list(fresh)) == model.epochs[epoch][skipped:]


@pytest.mark.parametrize("kind", KINDS)
def test_loops_that_take_exactly_len_batches_get_every_epoch(split: Split, kind: str) -> None:
    own, whole = loader(split, **KINDS[kind]), Epochs(lambda: loader(split, **KINDS[kind]))
    for epoch in range(4):
        assert bits(list(itertools.islice(own, len(own)))) == whole[epoch]
    assert len(whole[0]) == len(own)
    assert kind == "in order" or len({tuple(whole[epoch]) for epoch in range(4)}) == 4


def test_a_loop_that_sets_every_epoch_reads_the_same_as_one_that_sets_none(split: Split) -> None:
    setting, plain = loader(split), loader(split)
    for epoch in range(3):
        setting.set_epoch(epoch)
        assert setting.epoch == plain.epoch == epoch
        assert bits(list(setting)) == bits(list(plain))


def test_set_epoch_keeps_a_place_that_was_loaded_within_that_epoch(split: Split) -> None:
    begun = loader(split)
    begun.set_epoch(2)
    next(iter(begun))
    rest = loader(split)
    rest.load_state_dict(begun.state_dict())
    rest.set_epoch(2)
    assert bits(list(rest)) == Epochs(lambda: loader(split))[2][1:]


def test_set_epoch_during_an_iteration_is_for_the_next_one(split: Split) -> None:
    own, whole = loader(split), Epochs(lambda: loader(split))
    running = iter(own)
    next(running)
    own.set_epoch(5)
    assert own.state_dict()["epoch"] == 5
    assert bits([next(running)]) == whole[0][1:2]
    # A state that is taken now belongs to the batches that come now.
    assert own.state_dict()["epoch"] == 0
    assert bits(list(running)) == whole[0][2:]
    assert bits(list(own)) == whole[5]


def test_a_state_after_the_last_batch_begins_the_next_epoch(split: Split) -> None:
    own = loader(split)
    for _ in zip(range(len(own)), own, strict=False):
        pass
    state = own.state_dict()
    assert (state["epoch"], state["position"]) == (1, 0)


def test_a_position_behind_the_last_batch_of_a_larger_size_begins_the_next_epoch(
    split: Split,
) -> None:
    own = loader(split)
    list(itertools.islice(own, 6))  # 24 of 28 utterances; batches of 12 end there.
    large = loader(split, batch_size=12)
    large.load_state_dict(own.state_dict())
    assert bits(list(large)) == Epochs(lambda: loader(split, batch_size=12))[1]


def test_a_second_iteration_ends_the_first(split: Split, caplog: pytest.LogCaptureFixture) -> None:
    own, whole = loader(split, prefetch=3), Epochs(lambda: loader(split))
    first = iter(own)
    next(first)
    before = prefetching()
    second = iter(own)
    next(second)
    # The same thread prepares the batches of both.
    assert prefetching() == before
    state = own.state_dict()
    with caplog.at_level(logging.WARNING, "shardprep"):
        assert list(first) == []
    assert "make two loaders" in caplog.text
    assert own.state_dict() == state
    assert bits(list(second)) == whole[1][1:]


def test_an_iterator_that_never_gave_a_batch_is_ended_too(split: Split) -> None:
    own, whole = loader(split), Epochs(lambda: loader(split))
    first, second = iter(own), iter(own)
    assert list(first) == []
    assert bits(list(second)) == whole[0]


def test_loading_a_state_ends_the_running_iteration(split: Split) -> None:
    own = loader(split)
    state = own.state_dict()
    running = iter(own)
    next(running)
    own.load_state_dict(state)
    assert list(running) == []
    assert own.state_dict() == state


def prefetching() -> int:
    return sum(thread.name.startswith("shardprep-prefetch") for thread in threading.enumerate())


def test_a_windowed_position_is_refused_once_the_batch_of_all_ranks_turns_out_another(
    split: Split, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The position of a loader that is resumed before its process learns its rank.
    begun = loader(split, **KINDS["windowed"])
    next(iter(begun))
    own = loader(split, **KINDS["windowed"])
    own.load_state_dict(begun.state_dict())
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ShardprepError, match="global_batch 4, this loader 8"):
        iter(own)


@given(st.data())
def test_workers_of_one_iteration_read_one_epoch_however_late_they_join(data: Any) -> None:
    """Iterations begin one after another; all but one worker of each may join much later."""
    counts = data.draw(st.lists(st.integers(1, 4), min_size=1, max_size=6))
    first = [data.draw(st.integers(0, count - 1)) for count in counts]
    late = [
        (iteration, worker)
        for iteration, count in enumerate(counts)
        for worker in range(count)
        if worker != first[iteration]
    ]
    joins: list[tuple[int, int]] = []
    for iteration, worker in enumerate(first):
        joins.append((iteration, worker))
        for other in list(late):
            if other[0] <= iteration and data.draw(st.booleans()):
                joins.append(other)
                late.remove(other)
    course = Course()
    for iteration, worker in [*joins, *late]:
        # New workers have a seed of their own; workers that stay count their iterations.
        name = data.draw(st.just((7, iteration)))
        course = course.joined(name, worker, 28)
        team = course.team(name)
        assert team is not None
        assert team.start == Place(iteration)
    assert course.upcoming == Place(len(counts))


@given(counts=st.lists(st.integers(1, 4), max_size=5))
def test_teams_of_one_name_read_different_epochs(counts: list[int]) -> None:
    # `torch.manual_seed(0)` before every epoch.
    course = Course()
    for epoch, count in enumerate(counts):
        for worker in range(count):
            if worker and count > counts[epoch - 1] > 0 and epoch:
                break  # A worker that was never in the team before could join that one.
            course = course.joined((0, 0), worker, 28)
            team = course.team((0, 0))
            assert team is not None
            assert team.start == Place(epoch)
