"""The exponential moving average of the weights: what is validated and predicted with."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn


class AveragedModel:
    """Keeps the moving average of a model's weights (Polyak averaging) beside the model.

    Step t keeps the share min(decay, (1 + t) / (10 + t)) of the average, so that the first steps
    soon count no more. Running statistics are copied, not averaged: those of a short run would lag
    behind.

    The arithmetic is PyTorch's. Its own `swa_utils.AveragedModel` does not fit here: it counts
    updates in a tensor and moves that to the device in each of them, for which the host waits; and
    the count would be one more thing to save, where here the step decides.

    Args:
        model: The model itself, outside of any wrapper.
        decay: Share of the average that a step keeps, 0 up to but not including 1.

    Attributes:
        model: A copy with the averaged weights, in evaluation mode.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.decay = decay
        self.model = copy.deepcopy(model).eval().requires_grad_(False)
        self._averaged: list[Tensor] = [*self.model.parameters()]
        self._weights: list[Tensor] = [*model.parameters()]
        self._buffers = list(zip(self.model.buffers(), model.buffers(), strict=True))

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Move towards the weights of the step after `step` others; never waits for the device."""
        keep = min(self.decay, (1 + step) / (10 + step))
        move = get_ema_multi_avg_fn(keep)  # type: ignore[no-untyped-call]
        move(self._averaged, self._weights, None)
        for averaged, buffer in self._buffers:
            averaged.copy_(buffer)
