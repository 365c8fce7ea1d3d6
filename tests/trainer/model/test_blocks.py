"""The blocks against the `conformer` package, and what padding and batch-mates may not do."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import conformer
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from shardprep_trainer.model.blocks import QUERY_BLOCK, ConformerBlock, TransformerBlock

SMALL: dict[str, Any] = {"dim": 8, "heads": 2, "dim_head": 4, "ff_mult": 2, "conv_kernel_size": 7}
BLOCKS: dict[str, Callable[[], nn.Module]] = {
    "conformer": lambda: ConformerBlock(**SMALL),
    "transformer": lambda: TransformerBlock(dim=8, heads=2, ff_dim=16, dropout=0.0),
}


def seeded(build: Callable[[], Any], seed: int = 0) -> Any:
    torch.manual_seed(seed)
    return build()


def pair_of_blocks(**options: Any) -> tuple[nn.Module, nn.Module]:
    """The package's block and ours, in float64, with the same weights."""
    options = {**SMALL, **options}
    package = seeded(lambda: conformer.ConformerBlock(**options)).double()
    ours = ConformerBlock(**options).double()
    ours.load_state_dict(package.state_dict())
    return package, ours


def mask_of(lengths: list[int]) -> Tensor:
    return torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]


# One frame; one query block, exactly full; a last block of one query; far beyond the +-512 clamp.
@pytest.mark.parametrize("frames", [1, 40, QUERY_BLOCK, QUERY_BLOCK + 1, 1300])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("masked", [True, False])
def test_outputs_and_gradients_equal_the_package(frames: int, training: bool, masked: bool) -> None:
    package, ours = pair_of_blocks()
    package.train(training)
    ours.train(training)
    x = torch.randn(2, frames, 8, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(2, frames, 8, dtype=torch.float64)
    results = []
    for block, arguments in ((package, {}), (ours, {"mask": torch.ones(2, frames).bool()})):
        output = block(x, **(arguments if masked else {}))
        gradients = torch.autograd.grad((output * weight).sum(), [x, *block.parameters()])
        results.append([output, *gradients, *block.buffers()])
    for expected, found in zip(*results, strict=True):
        torch.testing.assert_close(found, expected, atol=1e-10, rtol=1e-10)


def test_a_float32_block_of_boss_width_equals_the_package() -> None:
    package = seeded(lambda: conformer.ConformerBlock(dim=512)).eval()
    ours = ConformerBlock(dim=512).eval()
    ours.load_state_dict(package.state_dict())
    x = torch.randn(1, 128, 512)
    with torch.no_grad():
        torch.testing.assert_close(ours(x), package(x), atol=1e-5, rtol=1e-5)


def test_initial_weights_are_those_of_the_package_and_load_both_ways() -> None:
    package = seeded(lambda: conformer.ConformerBlock(**SMALL))
    ours = seeded(lambda: ConformerBlock(**SMALL))
    assert list(ours.state_dict()) == list(package.state_dict())
    for key, value in package.state_dict().items():
        assert torch.equal(ours.state_dict()[key], value), key
    package.load_state_dict(ours.state_dict())


@pytest.mark.parametrize("name", BLOCKS)
@given(lengths=st.lists(st.integers(1, 40), min_size=1, max_size=4), seed=st.integers(0, 99))
@settings(max_examples=25, deadline=None)
def test_padding_and_batch_mates_change_nothing(name: str, lengths: list[int], seed: int) -> None:
    block = seeded(BLOCKS[name], seed).double().eval()
    utterances = [torch.randn(length, 8, dtype=torch.float64) for length in lengths]
    x = nn.utils.rnn.pad_sequence(utterances, batch_first=True, padding_value=torch.nan)
    with torch.no_grad():
        output = block(x, mask_of(lengths))
        for row, utterance in zip(output, utterances, strict=True):
            frames = len(utterance)
            alone = block(utterance[None])[0]
            torch.testing.assert_close(row[:frames], alone, atol=1e-10, rtol=0)
            assert torch.equal(row[frames:], torch.zeros_like(row[frames:]))


@pytest.mark.parametrize("name", BLOCKS)
def test_padding_reaches_neither_gradients_nor_buffers_in_training(name: str) -> None:
    mask = mask_of([20, 3, 11])
    x = torch.randn(3, 20, 8, dtype=torch.float64)
    results = []
    for padding in (0.0, torch.nan, 1e4):
        block = seeded(BLOCKS[name]).double().train()
        block(x.masked_fill(~mask[..., None], padding), mask).square().sum().backward()
        results.append([*(p.grad for p in block.parameters()), *block.buffers()])
    for other in results[1:]:
        for expected, found in zip(results[0], other, strict=True):
            assert torch.equal(found, expected)


@pytest.mark.parametrize("name", BLOCKS)
def test_more_padding_changes_nothing_in_training(name: str) -> None:
    lengths = [20, 3, 11]
    x = torch.randn(3, 50, 8, dtype=torch.float64)
    results = []
    for frames in (20, 50):
        block = seeded(BLOCKS[name]).double().train()
        mask = torch.arange(frames) < torch.tensor(lengths)[:, None]
        output = block(x[:, :frames], mask)[:, :20]
        gradients = torch.autograd.grad(output.square().sum(), list(block.parameters()))
        results.append([output, *gradients, *block.buffers()])
    for expected, found in zip(*results, strict=True):
        torch.testing.assert_close(found, expected, atol=1e-10, rtol=1e-10)


def test_a_conformer_tracks_the_statistics_of_valid_frames() -> None:
    block = seeded(BLOCKS["conformer"]).double().train()
    seen: list[Tensor] = []
    norm = block.conv.net[5]
    norm.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0].detach()))
    lengths = [20, 3, 11]
    block(torch.randn(3, 20, 8, dtype=torch.float64), mask_of(lengths))
    valid = torch.cat([seen[0][b, :, :n] for b, n in enumerate(lengths)], dim=1)
    torch.testing.assert_close(norm.running_mean, 0.1 * valid.mean(1), atol=1e-12, rtol=0)
    expected = 0.9 + 0.1 * valid.var(1, correction=1)
    torch.testing.assert_close(norm.running_var, expected, atol=1e-12, rtol=0)


@pytest.mark.parametrize("name", BLOCKS)
def test_a_far_frame_matters_and_a_batch_mate_does_not(name: str) -> None:
    block = seeded(BLOCKS[name]).double().eval()
    x = torch.randn(2, 64, 8, dtype=torch.float64)
    changed = x.clone()
    changed[0, 0] += torch.randn(8, dtype=torch.float64)
    with torch.no_grad():
        moved = (block(changed) - block(x)).abs()
    # Frame 63 is far outside the convolution's reach of 3 frames: only attention gets there.
    assert moved[0, 63].max() > 1e-6
    assert moved[1].max() == 0


def test_the_order_of_frames_matters_to_a_conformer() -> None:
    block = seeded(BLOCKS["conformer"]).double().eval()
    # A kernel of a single tap leaves only the relative positions to notice an order.
    block.conv.net[4].conv.weight.data[..., torch.arange(7) != 3] = 0
    x = torch.randn(1, 30, 8, dtype=torch.float64)
    order = torch.randperm(30)
    with torch.no_grad():
        assert (block(x[:, order]) - block(x)[:, order]).abs().max() > 1e-3


@pytest.mark.parametrize("which", ["attn_dropout", "ff_dropout", "conv_dropout"])
def test_each_dropout_drops_the_share_it_is_given_and_only_in_training(which: str) -> None:
    shares = {"attn_dropout": 0.1, "ff_dropout": 0.3, "conv_dropout": 0.6}
    block = seeded(lambda: ConformerBlock(**{**SMALL, **shares}))
    prefixes = {"attn_dropout": "attn", "ff_dropout": "ff", "conv_dropout": "conv"}
    zeros: list[float] = []
    for name, module in block.named_modules():
        if isinstance(module, nn.Dropout) and name.startswith(prefixes[which]):
            module.register_forward_hook(
                lambda module, inputs, output: zeros.append((output == 0).double().mean().item())
            )
    x = torch.randn(16, 200, 8)
    block(x, mask_of([200] * 16))
    assert len(zeros) == {"attn_dropout": 1, "ff_dropout": 4, "conv_dropout": 1}[which]
    assert zeros == pytest.approx([shares[which]] * len(zeros), abs=0.02)
    block.eval()
    assert torch.equal(block(x), block(x))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", BLOCKS)
def test_autocast_stays_close_to_float32(name: str, dtype: torch.dtype) -> None:
    block = seeded(BLOCKS[name]).train()
    mask = mask_of([300, 7])
    x = torch.randn(2, 300, 8)
    expected = block(x, mask)
    with torch.autocast("cpu", dtype=dtype):
        found = block(x, mask)
    assert (found - expected).abs().max() < 0.1
    found.float().square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in block.parameters())


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", BLOCKS)
def test_an_empty_batch_passes_with_gradients(name: str, training: bool) -> None:
    block = seeded(BLOCKS[name]).train(training)
    for mask in (None, torch.ones(0, 5).bool()):
        output = block(torch.randn(0, 5, 8), mask)
        assert output.shape == (0, 5, 8)
        output.sum().backward()
    assert all(p.grad is not None and not p.grad.any() for p in block.parameters())


class Allocations(TorchDispatchMode):
    """Remembers each operation, and the largest storage in elements of float32 that one made."""

    def __init__(self) -> None:
        super().__init__()
        self.operations: set[str] = set()
        self.largest = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self.operations.add(func.overloadpacket.__name__)
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                self.largest = max(self.largest, leaf.untyped_storage().nbytes() // 4)
        return result


def allocations(block: nn.Module, frames: int, dim: int, masked: bool) -> Allocations:
    mask = mask_of([frames - 5, frames])[:1] if masked else None
    with torch.no_grad(), Allocations() as made:
        block.eval()(torch.randn(1, frames, dim), *([mask] if masked else []))
    return made


@pytest.mark.parametrize("masked", [True, False])
@pytest.mark.parametrize("name", BLOCKS)
def test_inference_holds_no_tensor_of_frames_squared(name: str, masked: bool) -> None:
    frames = 1500
    made = allocations(BLOCKS[name](), frames, 8, masked)
    assert made.largest < frames**2
    # What these fused operations hold inside is out of sight, but known: all (B, H, T, T) scores.
    assert not made.operations & {"_transformer_encoder_layer_fwd", "_native_multi_head_attention"}
    # The measure itself sees what the package gathers: (T, T, dim_head).
    package = allocations(conformer.ConformerBlock(**SMALL), frames, 8, False)
    assert package.largest >= 4 * frames**2


@pytest.mark.slow
def test_the_longest_utterance_passes_a_boss_block_in_bounded_memory() -> None:
    assert allocations(ConformerBlock(dim=512), 7193, 512, masked=True).largest < 7193**2
