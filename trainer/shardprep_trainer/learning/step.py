"""One optimiser step: it takes micro-batches, changes the weights and adds to the meter.

Under mixed precision only matrix products are in 16 bits: every softmax, every normalisation and
the loss are computed in float32. Fused attention takes queries and keys of 16 bits and sums their
softmax in float32.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass

import torch
from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from torch import Tensor, nn

from shardprep_trainer.learning.average import AveragedModel
from shardprep_trainer.learning.compilation import Compilation, failure
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
        compilation: Whether and how the step is compiled, at its first call.
        short: Whether the data have utterances shorter than a segment. A compiled step masks all
            batches then, or none: it has one form. Otherwise a batch is masked if it needs it.

    Attributes:
        warn: Is told if the step cannot be compiled.
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
        compilation: Compilation,
        short: bool,
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
        self.compilation = compilation
        self.warn: Callable[[str], None] = warnings.warn
        self._short = short
        self._compiled = False
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
        self._seed(step)
        for group in self.optimizer.param_groups:
            group["lr"] = self.plan.rate(step)
        if self.plan.margin is not None:
            assert self.margin is not None
            self.margin.fill_(self.plan.margin(step))
        self.update.remember()
        for micro_batch in range(self.accumulate):
            inputs = self._inputs(self.throughput.fetch(batches))
            if not self._compiled and self.compilation.way != "off":
                self._compile(inputs)
                self._seed(step)
            exchange = micro_batch == self.accumulate - 1
            with nullcontext() if exchange else self.accelerator.no_sync(self._wrapped):
                self.compilation.begin()
                loss, sums = self._wrapped(*inputs)
                self.meter.add_batch(sums)
                self.accelerator.backward(loss if self.accumulate == 1 else loss / self.accumulate)
        self.update(step)

    def _seed(self, step: int) -> None:
        torch.manual_seed(step_seed(self.seed, step, self.accelerator.process_index))

    def _inputs(self, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor | None, Tensor]:
        """A micro-batch as the objective takes it."""
        device = self.accelerator.device
        padded = None if self.compilation.way == "off" else self._short
        mel, lengths = model_inputs(batch, device, padded)
        return mel, lengths, batch["label"].to(device, non_blocking=True)

    def _compile(self, inputs: tuple[Tensor, Tensor | None, Tensor]) -> None:
        """Compile the step; try it on a micro-batch, and leave no trace of the trial.

        A compiler may fail at the first backward pass only.
        """
        self._compiled = True
        self.objective.run = self.compilation.objective(self.objective.compute)
        weights = [weight for weight in self.bare.parameters() if weight.requires_grad]
        try:
            for _ in range(self.compilation.calls):
                self.compilation.begin()
                loss, _ = self.objective(*inputs)
                # Not backward: data parallel training would exchange these gradients.
                torch.autograd.grad(loss, weights)
                del loss
        # Of any kind: they come from the compiler, the driver or the C++ compiler.
        except Exception as error:
            self.objective.run = self.objective.compute
            self.compilation = Compilation("off")
            self.warn(failure(error))
        else:
            self.update.compile(self.compilation, self.warn, self.accumulate)
        self.update.recall()
