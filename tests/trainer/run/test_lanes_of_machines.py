"""With order windowed a machine reads only the shards of its own lanes, and batches stay equal."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

import shardprep

SHARDS = 24
PER_SHARD = 8
WORLD = 4


@pytest.fixture
def many_shards(make_dataset: Callable[..., Path], tmp_path: Path) -> Path:
    """24 shards of 8 utterances."""
    source = make_dataset(speakers=4, utterances=SHARDS * PER_SHARD // 4, frames=(20, 60))
    options = shardprep.BuildOptions(val_fraction=0.0, workers=1, samples_per_shard=PER_SHARD)
    shardprep.build_shards(source, tmp_path / "shards", options)
    return tmp_path / "shards"


def loader(folder: Path, rank: int, world_size: int, epoch: int) -> shardprep.SegmentLoader:
    found = shardprep.SegmentLoader(
        shardprep.open_shards(folder)["train"],
        batch_size=16 // world_size,
        segment_frames=64,
        order="windowed",
        lanes=8,
        window_shards=2,
        placement="host",
        # Batches that are made ahead are of the next epoch, whose lanes have other shards.
        prefetch=0,
        seed=3,
        rank=rank,
        world_size=world_size,
    )
    found.set_epoch(epoch)
    return found


def mapped(folder: Path) -> set[str]:
    """Names of the training shards in a folder that this process has mapped, by the system."""
    lines = Path("/proc/self/maps").read_text().splitlines()
    paths = [Path(line.split(maxsplit=5)[5]) for line in lines if line.endswith(".tar")]
    return {path.name for path in paths if path.parent == folder}


@pytest.mark.parametrize("epoch", [0, 1, 5])
def test_machines_share_no_shard_but_that_at_the_border_of_their_lanes(
    epoch: int, many_shards: Path, tmp_path: Path
) -> None:
    folders = [tmp_path / f"rank{rank}" for rank in range(WORLD)]
    # Kept open, as their maps go with them.
    loaders = []
    for rank, folder in enumerate(folders):
        shutil.copytree(many_shards, folder)
        loaders.append(loader(folder, rank, WORLD, epoch))
        assert not mapped(folder)
        assert sum(len(batch["label"]) for batch in loaders[-1]) == SHARDS * PER_SHARD // WORLD
    ranks = [mapped(folder) for folder in folders]
    # Two machines with two processes each.
    first, second = ranks[0] | ranks[1], ranks[2] | ranks[3]
    assert first | second == {path.name for path in many_shards.glob("train-*.tar")}
    assert len(first & second) <= 1
    assert all(len(shards) <= SHARDS // WORLD + 2 for shards in ranks)
    for one, other in ((0, 1), (1, 2), (2, 3)):
        assert len(ranks[one] & ranks[other]) <= 1
    for one, other in ((0, 2), (0, 3), (1, 3)):
        assert not ranks[one] & ranks[other]


@pytest.mark.parametrize("epoch", [0, 1])
def test_the_batches_of_an_epoch_are_the_same_at_every_world_size(
    epoch: int, many_shards: Path
) -> None:
    def batches(world_size: int) -> list[list[str]]:
        ranks = [iter(loader(many_shards, rank, world_size, epoch)) for rank in range(world_size)]
        found = []
        for parts in zip(*ranks, strict=True):
            segments = [segment for part in parts for segment in part["mel"].numpy()]
            found.append(sorted(hashlib.md5(segment.tobytes()).hexdigest() for segment in segments))
        return found

    alone = batches(1)
    # Whole utterances, none of them twice.
    assert len({segment for batch in alone for segment in batch}) == SHARDS * PER_SHARD
    assert batches(2) == batches(4) == alone
