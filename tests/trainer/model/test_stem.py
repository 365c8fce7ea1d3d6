"""Front ends against their formula, padded or not."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from shardprep_trainer.model.stem import ConvolutionalStem, LinearStem, build_stem, join_neighbours


@given(frames=st.integers(1, 9))
@settings(max_examples=9, deadline=None)
def test_half_the_rate_takes_every_second_frame_with_its_neighbours(frames: int) -> None:
    mel = torch.randn(2, frames, 3)
    zero = torch.zeros(2, 3)
    expected = [
        torch.cat(
            [mel[:, t + d] if 0 <= t + d < frames else zero for d in (-1, 0, 1)],
            dim=1,
        )
        for t in range(0, frames, 2)
    ]
    assert torch.equal(join_neighbours(mel), torch.stack(expected, dim=1))


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("frames", [1, 2, 7])
def test_the_convolutional_stem_is_what_it_says(stride: int, frames: int) -> None:
    torch.manual_seed(0)
    stem = ConvolutionalStem(10, 8, 3, stride).double()
    mel = torch.randn(2, frames, 10, dtype=torch.float64)
    first, second, third = stem.convolutions
    # (B, T, F) -> (B, C, F, T): the axes of a picture, to be sure that none was swapped
    x = mel.transpose(1, 2).unsqueeze(1)
    steps = ((first, (1, 1)), (second, (2, stride)), (third, (2, 1)))
    for layer, strides in steps:
        kernel = layer.weight.transpose(2, 3)
        x = F.silu(F.conv2d(x, kernel, layer.bias, stride=strides, padding=1))
    frames_out = -(-frames // stride)
    assert x.shape == (2, 3, 3, frames_out)
    rows = torch.stack([x[:, c, f, :] for f in range(3) for c in range(3)], dim=-1)  # (B, T, F * C)
    expected = stem.linear(F.layer_norm(rows, (9,), stem.norm.weight, stem.norm.bias))
    torch.testing.assert_close(stem(mel), expected)


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("channels", [0, 3])
@given(length=st.integers(1, 12), beyond=st.integers(0, 5))
@settings(max_examples=15, deadline=None)
def test_padding_is_the_silence_beyond_the_end(
    channels: int, stride: int, length: int, beyond: int
) -> None:
    stem = build_stem(10, 8, channels, stride)
    mel = torch.randn(1, length, 10)
    padded = F.pad(mel, (0, 0, 0, beyond))
    mask = torch.arange(length + beyond)[None] < length
    whole = -(-length // stride)
    for training in (True, False):
        with torch.set_grad_enabled(training):
            found = stem(padded, mask)[:, :whole]
            torch.testing.assert_close(found, stem(mel, None), atol=1e-5, rtol=0)


def test_weights_keep_the_names_that_checkpoints_have() -> None:
    assert isinstance(build_stem(10, 8, 0, 2), LinearStem)
    assert {k: v.shape for k, v in build_stem(10, 8, 0, 2).state_dict().items()} == {
        "weight": (8, 30),
        "bias": (8,),
    }
