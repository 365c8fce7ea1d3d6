"""What a run begins from: its data and its newest checkpoint, the same ones on every machine."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass

from shardprep import ShardSet
from shardprep_trainer.checkpoint.files import CheckpointFolder, Newest
from shardprep_trainer.config.fields import Config, flatten
from shardprep_trainer.errors import ConfigError
from shardprep_trainer.processes.agreement import check_alike, exchange, together
from shardprep_trainer.processes.launch import launcher_identity
from shardprep_trainer.run.preflight import open_data

# What may differ from machine to machine: where things lie.
_PER_MACHINE = (
    "data.shards",
    "data.cache_folder",
    "data.cache_gb",
    "train.runs",
    "train.start_from",
)


@dataclass(frozen=True)
class Start:
    """What a run begins from."""

    shards: ShardSet
    """The data, open."""
    checkpoints: CheckpointFolder
    """Of the run."""
    found: Newest | None
    """The checkpoint to continue from, if any."""
    launchers: list[str]
    """Identities of the launchers of all machines, which the checkpoints are to bear."""


def find_start(config: Config, *, resume: bool) -> Start:
    """Open the data, and find the checkpoint to continue from; all processes together.

    Args:
        config: Of the run.
        resume: Continue from the newest checkpoint, or from the one before it if that is damaged.
            A launcher that starts the run anew does so in any case.

    Raises:
        ConfigError: The data or the run folder does not allow this run, or the machines do not
            agree on it.
        CheckpointError: There is no checkpoint to continue from, or none that is whole.
        ShardprepError: The shards cannot be read.
        ElsewhereError: Another process has met one of these.
    """
    launchers = sorted({name for _, name in exchange(launcher_identity(os.environ)) if name})

    def find() -> Start:
        shards = open_data(config.data, validated=config.train.valid_steps > 0)
        folder = CheckpointFolder(config.run, config.train.keep)
        found = choose_checkpoint(folder, config, resume=resume, launchers=launchers)
        return Start(shards, folder, found, launchers)

    start = together(find)
    check_machines(config, start.shards, start.found)
    return start


def choose_checkpoint(
    folder: CheckpointFolder, config: Config, *, resume: bool, launchers: Sequence[str] = ()
) -> Newest | None:
    """Load the checkpoint to continue from, or make sure that none would be overwritten.

    Args:
        folder: Of the run.
        config: Of the run.
        resume: Continue from the newest checkpoint, or from the one before it if that is damaged.
        launchers: Identities of the launchers of this start. A checkpoint that bears one of them
            is their own, from before they started the run anew, and is continued from without
            being told to.

    Raises:
        ConfigError: There are checkpoints and `resume` is not given.
        CheckpointError: `resume` is given and there is none, or none that is whole.
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
    """Whether a run that one of these launchers started has saved this."""
    return not set(launchers).isdisjoint(found.training.launchers)


def check_machines(config: Config, shards: ShardSet, found: Newest | None) -> None:
    """Make sure that all machines are about to do the same run, from the same place.

    Raises:
        ConfigError: They have other options, other data or another checkpoint.
    """
    fields = {key: x for key, x in flatten(config.to_dict()).items() if key not in _PER_MACHINE}
    check_alike(fields, "give every machine the same options")
    check_alike(
        {"the fingerprint of data.shards": shards.manifest.fingerprint},
        "all machines must read the same set",
    )
    check_alike(
        {"the newest whole checkpoint": found.checkpoint.file.name if found else "none"},
        f"{config.run} must be the same folder on all machines, on a disk that they share, or "
        "hold the same checkpoints on each",
    )
