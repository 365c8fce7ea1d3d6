"""A loader in a DataLoader with workers gives the batches that it gives by itself, in order."""

from __future__ import annotations

import copy
import itertools
import multiprocessing
import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.utils.data import DataLoader

from shardprep import SegmentLoader, ShardprepError, Split, UtteranceLoader, open_shards
from shardprep.storage import shared_value

Batch = dict[str, torch.Tensor]

pytestmark = pytest.mark.filterwarnings("ignore:This DataLoader will create:UserWarning")


@pytest.fixture
def split(edge_set: Path) -> Split:
    """28 utterances of 1 to 700 frames."""
    return open_shards(edge_set)["train"]


def loader(split: Split, **options: Any) -> SegmentLoader:
    return SegmentLoader(split, **{"batch_size": 4, "segment_frames": 16, **options})


def bits(batches: Any) -> list[bytes]:
    return [batch["mel"].numpy().tobytes() for batch in batches]


def epochs(split: Split, count: int, **options: Any) -> list[list[bytes]]:
    own = loader(split, **options)
    return [bits(own) for _ in range(count)]


def workers(dataset: Any, count: int = 2, **options: Any) -> DataLoader[Batch]:
    chosen = {"multiprocessing_context": "fork", **options}
    return DataLoader(dataset, batch_size=None, num_workers=count, **chosen)


@pytest.mark.parametrize("persistent", [False, True])
@pytest.mark.parametrize("count", [1, 2, 3])
@pytest.mark.parametrize(
    "options",
    [{}, {"drop_last": False, "batch_size": 5}, {"order": "windowed", "lanes": 4, "prefetch": 0}],
    ids=["global", "smaller last batch", "windowed"],
)
def test_workers_give_every_epoch_in_the_loaders_own_order(
    split: Split, options: dict[str, Any], count: int, persistent: bool
) -> None:
    whole = epochs(split, 6, **options)
    own = loader(split, **options)
    batches = workers(own, count, persistent_workers=persistent)
    assert len(batches) == len(whole[0])
    assert bits(batches) == whole[0]
    # Broken off after a batch, and stopped after exactly as many as there are.
    assert bits(itertools.islice(batches, 1)) == whole[1][:1]
    assert bits(itertools.islice(batches, len(batches))) == whole[2]
    assert own.epoch == 2
    own.set_epoch(5)
    assert bits(batches) == whole[5]
    begun = loader(split, **options)
    list(itertools.islice(begun, 3))
    own.load_state_dict(begun.state_dict())
    assert bits(batches) == whole[0][3:]
    assert bits(batches) == whole[1]
    # The process itself goes on where its workers stopped, and they where it stops.
    assert bits(itertools.islice(own, 2)) == whole[2][:2]
    assert own.state_dict()["epoch"] == 2
    assert bits(batches) == whole[3]


@pytest.mark.slow
@pytest.mark.parametrize(("start", "persistent"), [("spawn", False), ("forkserver", True)])
def test_workers_that_are_not_forked_do_so_too(split: Split, start: str, persistent: bool) -> None:
    whole = epochs(split, 6)
    own = loader(split)
    next(iter(own))
    batches = workers(own, multiprocessing_context=start, persistent_workers=persistent)
    assert bits(batches) == whole[1]
    assert bits(itertools.islice(batches, 1)) == whole[2][:1]
    own.set_epoch(5)
    assert bits(batches) == whole[5]


def test_a_script_that_sets_the_seed_before_every_epoch_still_gets_them_all(split: Split) -> None:
    batches = workers(loader(split))
    for expected in epochs(split, 3):
        torch.manual_seed(0)
        assert bits(batches) == expected


@pytest.mark.parametrize("count", [1, 2, 3, 20])
def test_whole_utterances_come_in_the_loaders_own_order(split: Split, count: int) -> None:
    own = UtteranceLoader(split, max_frames=600, rank=0, world_size=2)
    expected = [batch["index"].tolist() for batch in own]
    batches = workers(own, count)
    for _ in range(2):
        assert [batch["index"].tolist() for batch in batches] == expected
    assert len(batches) == len(expected)


def test_a_dataloader_without_workers_leaves_the_state_to_the_loader(split: Split) -> None:
    whole = epochs(split, 2)
    own = loader(split)
    batches = iter(DataLoader(own, batch_size=None))
    assert bits(itertools.islice(batches, 3)) == whole[0][:3]
    other = loader(split)
    other.load_state_dict(own.state_dict())
    assert bits(DataLoader(other, batch_size=None)) == whole[0][3:]
    assert bits(DataLoader(other, batch_size=None)) == whole[1]


def test_the_state_of_a_loader_that_workers_read_is_refused(split: Split) -> None:
    own = loader(split)
    list(workers(own))
    with pytest.raises(ShardprepError, match="StatefulDataLoader") as caught:
        own.state_dict()
    assert caught.value.key == "state_dict"
    own.set_epoch(3)
    assert own.state_dict()["epoch"] == 3


def test_the_state_of_another_worker_is_refused(split: Split) -> None:
    state = {**loader(split).state_dict(), "worker": 1, "workers": 3}
    with pytest.raises(ShardprepError, match="worker 1 of 3 .* loaded not in a worker"):
        loader(split).load_state_dict(state)


def test_batches_on_a_device_are_refused_in_workers(split: Split) -> None:
    with pytest.raises(ShardprepError, match="placement device.*on the host only"):
        list(workers(loader(split, placement="device", device="cpu")))


def test_workers_without_a_shared_epoch_are_refused(
    split: Split, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> None:
        raise OSError(24, "Too many open files")

    monkeypatch.setattr(shared_value._File, "new", full)
    with pytest.raises(ShardprepError, match="ulimit -n.*num_workers=0"):
        list(workers(loader(split)))


def ranks(start: str, run: Callable[..., None], *arguments: Any) -> None:
    """Run two processes, `run(rank, *arguments)`."""
    context = multiprocessing.get_context(start)
    processes = [context.Process(target=run, args=(rank, *arguments)) for rank in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
        assert process.exitcode == 0


def read_as_rank(rank: int, own: SegmentLoader, folder: Path, start: str) -> None:
    os.environ.update(RANK=str(rank), WORLD_SIZE="2")
    batches = workers(own, multiprocessing_context=start)
    (folder / str(rank)).write_bytes(pickle.dumps([bits(batches) for _ in range(3)]))


def test_ranks_that_are_forked_from_one_process_count_for_themselves(
    split: Split, tmp_path: Path
) -> None:
    whole = epochs(split, 3, batch_size=8)
    own = loader(split)
    ranks("fork", read_as_rank, own, tmp_path, "fork")
    parts = [pickle.loads((tmp_path / str(rank)).read_bytes()) for rank in range(2)]
    for epoch in range(3):
        pairs = zip(parts[0][epoch], parts[1][epoch], strict=True)
        assert [one + other for one, other in pairs] == whole[epoch]
    # Nor does this process hear of them.
    assert own.state_dict()["epoch"] == 0


def read_in_group(rank: int, own: SegmentLoader, folder: Path) -> None:
    meeting = f"file://{folder / 'meeting'}"
    dist.init_process_group("gloo", init_method=meeting, rank=rank, world_size=2)
    batches = workers(own, multiprocessing_context="spawn")
    (folder / str(rank)).write_bytes(pickle.dumps(bits(batches)))
    dist.destroy_process_group()


@pytest.mark.slow
def test_spawned_workers_have_the_rank_of_their_process(split: Split, tmp_path: Path) -> None:
    ranks("spawn", read_in_group, loader(split), tmp_path)
    parts = [pickle.loads((tmp_path / str(rank)).read_bytes()) for rank in range(2)]
    pairs = zip(*parts, strict=True)
    assert [one + other for one, other in pairs] == epochs(split, 1, batch_size=8)[0]


@pytest.mark.parametrize("clone", [lambda x: pickle.loads(pickle.dumps(x)), copy.deepcopy])
@pytest.mark.parametrize("placement", ["host", "device"])
def test_a_copy_goes_on_for_itself(
    split: Split, clone: Callable[[Any], Any], placement: str
) -> None:
    whole = epochs(split, 2)
    own = loader(split, placement=placement, device="cpu")
    assert bits(clone(own)) == whole[0]
    running = iter(own)
    assert bits(itertools.islice(running, 2)) == whole[0][:2]
    copied = clone(own)
    assert copied.state_dict() == own.state_dict()
    assert bits(copied) == whole[1]
    assert bits(running) == whole[0][2:]
    utterances = UtteranceLoader(split)
    assert bits(clone(utterances)) == bits(utterances)
