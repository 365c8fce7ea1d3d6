"""A buffer comes back when its last view is gone, and not before."""

from __future__ import annotations

import gc

import numpy as np
import pytest
import torch

from shardprep.load.buffers import BufferPool

F2 = np.dtype("<f2")


def address(array: np.ndarray) -> int:
    return int(array.__array_interface__["data"][0])


def test_memory_is_used_again_once_it_is_free() -> None:
    pool = BufferPool(2)
    first = pool.take((4, 5), F2)
    assert (first.shape, first.dtype) == ((4, 5), F2)
    assert first.flags.c_contiguous
    assert first.flags.writeable
    place = address(first)
    del first
    gc.collect()
    assert address(pool.take((2, 3), F2)) == place


@pytest.mark.parametrize(
    "view",
    [
        lambda array: array,
        lambda array: array[1:],
        lambda array: array.reshape(-1).view(np.uint8)[3:],
        lambda array: torch.from_numpy(array),
        lambda array: torch.from_numpy(array)[2],
        lambda array: torch.from_numpy(array).view(torch.int16).flatten()[7:],
        lambda array: torch.from_numpy(array).numpy()[1],
        lambda array: memoryview(array),
        lambda array: torch.from_numpy(array).untyped_storage(),
    ],
)
def test_memory_with_a_view_is_not_used_again(view: object) -> None:
    pool = BufferPool(2)
    array = pool.take((4, 5), F2)
    place = address(array)
    kept = view(array)  # type: ignore[operator]
    del array
    gc.collect()
    assert address(pool.take((4, 5), F2)) != place
    del kept
    gc.collect()
    places = {address(held) for held in [pool.take((4, 5), F2) for _ in range(2)]}
    assert place in places


def test_a_larger_buffer_is_made_if_the_unused_one_is_too_small() -> None:
    pool = BufferPool(2)
    pool.take((2,), F2)
    array = pool.take((3000,), F2)
    array[:] = 1
    assert array.sum() == 3000


def test_few_unused_buffers_are_kept() -> None:
    pool = BufferPool(3)
    held = [pool.take((1000,), F2) for _ in range(10)]
    del held
    gc.collect()
    assert len(pool._idle) == 3
