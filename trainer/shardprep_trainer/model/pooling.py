"""Pooling layers: they map the frames of an utterance to one embedding, without the padding.

Axis legend: B batch, T frames, D embedding width. A mask is (B, T) bool, True on the frames that
are speech; None says that every frame is.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from shardprep_trainer.model.layers import Linear, masked_mean, zero_padding

# The slope of a square root is infinite at 0.
_LEAST_VARIANCE = 1e-6


class MeanPooling(nn.Module):
    """The mean over valid frames."""

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """Average the valid frames.

        Args:
            x: (B, T, D). Padded frames may hold anything, NaN included.
            mask: (B, T) bool, True on valid frames; None for all.

        Returns:
            (B, D), float32 at least; zeros for an utterance without any frame.
        """
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        return masked_mean(wide, mask).squeeze(1)


class SelfAttentivePooling(nn.Module):
    """A mean over valid frames whose weights are learned: softmax over t of v . tanh(W h_t + b).

    The self-attentive pooling of Cai, Chen and Li 2018 (arXiv 1804.05160). Safari, India and
    Hernando 2020 (arXiv 2008.01077) use the same mean with softmax(W h), without the tanh layer.

    Args:
        dim: Embedding width D.
        hidden: Rows of W; None for as many as dim.
    """

    def __init__(self, dim: int, hidden: int | None = None) -> None:
        super().__init__()
        width = dim if hidden is None else hidden
        self.hidden = Linear(dim, width)
        self.score = nn.Linear(width, 1, bias=False)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """Weigh and sum the valid frames.

        Args:
            x: (B, T, D). Padded frames may hold anything, NaN included.
            mask: (B, T) bool, True on valid frames; None for all.

        Returns:
            (B, D), float32 at least; zeros for an utterance without any frame.
        """
        x = zero_padding(x, mask)
        weights = self.weigh(x, mask)
        with torch.autocast(x.device.type, enabled=False):
            return (weights.unsqueeze(1) @ x.to(weights.dtype)).squeeze(1)  # (B, 1, T) @ (B, T, D)

    def weigh(self, x: Tensor, mask: Tensor | None) -> Tensor:
        """The weight of every frame of x (B, T, D): (B, T) float32 at least; rows sum to 1."""
        wide = torch.promote_types(x.dtype, torch.float32)
        scores = self.score(torch.tanh(self.hidden(x))).squeeze(-1).to(wide)  # (B, T)
        if mask is not None:
            # A finite floor, not -inf: an utterance without any frame must not become NaN.
            scores = scores.masked_fill(~mask, torch.finfo(wide).min)
        return torch.softmax(scores, dim=1)


class AttentiveStatisticsPooling(SelfAttentivePooling):
    """Weighted mean and weighted standard deviation, with the weights of self-attentive pooling.

    Okabe, Koshinaka and Shinoda 2018 (arXiv 1803.10963), equations 5 and 6.
    """

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """Weigh and sum the valid frames, and measure how they vary.

        Args:
            x: (B, T, D). Padded frames may hold anything, NaN included.
            mask: (B, T) bool, True on valid frames; None for all.

        Returns:
            (B, 2 * D), means then deviations, float32 at least; zeros and the least deviation for
            an utterance without any frame.
        """
        x = zero_padding(x, mask)
        weights = self.weigh(x, mask).unsqueeze(1)  # (B, 1, T)
        with torch.autocast(x.device.type, enabled=False):
            wide = x.to(weights.dtype)
            mean = weights @ wide  # (B, 1, D)
            # Not the difference of two squares: float32 would lose most digits of it.
            variance = (weights @ (wide - mean).square()).squeeze(1)
            deviation = variance.clamp(min=_LEAST_VARIANCE).sqrt()
            return torch.cat((mean.squeeze(1), deviation), dim=1)
