"""An exponential moving average of the weights, which is what is validated and predicted with."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn


class AveragedModel:
    """Keeps the moving average of a model's weights (Polyak averaging) beside the model.

    After step t the average moves towards the weights by 1 - min(decay, (1 + t) / (10 + t)), so
    that the first steps do not weigh on it. Running statistics are copied, not averaged: those of
    a short run would lag behind.

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
        """Move towards the weights after `step` steps; nothing waits for the device."""
        rate = 1.0 - min(self.decay, (1 + step) / (10 + step))
        torch._foreach_lerp_(self._averaged, self._weights, rate)
        for averaged, buffer in self._buffers:
            averaged.copy_(buffer)
