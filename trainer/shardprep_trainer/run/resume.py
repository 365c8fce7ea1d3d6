"""The checkpoint from which a run continues, and whether the run may continue from it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from shardprep import OpenShards
from shardprep_trainer.checkpoint.files import CheckpointFolder, Newest
from shardprep_trainer.checkpoint.state import Description, Training
from shardprep_trainer.config.fields import Config, flatten
from shardprep_trainer.errors import ConfigError

Changes = dict[str, tuple[Any, Any]]

# What a resumed run may not change: it would be another run, with other data or other weights.
_FIXED_PARTS = ("model.", "augment.", "loss.")
_FIXED = (
    "data.segment_frames",
    "data.pad_value",
    "data.short",
    "data.shares",
    "data.balance",
    "data.order",
    "data.lanes",
    "data.window_shards",
    "optim.name",
    "train.average_decay",
    "train.start_from",
    "train.seed",
)


def choose_checkpoint(
    folder: CheckpointFolder, config: Config, *, resume: bool, launchers: Sequence[str] = ()
) -> Newest | None:
    """Load the checkpoint to continue from, or make sure that none would be overwritten.

    Args:
        folder: Of the run.
        config: Of the run.
        resume: Continue from the newest checkpoint, or from the one before it if that is damaged.
        launchers: Identities of the launchers of this start. A checkpoint that contains one of
            them is from before this launcher restarted the run, and needs no `resume`.

    Raises:
        ConfigError: There are checkpoints and `resume` is not given.
        CheckpointError: `resume` is given and there is none, or none that is undamaged.
    """
    newest = folder.latest()
    if newest is None and not resume:
        return None
    found = folder.load_newest() if resume or launchers else None
    if newest is not None and not resume and not (found and _is_own(found, launchers)):
        raise ConfigError(
            f"name: the run folder {config.run} already has checkpoints, the newest "
            f"{newest.name}; continue it with --resume, or start another with --name NAME"
        )
    assert found is not None
    return found


def _is_own(found: Newest, launchers: Sequence[str]) -> bool:
    """Whether a run that one of these launchers started has saved this checkpoint."""
    return not set(launchers).isdisjoint(found.training.launchers)


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


def check_same_data(shards: OpenShards, saved: Description, path: str) -> None:
    """Refuse to resume on another data set.

    Raises:
        ConfigError: Naming both fingerprints.
    """
    found, expected = shards.fingerprint, saved.fingerprint
    if found != expected:
        raise ConfigError(
            f"data.shards: {path} has fingerprint {found}, but the run to resume began on "
            f"{expected}; give the shards it began on, or start another run with --name NAME. If "
            "shards were appended, that run can begin with the weights of this one: "
            "--train.start_from"
        )
