"""What must be right before any work starts: data, and the run that is resumed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from shardprep import ShardSet, locate
from shardprep_trainer.checkpoint.open_shards import open_shards_of
from shardprep_trainer.checkpoint.state import Description, Training
from shardprep_trainer.config.fields import Config, DataConfig, flatten
from shardprep_trainer.errors import ConfigError

Changes = dict[str, tuple[Any, Any]]

# What a resumed run may not change: it would be another run, on other data, with other weights.
_FIXED_PARTS = ("model.", "augment.", "loss.")
_FIXED = (
    "data.segment_frames",
    "data.pad_value",
    "data.order",
    "data.lanes",
    "data.window_shards",
    "optim.name",
    "train.average_decay",
    "train.start_from",
    "train.seed",
)


def open_data(data: DataConfig, *, validated: bool) -> ShardSet:
    """Open the shards to train on.

    Args:
        data: Where they are, and how they are kept.
        validated: Whether a validation split is needed.

    Raises:
        ConfigError: There are no shards, or a split is missing or empty; the message has the
            remedy.
        ShardprepError: The shards cannot be read.
    """
    path, place = data.shards, locate(data.shards)
    if isinstance(place, Path) and not place.is_dir():
        raise ConfigError(
            f"data.shards: there is no folder {path}; make it with "
            f"`shardprep build Dataset/ {path}`, or name another with --data.shards"
        )
    shards = open_shards_of(data)
    filled = [name for name, split in shards.manifest.splits.items() if split.samples]
    if "train" not in filled:
        raise ConfigError(
            f"data.shards: {path} has no utterances in a train split, only in "
            f"{', '.join(filled) or 'none'}; build it from labelled ones with `shardprep build`"
        )
    if validated and "val" not in filled:
        raise ConfigError(
            f"data.shards: {path} has no utterances in a val split to validate on; build it with "
            "`shardprep build --val-fraction 0.1`, or do without: --train.valid_steps 0"
        )
    # A set that is replaced later leaves the files of this one to the run.
    for name in ("train", "val") if validated else ("train",):
        shards[name].map_all()
    return shards


def check_same_run(
    config: Config,
    began: Config,
    launch: Training,
    *,
    global_batch: int,
    precision: str,
    processes: int,
) -> Changes:
    """Refuse to resume with a configuration that makes it another run.

    Args:
        config: The configuration given now.
        began: The configuration that the run began with.
        launch: The launch that it began with.
        global_batch: Segments a step over all processes now.
        precision: Mixed precision now.
        processes: Number of processes now.

    Returns:
        What differs and may, dotted fields and the launch: name -> (value then, value now).

    Raises:
        ConfigError: Naming the field, what was found and what the run began with.
    """
    before, now = flatten(began.to_dict()), flatten(config.to_dict())
    changed = {key: (before.get(key), now[key]) for key in now if before.get(key) != now[key]}
    for key, (then, found) in changed.items():
        if key in _FIXED or key.startswith(_FIXED_PARTS):
            raise ConfigError(
                f"{key}: found {found}, but the run to resume began with {then}; give that, or "
                "start another run with --name NAME"
            )
    if global_batch != launch.global_batch:
        raise ConfigError(
            f"data.batch_size: found {global_batch} segments a step (data.batch_size x "
            f"train.accumulate x processes), but the run to resume began with "
            f"{launch.global_batch} on {launch.processes} process(es); choose them so that "
            "the product is the same, or give the product of the first and the last as "
            "--data.global_batch, which holds at any number of processes"
        )
    if launch.precision != precision:
        changed["mixed precision"] = (launch.precision, precision)
    if launch.processes != processes:
        changed["processes"] = (launch.processes, processes)
    return changed


def check_same_data(shards: ShardSet, saved: Description, path: str) -> None:
    """Refuse to resume on another data set.

    Raises:
        ConfigError: Naming both fingerprints.
    """
    found, expected = shards.manifest.fingerprint, saved.fingerprint
    if found != expected:
        raise ConfigError(
            f"data.shards: {path} has fingerprint {found}, but the run to resume began on "
            f"{expected}; give the shards it began on, or start another run with --name NAME"
        )
