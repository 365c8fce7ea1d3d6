"""One optimiser step: it takes micro-batches, changes the weights and adds to the meter.

A step whose loss or gradient is not finite, on any rank, is skipped on all ranks: weights,
optimiser and running statistics stay as they were, and the meter counts the skipped step. The norm
of the averaged gradient decides, which is the same on all ranks; a loss that is not finite makes
this norm not finite.

- A fused optimiser, on a GPU or a CPU, decides on the device: its kernel reads `found_inf`, which
  a gradient scaler sets too, and leaves weights, moments and step count alone.
- With float16 the scaler skips the step in the same way, and lowers its scale.
- An optimiser that is not fused is not called; for this the host waits for the norm.

Under mixed precision only matrix products are in 16 bits: every softmax, every normalisation and
the loss are computed in float32. Fused attention takes queries and keys of 16 bits and sums their
softmax in float32.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass

import torch
from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from torch import Tensor, nn

from shardprep_trainer.learning.average import AveragedModel
from shardprep_trainer.learning.metrics import Meter, Throughput
from shardprep_trainer.learning.schedule import step_seed
from shardprep_trainer.model.build import model_inputs

Batches = Iterator[dict[str, Tensor]]


def _unchanged(mel: Tensor, lengths: Tensor | None) -> Tensor:
    return mel


@dataclass(frozen=True)
class StepPlan:
    """What changes from step to step; the functions take the number of steps before this one."""

    rate: Callable[[int], float]
    """Learning rate."""
    margin: Callable[[int], float] | None = None
    """Margin of the criterion; None never changes the margin."""
    augment: Callable[[Tensor, Tensor | None], Tensor] = _unchanged
    """Changes segments (B, T, F), given their valid frames (B,) or None for all frames."""
    average: AveragedModel | None = None
    """Moving average of the weights, if there is one."""


class TrainStep:
    """Takes optimiser steps with a prepared model; never waits for a GPU.

    Each step seeds torch's generators from (seed, step, rank), so that dropout does not depend on
    what was computed before, in this process or another.

    Args:
        accelerator: Has prepared the model and the optimiser.
        model: mel (B, T, F) and lengths (B,) or None to logits (B, S).
        optimizer: Every step sets its learning rate.
        criterion: Logits (B, S) and labels (B,) to their mean loss, a scalar.
        plan: What changes from step to step.
        accumulate: Micro-batches of a step; their gradients are averaged.
        clip_norm: Largest norm of the whole gradient; 0 for no limit.
        max_skipped: Steps in a row that may be skipped; after more the meter says diverged.
        seed: Seed of the run.

    Attributes:
        bare: The model itself, outside of any wrapper of the accelerator.
        meter: Sums since its last `reset`.
        throughput: Rates since its last `restart`.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        model: nn.Module,
        optimizer: AcceleratedOptimizer,
        criterion: nn.Module,
        plan: StepPlan,
        *,
        accumulate: int,
        clip_norm: float,
        max_skipped: int,
        seed: int,
    ) -> None:
        self.accelerator = accelerator
        self.model = model
        self.optimizer = optimizer
        self.criterion = criterion
        self.plan = plan
        self.accumulate = accumulate
        self.limit = clip_norm or math.inf
        self.seed = seed
        self.meter = Meter(accelerator.device, max_skipped)
        self.throughput = Throughput()
        self.bare: nn.Module = accelerator.unwrap_model(model, keep_torch_compile=False)
        self.margin: Tensor = getattr(criterion, "margin", torch.empty(()))
        self._buffers = list(model.buffers())

    @property
    def predictor(self) -> nn.Module:
        """What is validated and saved for prediction: the averaged model, or the model itself."""
        return self.bare if self.plan.average is None else self.plan.average.model

    def __call__(self, batches: Batches, step: int) -> None:
        """Take the next step, after `step` others, on the next micro-batches."""
        torch.manual_seed(step_seed(self.seed, step, self.accelerator.process_index))
        for group in self.optimizer.param_groups:
            group["lr"] = self.plan.rate(step)
        if self.plan.margin is not None:
            self.margin.fill_(self.plan.margin(step))
        before = [buffer.clone() for buffer in self._buffers]
        for micro_batch in range(self.accumulate):
            batch = self.throughput.fetch(batches)
            exchange = micro_batch == self.accumulate - 1
            with nullcontext() if exchange else self.accelerator.no_sync(self.model):
                loss = self._forward(batch)
                # An infinite loss can have a finite gradient. Make the gradient NaN too: the other
                # ranks see nothing else.
                one_or_nan = 1 + 0 * loss.detach()
                self.accelerator.backward(loss * one_or_nan / self.accumulate)
        norm = self.accelerator.clip_grad_norm_(self.model.parameters(), self.limit)
        self._change_weights(norm.isfinite(), before)
        if self.plan.average is not None:
            self.plan.average.update(step)
        self.optimizer.zero_grad()
        self.meter.add_step(norm, step + 1)

    def _change_weights(self, finite: Tensor, before: list[Tensor]) -> None:
        """Change the weights, or skip the step and restore the running statistics."""
        bare = self.optimizer.optimizer
        if self.accelerator.scaler is not None:
            self.optimizer.step()
        elif bare.defaults.get("fused"):
            bare.found_inf = (~finite).float()
            self.optimizer.step()
            del bare.found_inf
        elif finite:
            self.optimizer.step()
        for buffer, value in zip(self._buffers, before, strict=True):
            buffer.copy_(torch.where(finite, buffer, value))

    def _forward(self, batch: dict[str, Tensor]) -> Tensor:
        device = self.accelerator.device
        mel, lengths = model_inputs(batch, device)
        # The model's products are in 16 bits under autocast; the powers here need all their bits.
        mel = self.plan.augment(mel, lengths)
        logits = self.model(mel, lengths).float()  # (B, T, F) -> (B, S)
        labels = batch["label"].to(device, non_blocking=True)
        loss: Tensor = self.criterion(logits, labels)
        correct = (logits.detach().argmax(1) == labels).sum()
        self.meter.add_batch(loss.detach(), correct, len(labels))
        return loss
