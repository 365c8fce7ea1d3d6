"""One optimiser step: it takes micro-batches, changes the weights and adds to the meter.

Under mixed precision only matrix products are in 16 bits: every softmax, every normalisation and
the loss are computed in float32. Fused attention takes queries and keys of 16 bits and sums their
softmax in float32.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass

import torch
from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from torch import Tensor, nn

from shardprep_trainer.learning.average import AveragedModel
from shardprep_trainer.learning.metrics import Meter, Throughput
from shardprep_trainer.learning.objective import Objective
from shardprep_trainer.learning.schedule import step_seed
from shardprep_trainer.learning.update import Update
from shardprep_trainer.model.build import model_inputs

Batches = Iterator[dict[str, Tensor]]


@dataclass(frozen=True)
class StepPlan:
    """What changes from step to step; the functions take the number of steps before this one."""

    rate: Callable[[int], float]
    """Learning rate."""
    margin: Callable[[int], float] | None = None
    """Margin of the criterion; None never changes the margin."""
    average: AveragedModel | None = None
    """Moving average of the weights, if there is one."""


class TrainStep:
    """Takes optimiser steps with a prepared model; never waits for a GPU.

    Each step seeds torch's generators from (seed, step, rank), so that augmentation and dropout do
    not depend on what was computed before, in this process or another.

    Args:
        accelerator: Has prepared the objective and the optimiser.
        objective: Prepared: an `Objective`, or one in the wrapper of the accelerator.
        optimizer: Every step sets its learning rate.
        plan: What changes from step to step.
        accumulate: Micro-batches of a step; their gradients are averaged.
        clip_norm: Largest norm of the whole gradient; 0 for no limit.
        max_skipped: Steps in a row that may be skipped; after more the meter says diverged.
        seed: Seed of the run.

    Attributes:
        objective: Outside of any wrapper.
        bare: The model itself.
        meter: Sums since its last `reset`.
        throughput: Rates since its last `restart`.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        objective: nn.Module,
        optimizer: AcceleratedOptimizer,
        plan: StepPlan,
        *,
        accumulate: int,
        clip_norm: float,
        max_skipped: int,
        seed: int,
    ) -> None:
        self.accelerator = accelerator
        self.optimizer = optimizer
        self.plan = plan
        self.accumulate = accumulate
        self.seed = seed
        self.meter = Meter(accelerator.device, max_skipped)
        self.throughput = Throughput()
        bare = accelerator.unwrap_model(objective)
        assert isinstance(bare, Objective)
        self.objective = bare
        self.bare: nn.Module = bare.model
        self.margin: Tensor | None = getattr(bare.criterion, "margin", None)
        self.update = Update(
            accelerator, self.bare, optimizer, plan.average, self.meter, clip_norm=clip_norm
        )
        self._wrapped = objective

    @property
    def criterion(self) -> nn.Module:
        """Logits (B, S) and labels (B,) to their mean loss, a scalar."""
        return self.objective.criterion

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
            assert self.margin is not None
            self.margin.fill_(self.plan.margin(step))
        self.update.remember()
        for micro_batch in range(self.accumulate):
            batch = self.throughput.fetch(batches)
            exchange = micro_batch == self.accumulate - 1
            with nullcontext() if exchange else self.accelerator.no_sync(self._wrapped):
                loss, sums = self._forward(batch)
                self.meter.add_batch(sums)
                self.accelerator.backward(loss / self.accumulate)
        self.update(step)

    def _forward(self, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        device = self.accelerator.device
        mel, lengths = model_inputs(batch, device)
        labels = batch["label"].to(device, non_blocking=True)
        found: tuple[Tensor, Tensor] = self._wrapped(mel, lengths, labels)
        return found
