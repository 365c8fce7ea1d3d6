"""The exponential moving average of the weights, for validation and prediction."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn


class AveragedModel:
    """The moving average of a model's weights (Polyak averaging).

    Step t keeps the share min(decay, (1 + t) / (10 + t)) of the average, so that the average soon
    forgets the first steps. Running statistics are copied, not averaged: in a short run their
    average would lag behind.

    The arithmetic is PyTorch's. PyTorch's class `swa_utils.AveragedModel` does not serve here: it
    copies its count of updates to the device in every update, for which the host waits, and the
    count would have to be saved, while here the share depends on the step alone.

    Args:
        model: The model itself, outside of any wrapper.
        decay: Share of the average that a step keeps, 0 up to but not including 1.

    Attributes:
        model: A copy of the model that holds the average, in evaluation mode.
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
