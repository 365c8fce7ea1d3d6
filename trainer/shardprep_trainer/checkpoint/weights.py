"""The weights of a checkpoint, put into a model."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from shardprep import other_features
from shardprep_trainer.checkpoint.state import Checkpoint, unfit
from shardprep_trainer.errors import CheckpointError, ConfigError
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


def start_from(
    model: nn.Module, checkpoint: Checkpoint, speakers: tuple[str, ...]
) -> tuple[str, ...]:
    """Put the weights of another run into a model, for fine-tuning.

    The head may be of other speakers. It then has the weights of the speakers whom both know, by
    their names, and keeps its own for the others.

    Args:
        model: The model.
        checkpoint: Of the other run.
        speakers: The speakers of the model's head.

    Returns:
        The speakers whom the other run does not know.

    Raises:
        CheckpointError: The other run has another model.
    """
    weights = dict(checkpoint.weights)
    if checkpoint.speakers != speakers:
        rows = {name: row for row, name in enumerate(checkpoint.speakers)}
        both = [(own, rows[name]) for own, name in enumerate(speakers) if name in rows]
        fresh = model.state_dict()
        # The last layer of the head has a row for each speaker; others may have as many rows.
        last = [name for name in fresh if name.startswith("classifier.")][-1].rpartition(".")[0]
        for name, own in fresh.items():
            found = weights.get(name)
            if (
                name.rpartition(".")[0] == last
                and found is not None
                and found.shape == (len(checkpoint.speakers), *own.shape[1:])
                and own.shape[:1] == (len(speakers),)
            ):
                weights[name] = own.clone()
                for here, there in both:
                    weights[name][here] = found[there].to(own.dtype)
    try:
        load_weights(model, weights, checkpoint.file)
    except CheckpointError as error:
        folder = checkpoint.file.parent
        # That of a model has the options of its run, that of step checkpoints has not.
        place = folder if (folder / "config.yaml").is_file() else folder.parent
        raise CheckpointError(
            f"{error}; train.start_from takes a model of the recipe and sizes of this run: give "
            f"--config {place}"
        ) from error
    known = set(checkpoint.speakers)
    return tuple(name for name in speakers if name not in known)


def check_features(checkpoint: Checkpoint, features: dict[str, Any] | None, where: str) -> None:
    """Make sure that the shards have features like those that a model was trained on.

    Args:
        checkpoint: The model.
        features: Those of the shards, where they are known.
        where: The shards, for the error to name.

    Raises:
        ConfigError: They are known to be others.
    """
    expected = checkpoint.features
    if features is None or expected is None or features == expected:
        return
    raise ConfigError(
        f"train.start_from: {where} has other features than {checkpoint.file} was trained on "
        f"({other_features(features, expected)}); build it with "
        f"--features-from {checkpoint.file.parent}"
    )
