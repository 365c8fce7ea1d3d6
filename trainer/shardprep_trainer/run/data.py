"""The data of a run: shards that are fit to train on, and each process's loaders for them."""

from __future__ import annotations

import math
from pathlib import Path

import torch

from shardprep import OpenShards, SegmentLoader, UtteranceLoader, locate
from shardprep_trainer.checkpoint.open_shards import open_shards_of
from shardprep_trainer.config.fields import Config, DataConfig
from shardprep_trainer.errors import ConfigError
from shardprep_trainer.model.cpu_kernels import largest_batch


def open_data(data: DataConfig, *, validated: bool) -> OpenShards:
    """Open the shards to train on.

    Args:
        data: Where they are, and how they are kept.
        validated: Whether a validation split is needed.

    Raises:
        ConfigError: There are no shards, a split is missing or empty, or its speakers are unknown;
            the message has the remedy.
        ShardprepError: The shards cannot be read.
    """
    for path, place in zip(data.places, map(locate, data.places), strict=True):
        if isinstance(place, Path) and place.is_file():
            raise ConfigError(f"data.shards: {path} is a file; name its folder, {place.parent}")
        if isinstance(place, Path) and not place.is_dir():
            raise ConfigError(
                f"data.shards: there is no folder {path}; make it with "
                f"`shardprep build Dataset/ {path}`, or name another with --data.shards"
            )
    shards = open_shards_of(data)
    where = data.where
    filled = [name for name, count in shards.samples.items() if count]
    if "train" not in filled:
        raise ConfigError(
            f"data.shards: {where} has no utterances in a train split, only in "
            f"{', '.join(filled) or 'none'}; build it from labelled ones with `shardprep build`"
        )
    if validated and "val" not in filled:
        raise ConfigError(
            f"data.shards: {where} has no utterances in a val split to validate on; build it with "
            "`shardprep build --val-fraction 0.1`, or do without: --train.valid_steps 0"
        )
    # A run keeps the files that it has mapped, even if somebody replaces the set later.
    for name in ("train", "val") if validated else ("train",):
        # Only adopted tars may have such utterances.
        if unknown := int((shards[name].labels < 0).sum()):
            raise ConfigError(
                f"data.shards: {unknown:,} of the {len(shards[name]):,} utterances of split {name} "
                f"of {where} have no speaker; name the field of the .json members that has it: "
                "`shardprep adopt TARS DST --speaker FIELD --overwrite`"
            )
        shards[name].map_all()
    return shards


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
    config: Config, shards: OpenShards, rank: int, world_size: int, device: torch.device
) -> SegmentLoader:
    """This rank's part of the training split, as random segments that arrive on `device`.

    Raises:
        ConfigError: The split has fewer utterances than one micro-batch of all ranks, or the
            ranks cannot share the micro-batch or the lanes evenly; or the shards do not go with
            data.shares or data.balance.
    """
    data, split = config.data, shards["train"]
    batch_size = batch_of_each(data, world_size)
    lanes, segments = data.lanes, batch_size * world_size
    if len(split) < segments:
        name = "batch_size" if data.global_batch is None else "global_batch"
        raise ConfigError(
            f"data.{name}: found {getattr(data, name)} on {world_size} process(es), but "
            f"{data.where} has only {len(split)} utterances to train on; take a smaller one"
        )
    if data.order == "windowed" and (lanes % world_size or segments % lanes):
        raise ConfigError(
            f"data.lanes: found {lanes}; with data.order windowed it must be a multiple of the "
            f"{world_size} process(es) and divide the {segments} segments of their micro-batches"
        )
    try:
        return SegmentLoader(
            split,
            shares=data.shares,
            balance=data.balance,
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
    except ValueError as error:
        if data.shares is None and data.balance is None:
            raise
        # The shards do not go with them: a set has no utterances to train on, or no speakers.
        raise ConfigError(f"data.shares, data.balance: {error}") from error


def build_eval_loader(
    config: DataConfig,
    shards: OpenShards,
    split: str,
    rank: int,
    world_size: int,
    device: torch.device,
) -> UtteranceLoader:
    """This rank's part of a split, as whole utterances batched by length, for a device."""
    return UtteranceLoader(
        shards[split],
        max_frames=largest_batch(config.eval_frames, device),
        rank=rank,
        world_size=world_size,
        pad_value=config.pad_value,
        on_corrupt=config.on_corrupt,
        max_corrupt=config.max_corrupt,
    )
