"""Front ends: mel frames become frames of the model's width, at the full rate or at half of it.

Axis legend: B batch, T frames, F mel bins, D model width, C channels. A mask is (B, T) bool, True
on the frames that are speech; None says that every frame is. `mask[:, ::stride]` is that of what
comes out.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from shardprep_trainer.model.layers import Linear, zero_padding

_KERNEL = 3


class LinearStem(Linear):
    """One matrix; at half the rate, over each second frame with the one before and after it.

    Args:
        n_mels: Mel bins F.
        dim: Model width D.
        stride: 1, or 2 for half the rate.
    """

    def __init__(self, n_mels: int, dim: int, stride: int = 1) -> None:
        super().__init__(n_mels * (3 if stride == 2 else 1), dim)
        self.stride = stride

    def forward(self, mel: Tensor, mask: Tensor | None = None) -> Tensor:
        """Map (B, T, F), zero where it is padded, to (B, ceil(T / stride), D)."""
        return super().forward(join_neighbours(mel) if self.stride == 2 else mel)


class ConvolutionalStem(nn.Module):
    """Three convolutions of 3 frames by 3 bins with SiLU, LayerNorm over each frame, one matrix.

    A pattern of the spectrum is recognised wherever in frequency it stands, as in the front ends of
    MFA-Conformer (arXiv 2203.15249) and ECAPA CNN-TDNN (arXiv 2104.02370). The second and the third
    halve the number of bins, the second the rate of the frames as well if that is wanted.

    Args:
        n_mels: Mel bins F.
        dim: Model width D.
        channels: Channels C.
        stride: 1, or 2 for half the rate.
    """

    def __init__(self, n_mels: int, dim: int, channels: int, stride: int = 1) -> None:
        super().__init__()
        plan = ((1, (1, 1)), (channels, (stride, 2)), (channels, (1, 2)))
        self.convolutions = nn.ModuleList(
            nn.Conv2d(inputs, channels, _KERNEL, strides, padding=_KERNEL // 2)
            for inputs, strides in plan
        )
        width = channels * -(-n_mels // 4)
        self.norm = nn.LayerNorm(width)
        self.linear = Linear(width, dim)

    def forward(self, mel: Tensor, mask: Tensor | None = None) -> Tensor:
        """Map (B, T, F), zero where it is padded, to (B, ceil(T / stride), D)."""
        rows, channels = mel, 1
        for convolution in self.convolutions:
            assert isinstance(convolution, nn.Conv2d)
            # (B, T, F * C) -> (B, C, T, F), channels last in memory
            image = rows.reshape(*rows.shape[:2], rows.shape[2] // channels, channels).permute(
                0, 3, 1, 2
            )
            image = F.silu(convolution(image))
            channels = convolution.out_channels
            if mask is not None:
                mask = mask[:, :: convolution.stride[0]]
            # Beyond the end of an utterance must be the zeros that it sees when it is not padded.
            rows = zero_padding(image.permute(0, 2, 3, 1).flatten(2), mask)  # -> (B, T, F * C)
        out: Tensor = self.linear(self.norm(rows))
        return out


def build_stem(n_mels: int, dim: int, channels: int, stride: int) -> nn.Module:
    """A ConvolutionalStem of so many channels, or with 0 a LinearStem."""
    if channels:
        return ConvolutionalStem(n_mels, dim, channels, stride)
    return LinearStem(n_mels, dim, stride)


def join_neighbours(mel: Tensor) -> Tensor:
    """Every second frame with the one before and the one after it, zeros beyond the ends.

    Args:
        mel: (B, T, F), zero where it is padded.

    Returns:
        (B, ceil(T / 2), 3 * F).
    """
    padded = F.pad(mel, (0, 0, 1, 1))
    frames = (mel.shape[1] + 1) // 2
    return torch.cat([padded[:, first::2][:, :frames] for first in range(3)], dim=2)
