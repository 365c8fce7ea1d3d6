"""The weights of a checkpoint, put into a model."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn

from shardprep_trainer.checkpoint.state import Checkpoint, unfit
from shardprep_trainer.errors import ConfigError
from shardprep_trainer.model.build import build_model
from shardprep_trainer.model.model import SpeakerNetwork


def load_weights(model: nn.Module, weights: dict[str, Tensor], file: Path) -> None:
    """Put weights into a model; `file` is named in errors.

    Raises:
        CheckpointError: They are not those of such a model.
    """
    try:
        model.load_state_dict(weights)
    except (RuntimeError, TypeError, AttributeError) as error:
        raise unfit(file, "weights", error) from error


def load_model(checkpoint: Checkpoint) -> SpeakerNetwork:
    """Build the model that a checkpoint describes, with its weights.

    The shapes are compared before memory is taken for a model.

    Raises:
        CheckpointError: Its configuration describes no model, or not that of its weights.
    """
    config, file = checkpoint.config.model, checkpoint.file
    sizes = checkpoint.n_mels, len(checkpoint.speakers)
    found = {name: tuple(weight.shape) for name, weight in checkpoint.weights.items()}

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
        raise unfit(file, "weights", error) from error
    load_weights(model, checkpoint.weights, file)
    return model


def start_from(model: nn.Module, checkpoint: Checkpoint, speakers: tuple[str, ...]) -> None:
    """Put the weights of another run into a model, for fine-tuning.

    Raises:
        ConfigError: The other run was trained on other speakers.
        CheckpointError: It has another model.
    """
    if checkpoint.speakers != speakers:
        raise ConfigError(
            f"train.start_from: {checkpoint.file} knows {len(checkpoint.speakers)} speakers that "
            f"are not the {len(speakers)} of these shards; give a model of these speakers"
        )
    load_weights(model, checkpoint.weights, checkpoint.file)
