"""From a checked configuration to a training step: loss, optimiser, plan."""

from __future__ import annotations

import math
from dataclasses import asdict
from functools import partial

import torch
from accelerate import Accelerator
from torch import nn

from shardprep_trainer.config.fields import Config, LossConfig, OptimConfig
from shardprep_trainer.learning.augment import Augment
from shardprep_trainer.learning.average import AveragedModel
from shardprep_trainer.learning.compilation import Compilation, without_accelerate
from shardprep_trainer.learning.losses import AAMSoftmaxLoss, AMSoftmaxLoss, SoftmaxLoss
from shardprep_trainer.learning.objective import Objective
from shardprep_trainer.learning.optimizer import MuonAdamW, split_weights
from shardprep_trainer.learning.schedule import learning_rate, margin
from shardprep_trainer.learning.step import StepPlan, TrainStep
from shardprep_trainer.model.model import SpeakerNetwork


def build_train_step(
    config: Config,
    model: SpeakerNetwork,
    accelerator: Accelerator,
    compilation: Compilation | None = None,
    *,
    short: bool = True,
) -> TrainStep:
    """The step that trains a model; the accelerator prepares the objective and its optimiser.

    Args:
        config: Of the run.
        model: With its first weights.
        accelerator: Of the run.
        compilation: Whether and how the step is compiled; None leaves it as it is.
        short: See `TrainStep`.
    """
    train, device = config.train, accelerator.device
    optimizer = build_optimizer(config.optim, model, device)
    objective = Objective(
        model,
        build_loss(config.loss),
        Augment(**asdict(config.augment)),
        repeat=config.data.short == "repeat",
    )
    with without_accelerate(accelerator):
        prepared, optimizer = accelerator.prepare(objective, optimizer)
    average = AveragedModel(model, train.average_decay) if train.average_decay else None
    return TrainStep(
        accelerator,
        prepared,
        optimizer,
        build_plan(config, average),
        accumulate=train.accumulate,
        clip_norm=config.optim.clip_norm,
        max_skipped=train.max_skipped,
        seed=train.seed,
        compilation=compilation or Compilation(),
        short=short,
    )


def build_loss(config: LossConfig) -> nn.Module:
    """The criterion: logits (B, S) and labels (B,) to their mean loss, a scalar."""
    if config.name == "softmax":
        return SoftmaxLoss()
    assert config.margin is not None
    assert config.scale is not None
    kind = AMSoftmaxLoss if config.name == "am_softmax" else AAMSoftmaxLoss
    return kind(config.margin, config.scale)


def build_plan(config: Config, average: AveragedModel | None) -> StepPlan:
    """What changes from step to step: learning rate, margin and average."""
    loss, total = config.loss, config.train.total_steps
    rate = partial(
        learning_rate,
        peak=config.optim.lr,
        warmup_steps=config.optim.warmup_steps,
        total_steps=total,
    )
    grown = None
    if loss.margin is not None and loss.margin_growth:
        steps = math.ceil(loss.margin_growth * total)
        grown = partial(margin, final=loss.margin, growth_steps=steps)
    return StepPlan(rate, grown, average)


def build_optimizer(
    config: OptimConfig, model: SpeakerNetwork, device: torch.device
) -> torch.optim.Optimizer:
    """AdamW for all weights, or Muon for the matrices and AdamW for the rest.

    Every step sets the learning rate.
    """
    lr, decay, fused = config.lr, config.weight_decay, device.type in ("cuda", "cpu")
    if config.name == "muon":
        matrices, others = split_weights(model, model.classifier)
        return MuonAdamW(matrices, others, lr=lr, weight_decay=decay, fused=fused)
    return torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=decay, fused=fused)
