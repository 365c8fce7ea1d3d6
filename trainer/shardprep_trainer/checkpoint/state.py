"""A run at one of its steps: gathered for a checkpoint, and put back from one."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from torch import Tensor, nn

from shardprep import SegmentLoader, ShardSet
from shardprep_trainer.checkpoint.files import State, load
from shardprep_trainer.config.checks import check
from shardprep_trainer.config.fields import Config, config_from_dict
from shardprep_trainer.errors import CheckpointError, ConfigError
from shardprep_trainer.model.build import build_model
from shardprep_trainer.model.model import SpeakerModel

# What a checkpoint must hold to predict with, and beside it to continue a run.
PREDICTED = ("step", "model", "config", "speakers", "n_mels")
RESUMED = (
    *PREDICTED,
    "fingerprint",
    "best",
    "optimizer",
    "scaler",
    "loader",
    "precision",
    "processes",
    "global_batch",
    "window",
    "raw",
)


def weights_state(model: nn.Module, config: Config, shards: ShardSet) -> State:
    """What predicting takes, less the step: the weights and what they mean.

    Args:
        model: The model itself, outside of any wrapper, whose names the entries would bear.
        config: Of the run.
        shards: The data set, whose speakers are the classes.
    """
    return {
        "model": model.state_dict(),
        "config": config.to_dict(),
        "speakers": list(shards.speakers),
        "n_mels": shards.manifest.n_mels,
        "fingerprint": shards.manifest.fingerprint,
    }


def training_state(
    accelerator: Accelerator, optimizer: AcceleratedOptimizer, loader: SegmentLoader
) -> State:
    """What continuing takes beside the weights, and the launch that it began with."""
    scaler = accelerator.scaler
    return {
        "optimizer": optimizer.state_dict(),
        "scaler": None if scaler is None else scaler.state_dict(),
        "loader": loader.state_dict(),
        "precision": str(accelerator.mixed_precision),
        "processes": accelerator.num_processes,
    }


def load_weights(model: nn.Module, saved: State, file: Path) -> None:
    """Put the weights of a checkpoint into a model; `file` is named in errors.

    Raises:
        CheckpointError: They are not those of such a model.
    """
    try:
        model.load_state_dict(saved["model"])
    except (RuntimeError, TypeError, AttributeError) as error:
        raise _unfit(file, "weights", error) from error


def start_from(model: nn.Module, path: str, shards: ShardSet) -> None:
    """Put the weights of another run's checkpoint into a model, for fine-tuning.

    Raises:
        ConfigError: It was trained on other speakers.
        CheckpointError: It cannot be read, or is of another model.
    """
    file = Path(path)
    saved = load_described(file)
    if list(saved["speakers"]) != list(shards.speakers):
        raise ConfigError(
            f"train.start_from: {path} knows {len(saved['speakers'])} speakers that are not the "
            f"{len(shards.speakers)} of these shards; give a checkpoint trained on these speakers"
        )
    load_weights(model, saved, file)


def load_described(file: Path) -> State:
    """Read a checkpoint and make sure that it says of its model what it must, as it must.

    Raises:
        CheckpointError: It cannot be read, or an entry is not of the kind that it should be.
    """
    saved = load(file, needs=PREDICTED)
    check_description(saved, file)
    return saved


def check_description(saved: State, file: Path) -> None:
    """Make sure of the kinds of the entries that describe a model; `file` is named in errors.

    Raises:
        CheckpointError: Naming the entry.
    """
    step, n_mels, speakers, weights = (
        saved[key] for key in ("step", "n_mels", "speakers", "model")
    )
    sound = {
        "steps": type(step) is int and 0 <= step < 2**63,
        "mel bins": type(n_mels) is int and 1 <= n_mels < 2**31,
        "speakers": type(speakers) is list
        and 0 < len(speakers) == len({name for name in speakers if isinstance(name, str)}),
        "weights": isinstance(weights, dict)
        and all(isinstance(k, str) and isinstance(v, Tensor) for k, v in weights.items()),
    }
    for what, good in sound.items():
        if not good:
            raise CheckpointError(
                f"{file}: its {what} are of another kind than trainer saves; take another one"
            )
    try:
        check(config_from_dict(saved["config"]))
    except (ConfigError, TypeError, ValueError) as error:
        raise _unfit(file, "settings", error) from error


def load_model(saved: State, file: Path) -> SpeakerModel:
    """Build the model that a checkpoint describes, with its weights; `file` is named in errors.

    What the model takes is known to be what the file holds before any memory is taken.

    Raises:
        CheckpointError: Its configuration describes no model, or not that of its weights.
    """
    check_description(saved, file)
    config = config_from_dict(saved["config"]).model
    sizes = saved["n_mels"], len(saved["speakers"])
    found = {name: tuple(weight.shape) for name, weight in saved["model"].items()}

    def shapes(layers: int) -> dict[str, tuple[int, ...]]:
        with torch.device("meta"):
            model = build_model(replace(config, layers=layers), *sizes)
        return {name: tuple(weight.shape) for name, weight in model.state_dict().items()}

    try:
        # Even a block without weights takes memory: count those of one before making them all.
        one, two = len(shapes(1)), len(shapes(2))
        if len(found) != one + (config.layers - 1) * (two - one):
            raise ValueError(f"{len(found)} tensors are not those of {config.layers} blocks")
        for name, shape in shapes(config.layers).items():
            if found.get(name) != shape:
                raise ValueError(f"{name}: found {found.get(name)}, expected {shape}")
        model = build_model(config, *sizes)
    except (RuntimeError, TypeError, ValueError, ArithmeticError) as error:
        raise _unfit(file, "weights", error) from error
    load_weights(model, saved, file)
    return model


def load_training(
    accelerator: Accelerator,
    optimizer: AcceleratedOptimizer,
    loader: SegmentLoader,
    saved: State,
    file: Path,
) -> None:
    """Put optimiser, scaler and data position of a checkpoint back; `file` is named in errors.

    Raises:
        CheckpointError: The optimiser's state is not that of such a model.
        ShardprepError: The position belongs to other data.
    """
    try:
        optimizer.load_state_dict(saved["optimizer"])
    except (RuntimeError, TypeError, ValueError, KeyError) as error:
        raise _unfit(file, "optimiser's moments", error) from error
    # A run that changes to or from fp16 begins with a fresh scaler, or needs none.
    if accelerator.scaler is not None and saved["scaler"] is not None:
        accelerator.scaler.load_state_dict(saved["scaler"])
    loader.load_state_dict(saved["loader"])


def _unfit(file: Path, what: str, error: Exception) -> CheckpointError:
    detail = " ".join(str(error).split())[:200]
    return CheckpointError(
        f"{file}: the {what} in it do not fit its model ({detail}); take another checkpoint, or "
        "the version of trainer that wrote it"
    )
