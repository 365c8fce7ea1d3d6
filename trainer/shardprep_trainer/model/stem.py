"""Front ends: they map mel frames to frames of the model's width, at the full or half the rate.

Axis legend: B batch, T frames, F mel bins, D model width, C channels. A mask is (B, T) bool, True
on the frames that are speech; None says that every frame is. The mask of the output is
`mask[:, ::stride]`.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from shardprep_trainer.model.layers import Linear, zero_padding

_KERNEL = 3


class LinearStem(Linear):
    """One matrix; at half the rate it sees every second frame and its two neighbours.

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

    It recognises a pattern of the spectrum at any frequency, as the front ends of MFA-Conformer
    (arXiv 2203.15249) and ECAPA CNN-TDNN (arXiv 2104.02370). The second and the third convolution
    halve the number of bins; with stride 2 the second also halves the rate of the frames.

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
            # The convolutions pad with zeros: put zeros beyond the end of an utterance too.
            rows = zero_padding(image.permute(0, 2, 3, 1).flatten(2), mask)  # -> (B, T, F * C)
        out: Tensor = self.linear(self.norm(rows))
        return out


def build_stem(n_mels: int, dim: int, channels: int, stride: int) -> nn.Module:
    """A ConvolutionalStem, or a LinearStem if channels is 0."""
    if channels:
        return ConvolutionalStem(n_mels, dim, channels, stride)
    return LinearStem(n_mels, dim, stride)


def join_neighbours(mel: Tensor) -> Tensor:
    """Every second frame joined with its two neighbours; zeros beyond the ends.

    Args:
        mel: (B, T, F), zero where it is padded.

    Returns:
        (B, ceil(T / 2), 3 * F).
    """
    padded = F.pad(mel, (0, 0, 1, 1))
    frames = (mel.shape[1] + 1) // 2
    return torch.cat([padded[:, first::2][:, :frames] for first in range(3)], dim=2)
