"""What is minimised, as one module: augmentation, model and loss, which compile whole.

Axis legend: B batch, T frames, F mel bins, S speakers.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from shardprep_trainer.learning.metrics import batch_sums


class Objective(nn.Module):
    """From a micro-batch on the device to its loss.

    Its products run under the caller's autocast, but for those of the augmentation: powers need
    all their bits. The loss is computed in float32.

    Args:
        model: mel (B, T, F) and lengths (B,) or None to logits (B, S).
        criterion: Logits (B, S) and labels (B,) to their mean loss, a scalar.
        augment: Changes segments (B, T, F), given their valid frames (B,) or None for all.
        repeat: Fill a shorter segment with itself, from its beginning on; then nothing is padded.

    Attributes:
        run: Computes `forward`: `compute`, or the same compiled.
    """

    def __init__(
        self,
        model: nn.Module,
        criterion: nn.Module,
        augment: nn.Module,
        *,
        repeat: bool = False,
    ) -> None:
        super().__init__()
        self.model = model
        self.criterion = criterion
        self.augment = augment
        self.repeat = repeat
        self.run: Callable[..., Any] = self.compute

    def forward(self, mel: Tensor, lengths: Tensor | None, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Score a micro-batch.

        Args:
            mel: (B, T, F) float32.
            lengths: (B,) valid frames, or None for all T.
            labels: (B,) int64.

        Returns:
            The mean loss, a scalar whose gradient is NaN if it is not finite, and what
            `metrics.batch_sums` says of the micro-batch (3,).
        """
        found: tuple[Tensor, Tensor] = self.run(mel, lengths, labels)
        return found

    def compute(self, mel: Tensor, lengths: Tensor | None, labels: Tensor) -> tuple[Tensor, Tensor]:
        """`forward` in eager mode."""
        kind = mel.device.type
        if self.repeat and lengths is not None:
            mel, lengths = repeat_frames(mel, lengths), None
        with torch.autocast(kind, enabled=False):
            mel = self.augment(mel, lengths)
        logits = self.model(mel, lengths).float()  # (B, T, F) -> (B, S)
        with torch.autocast(kind, enabled=False):
            loss: Tensor = self.criterion(logits, labels)
        found = loss.detach()
        correct = (logits.detach().argmax(1) == labels).sum()
        # An infinite loss can have a finite gradient. Make the gradient NaN too: the other ranks
        # see nothing else.
        one_or_nan = 1 + 0 * found
        return loss * one_or_nan, batch_sums(found, correct, len(labels))


def repeat_frames(mel: Tensor, lengths: Tensor) -> Tensor:
    """Fill what is padded of segments (B, T, F) with their valid frames (B,), over and over."""
    frames = torch.arange(mel.shape[1], device=mel.device) % lengths.clamp(min=1).unsqueeze(1)
    return mel.gather(1, frames.unsqueeze(2).expand_as(mel))  # of the frames (B, T)
