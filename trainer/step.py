"""One optimiser step: micro-batches in, weights changed, sums in a meter; nothing waits."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import nullcontext

import torch
from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from torch import Tensor, nn

from trainer.evaluation import model_inputs
from trainer.metrics import Meter, Throughput
from trainer.schedule import step_seed

Batches = Iterator[dict[str, Tensor]]


class TrainStep:
    """Takes optimiser steps with a prepared model, without ever waiting for the device.

    torch's generators are seeded from (seed, step, rank) before each step, so that dropout does
    not depend on what was computed before, in this process or another.

    Args:
        accelerator: Has prepared the model and the optimiser.
        model: mel (B, T, F) and lengths (B,) or None to logits (B, S).
        optimizer: Its learning rate is set anew for every step.
        criterion: Logits (B, S) and labels (B,) to their mean loss, a scalar.
        rate: Learning rate of a step, from the number of steps before it.
        accumulate: Micro-batches of a step; their gradients are averaged.
        clip_norm: Largest norm of the whole gradient; 0 leaves it as it is.
        seed: Seed of the run.

    Attributes:
        meter: Sums since it was last reset.
        throughput: Rates since they were last restarted.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        model: nn.Module,
        optimizer: AcceleratedOptimizer,
        criterion: nn.Module,
        rate: Callable[[int], float],
        *,
        accumulate: int,
        clip_norm: float,
        seed: int,
    ) -> None:
        self.accelerator = accelerator
        self.model = model
        self.optimizer = optimizer
        self.criterion = criterion
        self.rate = rate
        self.accumulate = accumulate
        self.limit = clip_norm or math.inf
        self.seed = seed
        self.meter = Meter(accelerator.device)
        self.throughput = Throughput()

    def __call__(self, batches: Batches, step: int) -> None:
        """Take the step that follows `step` others, on the next micro-batches."""
        torch.manual_seed(step_seed(self.seed, step, self.accelerator.process_index))
        for group in self.optimizer.param_groups:
            group["lr"] = self.rate(step)
        finite = torch.ones((), dtype=torch.bool, device=self.accelerator.device)
        for part in range(self.accumulate):
            batch = self.throughput.fetch(batches)
            exchange = part == self.accumulate - 1
            with nullcontext() if exchange else self.accelerator.no_sync(self.model):
                loss = self._forward(batch)
                self.accelerator.backward(loss / self.accumulate)
            finite &= loss.detach().isfinite()
        norm = self.accelerator.clip_grad_norm_(self.model.parameters(), self.limit)
        if self.accelerator.scaler is None:
            # With float16 an overflow is the scaler's to handle: it skips the step.
            finite &= norm.isfinite()
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.meter.add_step(norm, finite, step + 1)

    def _forward(self, batch: dict[str, Tensor]) -> Tensor:
        device = self.accelerator.device
        logits = self.model(*model_inputs(batch, device)).float()  # (B, T, F) -> (B, S)
        labels = batch["label"].to(device, non_blocking=True)
        loss: Tensor = self.criterion(logits, labels)
        correct = (logits.detach().argmax(1) == labels).sum()
        self.meter.add_batch(loss.detach(), correct, len(labels))
        return loss
