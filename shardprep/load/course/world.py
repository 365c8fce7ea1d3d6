"""Which part of a split this process reads: found when an epoch begins, unless it is given.

A loader is often built before its process learns its rank: Lightning, for one, starts the other
processes only in `fit`.
"""

from __future__ import annotations

import contextlib
import operator
import os
import sys
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch.utils.data import get_worker_info

from shardprep.errors import ShardprepError

RANK, WORLD_SIZE = "RANK", "WORLD_SIZE"


class World(NamedTuple):
    """One process among those that read a split together."""

    rank: int = 0
    size: int = 1


@dataclass(frozen=True)
class Worker:
    """A worker of a DataLoader."""

    number: int
    count: int
    """How many there are."""
    seed: int
    """What the workers of one iteration have in common, if they are new in it."""


class Part:
    """Which part of a split a loader reads.

    Args:
        rank: As given to the loader.
        world_size: As given to the loader.

    Raises:
        ValueError: The given ones are not possible.
    """

    def __init__(self, rank: int | None, world_size: int | None) -> None:
        if (world_size is not None and world_size < 1) or (rank is not None and rank < 0):
            raise ValueError(
                f"rank {rank}, world_size {world_size}: the rank counts from 0, the size from 1"
            )
        # NumPy's integers are no JSON in a state.
        self._given = tuple(None if x is None else operator.index(x) for x in (rank, world_size))
        self._copied_from: World | None = None
        if rank is not None:
            self.world()

    def world(self) -> World:
        """The world at this moment; raises as `find_world` does."""
        if self._copied_from is not None and this_worker() is not None:
            return self._copied_from
        return find_world(*self._given)

    def __getstate__(self) -> dict[str, Any]:
        # A worker that is spawned has no torch.distributed: it belongs to the rank that starts it.
        found = None
        with contextlib.suppress(ShardprepError, ValueError):
            found = self.world()
        return {**self.__dict__, "_copied_from": found}


def this_worker() -> Worker | None:
    """The worker of a DataLoader that this process is; None if it is none."""
    info = get_worker_info()
    return None if info is None else Worker(info.id, info.num_workers, info.seed - info.id)


def find_world(rank: int | None = None, size: int | None = None) -> World:
    """The world of this process at this moment.

    Args:
        rank: This process's number; None finds it.
        size: Number of processes; None finds it.

    Returns:
        What is given; what is not given comes from torch.distributed where it is initialised, else
        from the variables RANK and WORLD_SIZE, which torchrun and accelerate set. Without those,
        this is the only process.

    Raises:
        ValueError: The rank is not below the world size.
        ShardprepError: The variables cannot be right.
    """
    if rank is None or size is None:
        found = _found()
        size = found.size if size is None else size
        if rank is None:
            rank = found.rank if size > 1 else 0
    if not 0 <= rank < size:
        raise ValueError(
            f"rank {rank} of {size}: must be below the world size; give both rank and world_size, "
            "or neither"
        )
    return World(rank, size)


def refuse_second_division(loader: object, part: Part) -> None:
    """Refuse that accelerate divides the batches of a rank among all ranks once more.

    Accelerator.prepare makes a DataLoader over an iterable send the batches of rank 0 to all ranks,
    or makes each rank keep some of its own batches only.

    Args:
        loader: What is iterated over.
        part: What it reads of its split.

    Raises:
        ShardprepError: accelerate would do so.
    """
    module = sys.modules.get("accelerate.data_loader")
    if module is None:
        return
    active = module.GradientState().active_dataloader
    dataset = getattr(active, "dataset", None)
    divided = isinstance(dataset, module.IterableDatasetShard) and dataset.dataset is loader
    dispatched = isinstance(active, module.DataLoaderDispatcher) and dataset is loader
    if (divided or dispatched) and (world := part.world()).size > 1:
        raise ShardprepError(
            "accelerate would divide the batches of a rank among all ranks once more, and "
            f"{world.size - 1} of every {world.size} utterances would be lost",
            key="accelerator.prepare",
            remedy="Do not prepare a DataLoader over a loader of shardprep: the loader finds its "
            "rank by itself. Iterate over the loader, or over the DataLoader as you made it.",
        )


def _found() -> World:
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return World(torch.distributed.get_rank(), torch.distributed.get_world_size())
    size = _number(WORLD_SIZE)
    rank = _number(RANK)
    if rank is None and (size or 1) > 1:
        raise ShardprepError(
            f"is not set, although {WORLD_SIZE} is {size}",
            key=RANK,
            remedy="Initialise torch.distributed before the first batch, or give the loader rank "
            "and world_size.",
        )
    world = World(rank or 0, 1 if size is None else size)
    if not 0 <= world.rank < world.size:
        raise ShardprepError(
            f"is {world.rank}, and {WORLD_SIZE} is {'not set' if size is None else size}",
            key=RANK,
            remedy="The rank must be below the number of processes: correct the variables, or give "
            "the loader rank and world_size.",
        )
    return world


def _number(variable: str) -> int | None:
    text = os.environ.get(variable)
    if not text:
        return None
    try:
        return int(text)
    except ValueError:
        raise ShardprepError(
            f"is {text!r}, expected a number",
            key=variable,
            remedy="Correct the variable, or give the loader rank and world_size.",
        ) from None
