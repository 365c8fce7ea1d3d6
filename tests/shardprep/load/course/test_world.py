"""Rank and world size: given ones win, found ones are found when an epoch begins."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist
import torch.multiprocessing as mp

from shardprep import SegmentLoader, ShardprepError, Split, UtteranceLoader, open_shards
from shardprep.load.course.world import World, find_world

SEGMENTS: dict[str, Any] = {"batch_size": 4, "segment_frames": 8, "drop_last": False}
Loader = SegmentLoader | UtteranceLoader


@pytest.fixture
def split(edge_set: Path) -> Split:
    """28 utterances of 1 to 700 frames."""
    return open_shards(edge_set)["train"]


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """`launched(rank, size)`: this process as a launcher starts it; None unsets a variable."""

    def set_variables(rank: object, size: object) -> None:
        for name, value in (("RANK", rank), ("WORLD_SIZE", size)):
            if value is None:
                monkeypatch.delenv(name, raising=False)
            else:
                monkeypatch.setenv(name, str(value))

    set_variables(None, None)
    return set_variables


@pytest.mark.parametrize(
    ("variables", "given", "expected"),
    [
        ((None, None), (None, None), (0, 1)),
        (("", ""), (None, None), (0, 1)),
        ((2, 3), (None, None), (2, 3)),
        ((0, 1), (None, None), (0, 1)),
        ((None, 1), (None, None), (0, 1)),
        ((2, 3), (1, 2), (1, 2)),
        ((2, 3), (0, 1), (0, 1)),
        ((2, 3), (None, 1), (0, 1)),
        ((2, 3), (None, 3), (2, 3)),
        ((2, 3), (1, None), (1, 3)),
        ((None, None), (None, 4), (0, 4)),
        ((None, None), (3, 4), (3, 4)),
        # What is given whole is not looked up.
        (("x", "y"), (3, 4), (3, 4)),
    ],
)
def test_given_ones_win_and_others_come_from_the_launcher(
    launched: Callable[..., None], variables: Any, given: Any, expected: Any
) -> None:
    launched(*variables)
    assert find_world(*given) == World(*expected)


@pytest.mark.parametrize(
    ("variables", "key"),
    [
        ((None, 2), "RANK"),
        (("1", None), "RANK"),
        ((2, 2), "RANK"),
        ((-1, 2), "RANK"),
        (("one", 2), "RANK"),
        ((0, "two"), "WORLD_SIZE"),
        ((0, 0), "RANK"),
    ],
)
def test_variables_that_cannot_be_right_are_refused_by_name(
    split: Split, launched: Callable[..., None], variables: Any, key: str
) -> None:
    launched(*variables)
    for own in (SegmentLoader(split, **SEGMENTS), UtteranceLoader(split)):
        for ask in (iter, len):
            with pytest.raises(ShardprepError, match="give the loader rank and world_size") as e:
                ask(own)
            assert e.value.key == key


@pytest.mark.parametrize(
    "given", [{"rank": 1}, {"rank": -1}, {"world_size": 0}, {"rank": 2, "world_size": 2}]
)
@pytest.mark.parametrize(("kind", "options"), [(SegmentLoader, SEGMENTS), (UtteranceLoader, {})])
def test_given_ones_that_cannot_be_right_are_refused_at_once(
    split: Split, kind: Any, options: Any, given: Any
) -> None:
    with pytest.raises(ValueError, match="rank"):
        kind(split, **options, **given)


def indices(split: Split, own: Loader) -> list[int]:
    """The utterances that a loader gives, by their labels and first frames, or by their index."""
    found = []
    for batch in own:
        if "index" in batch:
            found += batch["index"].tolist()
            continue
        for mel, length in zip(batch["mel"], batch["length"].tolist(), strict=True):
            part = mel[:length].numpy().tobytes()
            found += [i for i in range(len(split)) if part in split.read(i).tobytes()]
    return found


@pytest.mark.parametrize(("kind", "options"), [(SegmentLoader, SEGMENTS), (UtteranceLoader, {})])
@pytest.mark.parametrize("size", [1, 2, 3])
def test_a_loader_that_is_built_before_its_rank_is_known_reads_its_part(
    split: Split, launched: Callable[..., None], kind: Any, options: Any, size: int
) -> None:
    loaders = [kind(split, **options) for _ in range(size)]
    seen = []
    for rank, own in enumerate(loaders):
        launched(rank, size)
        given = kind(split, **options, rank=rank, world_size=size)
        part = indices(split, own)
        assert part == indices(split, given)
        assert len(own) == len(given)
        seen += part
    assert sorted(seen) == list(range(len(split)))


def test_a_world_that_changes_between_epochs_is_found_again(
    split: Split, launched: Callable[..., None]
) -> None:
    own = SegmentLoader(split, **SEGMENTS)
    assert len(own) == 7
    assert len(indices(split, own)) == 28
    launched(1, 2)
    assert len(own) == 4
    assert len(indices(split, own)) == 14


def test_a_split_too_small_for_the_world_is_refused_when_the_epoch_begins(
    split: Split, launched: Callable[..., None]
) -> None:
    own = SegmentLoader(split, batch_size=10)
    launched(0, 3)
    with pytest.raises(ValueError, match="fewer than one batch of 10 on each of 3 ranks"):
        iter(own)


def read_in_group(rank: int, size: int, folder: Path, out: Path) -> None:
    split = open_shards(folder)["train"]
    # Built first, as by frameworks that start the group themselves.
    own = SegmentLoader(split, **SEGMENTS)
    os.environ.update(RANK="7", WORLD_SIZE="9")
    dist.init_process_group(
        "gloo", init_method=f"file://{out / 'meeting'}", rank=rank, world_size=size
    )
    seen = [indices(split, own) for _ in range(2)]
    dist.destroy_process_group()
    (out / str(rank)).write_text(repr(seen))


def test_torch_distributed_counts_more_than_variables(edge_set: Path, tmp_path: Path) -> None:
    mp.start_processes(read_in_group, (2, edge_set, tmp_path), nprocs=2, start_method="spawn")
    parts = [eval((tmp_path / str(rank)).read_text()) for rank in range(2)]
    for epoch in zip(*parts, strict=True):
        assert sorted([*epoch[0], *epoch[1]]) == list(range(28))
    assert parts[0][0] != parts[0][1]
