"""From a checked configuration to the parts of a run: the only place where the two meet."""

from __future__ import annotations

import math
from dataclasses import asdict
from functools import partial

import torch
from torch import nn

from shardprep import SegmentLoader, ShardSet, UtteranceLoader
from shardprep_trainer.config.fields import Config, DataConfig, LossConfig, OptimConfig
from shardprep_trainer.errors import ConfigError
from shardprep_trainer.learning.augment import Augment
from shardprep_trainer.learning.average import AveragedModel
from shardprep_trainer.learning.losses import AAMSoftmaxLoss, AMSoftmaxLoss, SoftmaxLoss
from shardprep_trainer.learning.optimizer import MuonAdamW, split_weights
from shardprep_trainer.learning.schedule import learning_rate, margin
from shardprep_trainer.learning.step import StepPlan
from shardprep_trainer.model.model import SpeakerModel


def build_loss(config: LossConfig) -> nn.Module:
    """The criterion: logits (B, S) and labels (B,) to their mean loss, a scalar."""
    if config.name == "softmax":
        return SoftmaxLoss()
    assert config.margin is not None
    assert config.scale is not None
    kind = AMSoftmaxLoss if config.name == "am_softmax" else AAMSoftmaxLoss
    return kind(config.margin, config.scale)


def build_plan(config: Config, average: AveragedModel | None, device: torch.device) -> StepPlan:
    """What changes from step to step: learning rate, margin, augmentation and average."""
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
    return StepPlan(rate, grown, Augment(**asdict(config.augment)).to(device), average)


def build_optimizer(
    config: OptimConfig, model: SpeakerModel, device: torch.device
) -> torch.optim.Optimizer:
    """AdamW over all parameters, or Muon over those that it is for.

    The learning rate is set before every step.
    """
    lr, decay, fused = config.lr, config.weight_decay, device.type in ("cuda", "cpu")
    if config.name == "muon":
        matrices, others = split_weights(model, model.classifier)
        return MuonAdamW(matrices, others, lr=lr, weight_decay=decay, fused=fused)
    return torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=decay, fused=fused)


def batch_of_each(config: DataConfig, world_size: int) -> int:
    """Segments in a micro-batch of one process.

    Raises:
        ConfigError: The processes cannot share data.global_batch evenly.
    """
    if config.global_batch is None:
        return config.batch_size
    if config.global_batch % world_size:
        shared = config.global_batch
        if config.order == "windowed":
            shared = math.gcd(shared, config.lanes)
        allowed = [number for number in range(1, shared + 1) if shared % number == 0]
        raise ConfigError(
            f"data.global_batch: found {config.global_batch} on {world_size} processes, which "
            f"cannot share it evenly; start {', '.join(map(str, allowed))} processes, or give a "
            f"multiple of {world_size}"
        )
    return config.global_batch // world_size


def build_train_loader(
    config: Config, shards: ShardSet, rank: int, world_size: int, device: torch.device
) -> SegmentLoader:
    """This rank's part of the training split, as random segments that arrive on `device`.

    Raises:
        ConfigError: The split has fewer utterances than one micro-batch of all ranks, or the
            micro-batch or the lanes cannot be shared out over them.
    """
    data, split = config.data, shards["train"]
    batch_size = batch_of_each(data, world_size)
    lanes, segments = data.lanes, batch_size * world_size
    if len(split) < segments:
        name = "batch_size" if data.global_batch is None else "global_batch"
        raise ConfigError(
            f"data.{name}: found {getattr(data, name)} on {world_size} process(es), but "
            f"{data.shards} has only {len(split)} utterances to train on; take a smaller one"
        )
    if data.order == "windowed" and (lanes % world_size or segments % lanes):
        raise ConfigError(
            f"data.lanes: found {lanes}; with data.order windowed it must be a multiple of the "
            f"{world_size} process(es) and divide the {segments} segments of their micro-batches"
        )
    return SegmentLoader(
        split,
        order=data.order,
        lanes=data.lanes,
        window_shards=data.window_shards,
        placement=data.placement,
        prefetch=data.prefetch,
        device=device,
        batch_size=batch_size,
        segment_frames=data.segment_frames,
        seed=config.train.seed,
        rank=rank,
        world_size=world_size,
        pad_value=data.pad_value,
        verify_reads=data.verify_reads,
        on_corrupt=data.on_corrupt,
        max_corrupt=data.max_corrupt,
    )


def build_eval_loader(
    config: DataConfig, shards: ShardSet, split: str, rank: int = 0, world_size: int = 1
) -> UtteranceLoader:
    """This rank's part of a split, as whole utterances batched by length."""
    return UtteranceLoader(
        shards[split],
        max_frames=config.eval_frames,
        rank=rank,
        world_size=world_size,
        pad_value=config.pad_value,
        on_corrupt=config.on_corrupt,
        max_corrupt=config.max_corrupt,
    )
