"""A stack of equal blocks behind a stem: the Conformers and Transformers of the recipes.

Axis legend: B batch, T frames, F mel bins, D width of a block, L blocks.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from shardprep_trainer.model.stem import build_stem


class BlockStack(nn.Module):
    """An encoder by the contract: a stem, then blocks one after the other.

    Args:
        n_mels: Mel bins F.
        block: Makes a block, which maps frames (B, T, D) and their mask to frames (B, T, D).
        dim: Width D of the blocks.
        layers: Blocks L.
        subsampling: 1, or 2 for a stem that halves the rate of the frames.
        stem_channels: Channels of the convolutions of a `ConvolutionalStem`; 0 for a matrix alone.
        concat: Give the outputs of all blocks side by side (MFA-Conformer, arXiv 2203.15249).

    Attributes:
        width: Width of the output, D, or L * D with `concat`.
        subsampling: Of the frames.
    """

    def __init__(
        self,
        n_mels: int,
        block: Callable[[], nn.Module],
        *,
        dim: int,
        layers: int,
        subsampling: int = 1,
        stem_channels: int = 0,
        concat: bool = False,
    ) -> None:
        super().__init__()
        self.subsampling = subsampling
        self.width = dim * layers if concat else dim
        self.concat = concat
        self.stem = build_stem(n_mels, dim, stem_channels, subsampling)
        self.blocks = nn.ModuleList(block() for _ in range(layers))
        self.joined_norm = nn.LayerNorm(self.width) if concat else nn.Identity()

    def forward(self, mel: Tensor, mask: Tensor | None) -> Tensor:
        """Encode frames.

        Args:
            mel: (B, T, F), zero where it is padded.
            mask: (B, T) bool, True on valid frames; None for all.

        Returns:
            (B, ceil(T / subsampling), width).
        """
        # Under autocast only products are in 16 bits; the sum over the blocks stays in float32.
        x: Tensor = self.stem(mel, mask).to(torch.promote_types(mel.dtype, torch.float32))
        mask = None if mask is None else mask[:, :: self.subsampling]
        outputs = []
        for block in self.blocks:
            x = block(x, mask)
            outputs.append(x)
        if self.concat:
            x = self.joined_norm(torch.cat(outputs, dim=2))  # (B, T, D) each -> (B, T, L * D)
        return x
