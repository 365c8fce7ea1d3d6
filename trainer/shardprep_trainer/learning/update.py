"""What follows the gradients of a step: clipping, the optimiser, running statistics, the average.

A step whose loss or gradient is not finite, on any rank, is skipped on all ranks: weights,
optimiser and running statistics stay as they were, and the meter counts the skipped step. The norm
of the averaged gradient decides, which is the same on all ranks; a loss that is not finite makes
this norm not finite.

- A fused optimiser, on a GPU or a CPU, decides on the device: its kernel reads `found_inf`, which
  a gradient scaler sets too, and leaves weights, moments and step count alone.
- With float16 the scaler skips the step in the same way, and lowers its scale.
- An optimiser that is not fused is not called; for this the host waits for the norm.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from torch import Tensor, nn

from shardprep_trainer.learning.average import AveragedModel
from shardprep_trainer.learning.compilation import Compilation
from shardprep_trainer.learning.metrics import Meter
from shardprep_trainer.learning.optimizer import MuonAdamW


class Update:
    """Changes the weights of a model by their gradients; never waits for a GPU.

    Args:
        accelerator: Has prepared the optimiser.
        model: The model itself, outside of any wrapper.
        optimizer: Of the weights of the model.
        average: Moving average of the weights, if there is one.
        meter: Counts the steps.
        clip_norm: Largest norm of the whole gradient; 0 for no limit.

    Attributes:
        settle: `count_or_undo`, or the same compiled.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        model: nn.Module,
        optimizer: AcceleratedOptimizer,
        average: AveragedModel | None,
        meter: Meter,
        *,
        clip_norm: float,
    ) -> None:
        self.accelerator = accelerator
        self.optimizer = optimizer
        self.average = average
        self.meter = meter
        self.limit = clip_norm or math.inf
        self.weights = list(model.parameters())
        self.buffers = list(model.buffers())
        self._before = [buffer.clone() for buffer in self.buffers]
        self._number = torch.zeros((), dtype=torch.float64, device=accelerator.device)
        self.settle: Callable[[Tensor], None] = self.count_or_undo
        self._keep_gradients = False

    def compile(
        self, compilation: Compilation, warn: Callable[[str], None], accumulate: int
    ) -> None:
        """Compile what pays; the kernels of AdamW, of the average and of clipping are few as it is.

        Args:
            compilation: How.
            warn: Is told if the compiler fails.
            accumulate: Micro-batches of a step.
        """
        self.settle = compilation.function(self.count_or_undo, warn)
        if isinstance(self.optimizer.optimizer, MuonAdamW):
            self.optimizer.optimizer.compile(compilation, warn)
        if compilation.way == "graphs" and accumulate > 1:
            # A graph writes the gradients of each micro-batch to the same place: add them up in
            # another.
            self._keep_gradients = True
            for weight in self.weights:
                weight.grad = torch.zeros_like(weight)

    def remember(self) -> None:
        """Note the running statistics before a step."""
        _copy(self._before, self.buffers)

    def recall(self) -> None:
        """Put the running statistics back to those before the step."""
        _copy(self.buffers, self._before)

    def __call__(self, step: int) -> None:
        """End the step after `step` others; the gradients are gone then.

        A step that is skipped is as if it had never been.
        """
        norm = self.accelerator.clip_grad_norm_(self.weights, self.limit)
        self._change_weights(norm.isfinite())
        self._number.fill_(step + 1)
        self.settle(norm)
        if self.average is not None:
            self.average.update(step)
        self.optimizer.zero_grad(set_to_none=not self._keep_gradients)

    def count_or_undo(self, norm: Tensor) -> None:
        """Count a step by the norm of its gradient (); if skipped, restore the statistics."""
        finite = norm.isfinite()
        for buffer, before in zip(self.buffers, self._before, strict=True):
            buffer.copy_(torch.where(finite, buffer, before))
        self.meter.add_step(norm, self._number)

    def _change_weights(self, finite: Tensor) -> None:
        bare = self.optimizer.optimizer
        if self.accelerator.scaler is not None:
            self.optimizer.step()
        elif bare.defaults.get("fused"):
            bare.found_inf = (~finite).float()
            self.optimizer.step()
            del bare.found_inf
        elif finite:
            self.optimizer.step()


def _copy(to: list[Tensor], values: list[Tensor]) -> None:
    for old, new in zip(to, values, strict=True):
        old.copy_(new)
