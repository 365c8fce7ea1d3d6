"""Which part of the data this process reads: found when an epoch begins, unless it is given.

A loader is often built before its process learns its rank: Lightning, for one, starts the other
processes only in `fit`.
"""

from __future__ import annotations

import os
from typing import NamedTuple

import torch

from shardprep.errors import ShardprepError

RANK, WORLD_SIZE = "RANK", "WORLD_SIZE"


class World(NamedTuple):
    """One process among those that read a split together."""

    rank: int = 0
    size: int = 1


def check_given(rank: int | None, size: int | None) -> None:
    """Make sure that a given rank and a given world size are possible.

    Raises:
        ValueError: They are not.
    """
    if (size is not None and size < 1) or (rank is not None and rank < 0):
        raise ValueError(f"rank {rank}, world_size {size}: the rank counts from 0, the size from 1")
    if rank is not None:
        find_world(rank, size)


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
