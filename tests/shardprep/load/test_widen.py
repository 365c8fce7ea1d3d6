"""A set of uint8 gives the same float32, bit by bit, in every way in which it is read."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.data import DataLoader

import shardprep
from shardprep import SegmentDataset, SegmentLoader, Split, UtteranceLoader, open_shards
from shardprep.read.gather import widen

Batch = dict[str, torch.Tensor]
FRAMES = 64
WAYS: dict[str, dict[str, Any]] = {
    "host": {},
    "nothing ahead": {"prefetch": 0},
    "device": {"placement": "device", "device": "cpu"},
    "float32": {"dtype": torch.float32},
}


@pytest.fixture(params=["none", "zstd"])
def split(request: pytest.FixtureRequest, edge_sets: dict[tuple[str, str], Path]) -> Split:
    """28 utterances of 1 to 700 frames, some shorter than a segment."""
    return open_shards(edge_sets["uint8", request.param])["train"]


def loader(split: Split, **options: Any) -> SegmentLoader:
    arguments = {"batch_size": 4, "segment_frames": FRAMES, "pad_value": -7.5, **options}
    return SegmentLoader(split, **arguments)


def expected(split: Split, indices: np.ndarray, starts: np.ndarray) -> np.ndarray:
    """Segments (B, T, F), from whole utterances as `Split.read` gives them."""
    mel = np.full((len(indices), FRAMES, split.n_mels), -7.5, np.float32)
    for row, index, start in zip(mel, indices, starts, strict=True):
        own = split.read(int(index))[start : start + FRAMES]
        row[: len(own)] = own
    return mel


def plan(split: Split) -> list[tuple[np.ndarray, np.ndarray]]:
    """Utterances and starts of each batch of the first epoch."""
    own = loader(split)._plan_now()
    return [
        (block.indices[at : at + 4], block.starts[at : at + 4])
        for block in own.blocks(shardprep.load.course.epochs.Place(), say_ahead=False)
        for at in range(0, len(block.indices), 4)
    ]


def widened(batch: Batch) -> torch.Tensor:
    assert set(batch) == {"mel", "label", "length", "minimum", "step"}
    assert batch["mel"].dtype == torch.uint8
    assert batch["minimum"].dtype == batch["step"].dtype == torch.float32
    scales = (batch["minimum"], batch["step"])
    return shardprep.dequantise(batch["mel"], *scales, batch["length"], pad_value=-7.5)


@pytest.mark.parametrize("way", WAYS)
def test_segments_are_those_of_whole_utterances_and_padding_is_the_pad_value(
    split: Split, way: str
) -> None:
    batches = list(loader(split, **WAYS[way]))
    assert any((batch["length"] < FRAMES).any() for batch in batches)
    for batch, (indices, starts) in zip(batches, plan(split), strict=True):
        assert set(batch) == {"mel", "label", "length"}
        assert batch["mel"].dtype == torch.float32
        assert np.array_equal(batch["mel"].numpy(), expected(split, indices, starts))


@pytest.mark.parametrize("placement", ["host", "device"])
def test_bytes_come_as_they_are_stored_and_are_widened_to_the_same_bits(
    split: Split, placement: str
) -> None:
    batches = loader(split, dtype=torch.uint8, device="cpu", placement=placement)
    for batch, (indices, starts) in zip(batches, plan(split), strict=True):
        stored = split.stored_segments(indices, starts, FRAMES)
        assert np.array_equal(batch["mel"].numpy(), stored)
        assert np.array_equal(widened(batch).numpy(), expected(split, indices, starts))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_another_dtype_is_that_of_the_widened_values(split: Split, dtype: torch.dtype) -> None:
    for batch, wide in zip(loader(split, dtype=dtype), loader(split), strict=True):
        assert batch["mel"].dtype == dtype
        assert torch.equal(batch["mel"], wide["mel"].to(dtype))


@pytest.mark.filterwarnings("ignore:This DataLoader will create:UserWarning")
def test_workers_of_a_dataloader_give_bytes_and_values_too(split: Split) -> None:
    options = {"batch_size": None, "num_workers": 2, "multiprocessing_context": "fork"}
    whole = [batch["mel"] for batch in loader(split)]
    wide = DataLoader(loader(split), **options)
    stored = DataLoader(loader(split, dtype=torch.uint8), **options)
    assert all(map(torch.equal, [batch["mel"] for batch in wide], whole))
    assert all(map(torch.equal, map(widened, stored), whole))


def test_whole_utterances_and_items_are_widened(split: Split) -> None:
    for batch in UtteranceLoader(split, max_frames=900, pad_value=-7.5):
        for mel, length, index in zip(*(batch[x] for x in ("mel", "length", "index")), strict=True):
            assert np.array_equal(mel[:length].numpy(), split.read(int(index)))
            assert (mel[length:] == -7.5).all()
    items = SegmentDataset(split, FRAMES, random_start=False, pad_value=-7.5)
    indices = np.arange(len(split))
    mel = torch.stack([item["mel"] for item in items.__getitems__(indices.tolist())])
    assert np.array_equal(mel.numpy(), expected(split, indices, np.zeros_like(indices)))


def test_damage_is_replaced_in_bytes_as_in_values(split: Split) -> None:
    options = {"verify_reads": "once", "on_corrupt": "skip"}
    intact = split.intact
    broken = plan(split)[0][0][1]
    split.intact = lambda indices: intact(indices) & (indices != broken)  # type: ignore[method-assign]
    batches = list(loader(split, dtype=torch.uint8, **options))
    others = list(loader(split, **options))
    assert torch.equal(batches[0]["mel"][1], batches[0]["mel"][2])
    assert batches[0]["step"][1] == batches[0]["step"][2]
    for batch, other in zip(batches, others, strict=True):
        assert torch.equal(widened(batch), other["mel"])


def test_bytes_of_other_sets_and_whole_numbers_are_refused(split: Split, edge_set: Path) -> None:
    floats = open_shards(edge_set)["train"]
    with pytest.raises(ValueError, match="stores float16; only a set .* --dtype uint8"):
        loader(floats, dtype=torch.uint8)
    with pytest.raises(ValueError, match=r"torch\.int64: must be a type of floats"):
        loader(split, dtype=torch.int64)
    with pytest.raises(TypeError, match=r"torch\.float32: dequantise takes torch\.uint8"):
        shardprep.dequantise(torch.zeros(1, 2, 3), torch.zeros(1), torch.ones(1))


@given(st.integers(0, 2**32 - 1), st.integers(0, 5), st.integers(1, 9), st.integers(1, 50))
def test_pieces_of_any_size_give_two_rounded_operations(
    seed: int, rows: int, frames: int, piece: int
) -> None:
    rng = np.random.default_rng(seed)
    levels = rng.integers(0, 256, (rows, frames, 3), np.uint8)
    minimum, step = rng.normal(0, 30, (2, rows)).astype(np.float32)
    length = rng.integers(0, frames + 1, rows)
    # Rounded from float64: the product of a byte and a float32 is exact there.
    product = (levels * step[:, None, None].astype(np.float64)).astype(np.float32)
    mel = (product + minimum[:, None, None].astype(np.float64)).astype(np.float32)
    tensors = [torch.from_numpy(x) for x in (levels, minimum, step)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(widen, "_PIECE", piece)
        assert np.array_equal(shardprep.dequantise(*tensors).numpy(), mel)
        mel[np.arange(frames) >= length[:, None]] = -20
        found = shardprep.dequantise(*tensors, torch.from_numpy(length))
        assert np.array_equal(found.numpy(), mel)


class Operations(TorchDispatchMode):
    """Notes the operations of PyTorch."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(str(func))
        return func(*args, **(kwargs or {}))


def test_pytorchs_threads_which_wait_for_each_other_have_no_part_in_it() -> None:
    levels = torch.ones((2, 3, 4), dtype=torch.uint8)
    minimum, step = torch.zeros(2), torch.ones(2)
    with Operations() as used:
        out = shardprep.dequantise(levels, minimum, step)
    assert not any(word in name for name in used.names for word in ("copy", "mul", "add"))
    assert torch.equal(out, torch.ones(2, 3, 4))


def test_it_is_compiled_without_a_break() -> None:
    levels = torch.randint(0, 256, (3, 5, 2), dtype=torch.uint8)
    arguments = (levels, torch.randn(3), torch.rand(3), torch.tensor([5, 2, 0]))
    compiled = torch.compile(shardprep.dequantise, fullgraph=True, backend="eager")
    assert torch.equal(compiled(*arguments), shardprep.dequantise(*arguments))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_a_gpu_bytes_travel_and_lie_and_values_are_the_same(split: Split) -> None:
    whole = [batch["mel"] for batch in loader(split)]
    for placement in ("host", "device"):
        own = loader(split, device="cuda", placement=placement)
        for batch, mel in zip(own, whole, strict=True):
            assert torch.equal(batch["mel"].cpu(), mel)
        own = loader(split, device="cuda", placement=placement, dtype=torch.uint8)
        for batch, mel in zip(own, whole, strict=True):
            assert torch.equal(widened(batch).cpu(), mel)
